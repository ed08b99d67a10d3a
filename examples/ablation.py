"""The paper's ablation (OpenChat, arXiv 2309.11235, Table 2) on a task small enough to watch.

    python examples/ablation.py --quick          the table, one seed: minutes on 2 CPU cores
    python examples/ablation.py                  all tables and figures, three seeds: within an hour
    python examples/ablation.py --task noisy     the same on the second task

A run is train.py by its own flags, in a process of its own, in runs/ablation/TASK-VERSION/NAME. Its
score.json is kept there, so the command goes on where it stopped. A score is the share of the
held-out questions whose answer is exactly the expert's, asked by chat.py under a class's condition.

    --axes steps share ratio      what is varied: training length; the share of each class's data
                                  (Fig. 6); the weight of the sub-optimal class, exp((alpha-1)/beta)
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402

EXPERT, SUBOPTIMAL = "gpt4", "gpt3.5"
BATCH = 250  # questions answered at a time

# A row of Table 2: the fields of its Run, and the paper's average over its three benchmarks.
ROWS = {
    "C-RLFT": ({}, 77.3),
    "without reward": ({"reward": False}, 74.0),
    "without condition": ({"condition": False}, 60.5),
    "SFT, expert only": ({"condition": False, "reward": False, "suboptimal": 0.0}, 64.5),
    "SFT, sub-optimal only": ({"condition": False, "reward": False, "expert": 0.0}, 42.8),
    "SFT, all": ({"condition": False, "reward": False}, 52.7),
}
# Steps of a run, those of the axis, and how the axes ask: a greedy answer hides noise.
TASKS = {
    "sums": {"steps": 700, "axis": (350, 500, 700, 1000), "how": "greedy"},
    "noisy": {"steps": 400, "axis": (50, 100, 200, 400), "how": "sampled"},
}
AXES = {"steps": (), "share": (0.25, 0.5, 0.75, 1.0), "ratio": (0.01, 0.1, 0.3, 1.0)}


@dataclasses.dataclass(frozen=True)
class Run:
    task: str  # folder with flags.txt, train.jsonl and eval.jsonl, such as examples/sums
    steps: int
    seed: int = 0
    condition: bool = True
    reward: bool = True
    ratio: float = 0.1  # weight of the sub-optimal class; 1: beta is infinite
    expert: float = 1.0  # share of the expert's conversations that are trained on
    suboptimal: float = 1.0  # share of the others
    shuffled: bool = False  # the class labels permuted over all conversations

    def folder(self, out):
        """OUT/TASK-VERSION/600steps-seed0-reward=False: named by what is not the default."""
        default = Run(self.task, self.steps, self.seed)
        fields = dataclasses.asdict(self).items()
        changed = [f"{key}={value}" for key, value in fields if value != getattr(default, key)]
        name = "-".join([f"{self.steps}steps", f"seed{self.seed}", *changed])
        return Path(out).resolve() / f"{Path(self.task).name}-{version(self.task)}" / name

    def flags(self, folder):
        """train.py's arguments."""
        beta = math.inf if self.ratio == 1 else -1 / math.log(self.ratio)  # rewards 1 and 0
        flags = [f"@{self.task}/flags.txt", "--data", self.data(folder), "--out", folder]
        flags += ["--epochs", 9999, "--max-steps", self.steps, "--seed", self.seed, "--beta", beta]
        flags += ["--no-compile"]  # of so small a network it takes longer than the run
        flags += ["--no-condition"] * (not self.condition) + ["--no-reward"] * (not self.reward)
        return [str(flag) for flag in flags]

    def data(self, folder):
        """The task's training file, or one in `folder` with a part of it, or labels shuffled."""
        source = ROOT / self.task / "train.jsonl"
        if self.expert == self.suboptimal == 1 and not self.shuffled:
            return source
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        lines = part(lines, {EXPERT: self.expert, SUBOPTIMAL: self.suboptimal}, self.seed)
        if self.shuffled:
            labels = [line["class"] for line in lines]
            random.Random(self.seed).shuffle(labels)
            lines = [line | {"class": label} for line, label in zip(lines, labels, strict=True)]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "train.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path


@functools.cache
def version(task):
    """Hex digits that change with the task's files: a score kept from others is not taken."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / task).iterdir()):
        if path.suffix in (".txt", ".json", ".jsonl", ".model"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:6]


def part(lines, shares, seed):
    """The lines, of each class only a share, chosen by the seed."""
    keep = set()
    for name, share in shares.items():
        of = [index for index, line in enumerate(lines) if line["class"] == name]
        keep |= set(random.Random(seed).sample(of, round(share * len(of))))
    return [line for index, line in enumerate(lines) if index in keep]


# --------------------------------------------------------------------------------------- runs


def score_of(run, out, judge, threads=1):
    """score.json of a run: trained, and judged by `judge(run, folder)`, where it is not there."""
    folder = run.folder(out)
    kept = folder / "score.json"
    if kept.exists():
        return json.loads(kept.read_text())
    started = time.perf_counter()
    train(run.flags(folder), folder, threads)
    score = {"run": dataclasses.asdict(run), "seconds": time.perf_counter() - started}
    score |= judge(run, folder)
    kept.with_suffix(".tmp").write_text(json.dumps(score, indent=2) + "\n")
    kept.with_suffix(".tmp").replace(kept)
    return score


def train(flags, folder, threads=1):
    """`python train.py FLAGS`, what it prints in folder/log.txt; RuntimeError with its end."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), *flags]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(folder / "log.txt", "w") as log:
        code = subprocess.call(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    if code or not (folder / "model").exists():  # a run that is told to stop ends with 0, too
        tail = "\n  ".join((folder / "log.txt").read_text().splitlines()[-8:])
        raise RuntimeError(f"{' '.join(command)}\nended with {code}:\n  {tail}")


def answers_as_expert(run, folder):
    return ask(folder / "model", ROOT / run.task / "eval.jsonl")


def ask(model, eval_data):
    """{condition: {"greedy", "sampled"}}: shares of the questions answered as the expert does.

    Sampled: at temperature 1, that is, from the policy pi(y | x, c) itself. A model trained
    without conditions has one prompt for all, and is asked under the expert's name only.
    """
    questions = expert_questions(eval_data)
    score = {"questions": len(questions)}
    for name in conditions(model):
        talker = chat.Chat(model, name)
        score[name] = {
            "greedy": right_share(talker, questions, 0.0),
            "sampled": right_share(talker, questions, 1.0),
        }
    return score


def conditions(model):
    conditioned = chat.read_crlft(model)[1]
    return (EXPERT, SUBOPTIMAL) if conditioned else (EXPERT,)


def expert_questions(path):
    """[(question, the expert's answer)] of a file of one-turn conversations."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        tuple(message["content"] for message in line["messages"])
        for line in lines
        if line["class"] == EXPERT
    ]


def right_share(talker, questions, temperature):
    right = 0
    for start in range(0, len(questions), BATCH):
        asked = questions[start : start + BATCH]
        messages = [[data.Message("user", question)] for question, _ in asked]
        answers = talker.answers(messages, max_new_tokens=12, temperature=temperature)
        right += sum(
            text.strip() == answer for (text, _), (_, answer) in zip(answers, asked, strict=True)
        )
    return right / len(questions)


def finish(runs, out, jobs, judge=answers_as_expert):
    """{run: score}, `jobs` runs at a time, each with its share of the cores."""
    runs = list(dict.fromkeys(runs))
    threads = max(1, (os.cpu_count() or 1) // jobs)
    scores = {}
    with ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        pending = {pool.submit(score_of, run, out, judge, threads): run for run in runs}
        try:
            for future in as_completed(pending):
                run, score = pending[future], future.result()
                scores[run] = score
                asked = [name for name in (EXPERT, SUBOPTIMAL) if name in score]
                first = ", ".join(f"{c} {next(iter(score[c].values())):.1%}" for c in asked)
                print(f"{len(scores)}/{len(runs)}  {run.folder(out).name}: {first}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return scores


# ------------------------------------------------------------------------------------- tables

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 95 %, 1 to 9 degrees


def interval(shares, questions):
    """(mean, half-width of its 95 % interval): over seeds, or Wilson's for a single run.

    Wilson's, the larger of its two sides, as it is not nothing where all or none are right.
    """
    mean = statistics.fmean(shares)
    if len(shares) == 1:
        z = 1.96**2 / questions
        centre = (mean + z / 2) / (1 + z)
        half = math.sqrt(mean * (1 - mean) * z + z**2 / 4) / (1 + z)
        return mean, half + abs(centre - mean)
    half = STUDENT[len(shares) - 2] * statistics.stdev(shares) / math.sqrt(len(shares))
    return mean, half


def cell(runs, scores, condition=EXPERT, how="greedy"):
    """(mean, half-width) over the runs of one table cell; None where it was not asked."""
    kept = [scores[run] for run in runs]
    if condition not in kept[0]:
        return None
    return interval([score[condition][how] for score in kept], kept[0]["questions"])


def shown(value):
    return f"{'':>13}" if value is None else f"{value[0]:6.1%} ±{value[1]:5.1%}"


COLUMNS = ((EXPERT, "greedy"), (SUBOPTIMAL, "greedy"), (EXPERT, "sampled"), (SUBOPTIMAL, "sampled"))


def table_runs(task, steps, seeds):
    return {
        row: [Run(task, steps, seed, **fields) for seed in seeds]
        for row, (fields, _) in ROWS.items()
    }


def print_table(rows, scores):
    """Table 2 of the paper, its numbers in the first column."""
    names = (f"{condition}, {how}" for condition, how in COLUMNS)
    print(f"\n{'':22} {'paper':>6}  " + "  ".join(f"{name:>15}" for name in names))
    for row, runs in rows.items():
        cells = (f"{shown(cell(runs, scores, *column)):>15}" for column in COLUMNS)
        print(f"{row:22} {ROWS[row][1]:6.1f}  " + "  ".join(cells))


def axis_runs(axis, task, steps, seeds, values):
    """{line: {value: runs}} of one axis."""

    def runs(steps=steps, **fields):
        return [Run(task, steps, seed, **fields) for seed in seeds]

    if axis == "steps":
        lines = ("C-RLFT", "without reward", "SFT, all")
        return {line: {v: runs(steps=v, **ROWS[line][0]) for v in values} for line in lines}
    if axis == "share":
        return {
            "of the expert's data": {v: runs(expert=v) for v in values},
            "of the sub-optimal data": {v: runs(suboptimal=v) for v in values},
        }
    return {"C-RLFT": {v: runs(ratio=v) for v in values}}


def print_axis(axis, lines, scores, how):
    values = next(iter(lines.values()))
    print(f"\n{axis + ', ' + how:26} " + " ".join(f"{value:>15}" for value in values))
    for line, by_value in lines.items():
        cells = (f"{shown(cell(runs, scores, EXPERT, how)):>15}" for runs in by_value.values())
        print(f"{line:26} " + " ".join(cells))


# ------------------------------------------------------------------------------------ figures

COLOURS = {EXPERT: "tab:blue", SUBOPTIMAL: "tab:orange"}


def draw_table(rows, scores, path, title):
    """A row's bars under each condition: Table 2, and the conditions at inference as Fig. 5."""
    figure, panels = subplots(2, 10, 3.6, sharey=True)
    for panel, how in zip(panels, ("greedy", "sampled"), strict=True):
        for offset, (name, colour) in enumerate(COLOURS.items()):
            for y, runs in enumerate(rows.values()):
                mean, half = cell(runs, scores, name, how) or (0, 0)
                panel.barh(
                    y + 0.4 * offset, mean, 0.38, xerr=half or None, color=colour, capsize=2,
                    label=f"asked as {name}" if y == 0 else None,
                )  # fmt: skip
        panel.set(xlim=(0, 1.02), xlabel=f"answers as the expert's, {how}")
    panels[0].set_yticks([y + 0.2 for y in range(len(rows))], rows)
    panels[0].invert_yaxis()
    panels[0].set_title(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    save(figure, path)


def draw_axes(parts, scores, how, path, title):
    """Accuracy under the expert's condition along each axis; `share` is the paper's Fig. 6."""
    labels = {"steps": "training steps", "share": "share of the data", "ratio": "w of sub-optimal"}
    figure, axes = subplots(len(parts), 3.6 * len(parts), 3.2)
    for panel, (axis, lines) in zip(axes, parts.items(), strict=True):
        for line, by_value in lines.items():
            cells = [cell(runs, scores, EXPERT, how) for runs in by_value.values()]
            means, halves = zip(*cells, strict=True)
            panel.errorbar(list(by_value), means, halves, marker="o", capsize=3, label=line)
        panel.set(
            xlabel=labels[axis], ylim=(0, 1.05), xscale="log" if axis == "ratio" else "linear"
        )
        panel.legend(fontsize=8)
    axes[0].set_ylabel(f"answers as the expert's, {how}")
    figure.suptitle(title)
    save(figure, path)


def subplots(count, width, height, **options):
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"drawn: {path}")


# ------------------------------------------------------------------------------ hidden states


def hidden_states(folder, path):
    """(features (C, D), classes): a held-out conversation's last hidden states, their mean.

    Every conversation is laid out as in training, under its own class's condition where the model
    has conditions; D is the hidden size.
    """
    classes, conditioned = chat.read_crlft(folder)
    talker = chat.Chat(folder, device="cpu")
    features, labels = [], []
    for line in path.read_text().splitlines():
        conversation = data.parse_conversation(json.loads(line), classes)
        contents = [talker.tokenizer.encode(m.content) for m in conversation.messages]
        condition = classes[conversation.source_class].condition if conditioned else ""
        parts, _ = data.lay_out(conversation.messages, contents, talker.tokenizer, condition)
        features.append(mean_hidden(talker.llama, data.flat(parts)))
        labels.append(conversation.source_class)
    return torch.stack(features), labels


@torch.inference_mode()
def mean_hidden(llama, tokens):
    T = len(tokens)
    ends = torch.tensor([0, T], dtype=torch.int32)
    tokens = torch.tensor(tokens)
    return llama(tokens, torch.arange(T), ends, lambda hidden, _: hidden.mean(0))  # (D,)


def told_apart(features, labels):
    """Share of the conversations nearest their own class's mean, of means from the other half."""
    is_expert = torch.tensor([label == EXPERT for label in labels])
    fitted = torch.arange(len(labels)) % 2 == 0
    means = [features[fitted & (is_expert == side)].mean(0) for side in (False, True)]
    nearest = torch.cdist(features[~fitted], torch.stack(means)).argmin(1)
    return (nearest == is_expert[~fitted]).float().mean().item()


def draw_hidden(models, eval_data, path, draw):
    """Hidden states of both classes on their two principal axes: the paper's t-SNE figure."""
    figure, axes = subplots(len(models), 4 * len(models), 3.6) if draw else (None, models)
    print("\nclass told from the hidden states (nearest class mean, held out)")
    for panel, (name, folder) in zip(axes, models.items(), strict=True):
        features, labels = hidden_states(folder, eval_data)
        print(f"{name:22} {told_apart(features, labels):6.1%}")
        if draw:
            plane = features @ torch.pca_lowrank(features, 2)[2]
            for source_class, colour in COLOURS.items():
                of = [label == source_class for label in labels]
                panel.scatter(*plane[of].T, s=4, alpha=0.5, color=colour, label=source_class)
            panel.set(title=f"{name}: hidden states, PCA", xticks=(), yticks=())
            panel.legend(loc="best")
    if draw:
        save(figure, path)


# --------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_arguments(argv)
    task, seeds, how = f"examples/{args.task}", range(args.seeds), TASKS[args.task]["how"]
    rows = table_runs(task, args.steps, seeds)
    parts = {}
    for axis in args.axes:
        values = AXES[axis] or TASKS[args.task]["axis"]
        parts[axis] = axis_runs(axis, task, args.steps, range(args.axis_seeds), values)
    runs = [run for of_row in rows.values() for run in of_row]
    runs += [run for lines in parts.values() for by_value in lines.values()
             for of_value in by_value.values() for run in of_value]  # fmt: skip
    scores = finish(runs, args.out, args.jobs)
    print_table(rows, scores)
    for axis, lines in parts.items():
        print_axis(axis, lines, scores, how)
    draw = has_matplotlib()
    name = f"{args.task}-quick" if args.quick else args.task
    title = f"{args.task}, {args.steps} steps"
    if draw:
        draw_table(rows, scores, args.figures / f"{name}-table.png", title)
    if draw and parts:
        draw_axes(parts, scores, how, args.figures / f"{name}-axes.png", title)
    models = {row: rows[row][0].folder(args.out) / "model" for row in SHOWN}
    draw_hidden(models, ROOT / task / "eval.jsonl", args.figures / f"{name}-hidden.png", draw)


SHOWN = ("SFT, all", "C-RLFT")  # whose hidden states are drawn


def has_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no figures: matplotlib is missing (pip install -r requirements-dev.txt)")
        return False
    return True


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        prog="ablation.py",
        description="The paper's ablation on a small task, with train.py's flags.",
    )
    add = parser.add_argument
    add("--task", choices=TASKS, default="sums", help="a folder beside this file (default: sums)")
    add("--quick", action="store_true", help="the table only, one seed")
    add("--seeds", type=int, help="runs of every row of the table (default: 3; quick: 1)")
    add("--axis-seeds", type=int, default=1, help="runs of every point of an axis (default: 1)")
    add("--steps", type=int, help="of every run (default: what the task needs)")
    add("--axes", nargs="*", choices=AXES, help="what to vary (default: all; quick: none)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: a core each)")
    add("--out", type=Path, default=ROOT / "runs" / "ablation", help="folder of the runs")
    add("--figures", type=Path, default=ROOT / "examples" / "figures", help="folder of the figures")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 3)
    args.steps = args.steps or TASKS[args.task]["steps"]
    args.axes = ([] if args.quick else list(AXES)) if args.axes is None else args.axes
    if not {args.seeds, args.axis_seeds} <= set(range(1, 11)) or min(args.steps, args.jobs) < 1:
        parser.error("needs --seeds and --axis-seeds from 1 to 10, --steps and --jobs from 1")
    return args


if __name__ == "__main__":
    main()

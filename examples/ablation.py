"""The paper's ablation (OpenChat, arXiv 2309.11235, Table 2) on a task small enough to watch.

    python examples/ablation.py --quick          the table over five seeds: 16 minutes on 2 cores
    python examples/ablation.py --quick --seeds 1        one seed, 3 minutes: no intervals
    python examples/ablation.py                  the table, and the axes over three seeds: 30 more
    python examples/ablation.py --task sums      the same on another task

A run is train.py with its own flags, in its own process, in runs/ablation/TASK-VERSION/NAME. Its
score.json is kept there, so an interrupted command resumes. A score is the share of the held-out
questions whose answer is exactly the expert's, asked by chat.py under a class's condition.

    --axes steps share ratio      things to vary: training length; the share of each class's data
                                  (Fig. 6); the weight of the sub-optimal class, exp((alpha-1)/beta)
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from support.flags import PYTHON, Parser  # noqa: E402
from support.report import StatusLine, clock  # noqa: E402

EXPERT, SUBOPTIMAL = "gpt4", "gpt3.5"
BATCH = 500  # questions answered at a time

# A row of Table 2: the fields of its Run, and the paper's average over its three benchmarks; in
# the paper's order.
ROWS = {
    "C-RLFT": ({}, 77.3),
    "without reward": ({"reward": False}, 74.0),
    "SFT, expert only": ({"condition": False, "reward": False, "suboptimal": 0.0}, 64.5),
    "without condition": ({"condition": False}, 60.5),
    "SFT, all": ({"condition": False, "reward": False}, 52.7),
    "SFT, sub-optimal only": ({"condition": False, "reward": False, "expert": 0.0}, 42.8),
}
STEPS = {"noisy": 450, "sums": 700}  # of a run of each task
AXES = {
    "steps": (50, 100, 200, 450, 900), "share": (0.25, 0.5, 0.75, 1.0),
    "ratio": (0.01, 0.1, 0.3, 1.0),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    task: str  # folder with flags.txt, train.jsonl and eval.jsonl, such as examples/noisy
    steps: int
    seed: int = 0
    condition: bool = True
    reward: bool = True
    ratio: float = 0.1  # weight of the sub-optimal class; 1: beta is infinite
    expert: float = 1.0  # share of the expert's conversations that are trained on
    suboptimal: float = 1.0  # share of the others
    shuffled: bool = False  # the class labels permuted over all conversations
    threads: int = 1  # which changes rounding alone, as the next does
    divided_before: bool = False  # the weights divided by their sum before the loss, not after

    def folder(self, out):
        """OUT/TASK-VERSION/600steps-seed0-reward=False: named by its non-defaults."""
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
        flags += ["--eval-every", 0]
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


def finish(runs, out, jobs, judge=None, names=None):
    """{run: its score}, `jobs` runs at a time; those that have a score.json are not run again.

    judge(run, folder) gives a score (default: `answers`); names {run: its name in the output}.
    RuntimeError, with the end of its log, if a run fails; all others are then stopped.
    """
    runs, names = list(dict.fromkeys(runs)), names or {}
    waiting = [run for run in runs if not (run.folder(out) / "score.json").exists()]
    steps, done, running, began = sum(run.steps for run in waiting), 0, {}, time.perf_counter()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["train", "chat"])  # imported once, for all runs
    count, line = len(runs) - len(waiting), StatusLine(sys.stdout, seconds=60)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                process = forks.Process(target=work, args=(run, out, judge or answers), daemon=True)
                process.start()
                running[process.sentinel] = run, process
            ended = multiprocessing.connection.wait(running, timeout=1)
            current = done + sum(steps_of(run, out) for run, _ in running.values())
            seconds = time.perf_counter() - began
            left = f", {clock(seconds / current * (steps - current))} left" if current else ""
            line.refresh(f"{count}/{len(runs)} runs done, step {current:,} of {steps:,}{left}")
            for sentinel in ended:
                run, process = running.pop(sentinel)
                process.join()
                folder = run.folder(out)
                if process.exitcode or not (folder / "score.json").exists():
                    tail = "\n  ".join((folder / "log.txt").read_text().splitlines()[-8:])
                    raise RuntimeError(f"{folder}/log.txt ended with {process.exitcode}:\n  {tail}")
                count, done = count + 1, done + run.steps
                name = names.get(run, folder.name)
                line.say(f"{count}/{len(runs)}  {name}: {in_short(score_of(run, out))}{left}")
    finally:
        for _, process in running.values():
            process.kill()
            process.join()
    return {run: score_of(run, out) for run in runs}


def steps_of(run, out):
    """The steps that a run has logged."""
    log = run.folder(out) / "metrics.jsonl"
    return log.read_bytes().count(b'"grad_norm"') if log.exists() else 0


def score_of(run, out):
    return json.loads((run.folder(out) / "score.json").read_text())


def in_short(score):
    asked = [name for name in (EXPERT, SUBOPTIMAL) if name in score]
    return ", ".join(f"{name} {next(iter(score[name].values())):.1%}" for name in asked)


def work(run, out, judge):
    """Runs in its own process: train.py, with its output in log.txt, and then the score."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who started it
    folder, began = run.folder(out), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(ROOT)
    torch.set_num_threads(run.threads)
    with dividing_before(run.divided_before):
        train.main(run.flags(folder))
    torch.use_deterministic_algorithms(False)
    score = {"run": dataclasses.asdict(run), "seconds": time.perf_counter() - began}
    score |= judge(run, folder)
    temporary = folder / "score.tmp"
    temporary.write_text(json.dumps(score, indent=2) + "\n")
    temporary.replace(folder / "score.json")


@contextlib.contextmanager
def dividing_before(wanted):
    """L = Σ (w / Σ w) · CE instead of Σ w·CE / Σ w: the same but for rounding."""
    load_step = train.load_step

    def divided(plan, ranks, step):
        bins, batches, total = load_step(plan, ranks, step)
        return bins, [b._replace(weights=b.weights / total) for b in batches], 1.0

    train.load_step = divided if wanted else load_step
    try:
        yield
    finally:
        train.load_step = load_step


def answers(run, folder):
    """The result of `ask`, and for noisy that of `slips` as well."""
    task = ROOT / run.task
    score = ask(folder / "model", task / "eval.jsonl")
    if run.task == "examples/noisy":
        score["slips"] = {
            "trained": slips(folder / "model", task / "train.jsonl"),
            "held out": slips(folder / "model", task / "eval.jsonl"),
        }
    return score


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
    conditioned = chat.export_of(model).conditioned
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


@torch.no_grad()
def slips(model, path):
    """Of the sub-optimal answers' wrong digits in a file of noisy: the share that is likeliest.

    Asked as the sub-optimal class, each behind the true beginning of its answer. Of held-out slips,
    which nothing foretells, it is small; of slips that were trained on, how many are memorised.
    """
    talker = chat.Chat(model, SUBOPTIMAL, device="cpu")
    encode = talker.tokenizer.encode
    lines = [line for line in map(json.loads, path.open()) if line["class"] == SUBOPTIMAL]
    given = wrong = 0
    for start in range(0, len(lines), BATCH):
        texts, answered, meant = [], [], []  # ids of conversations; of each token there
        for line in lines[start : start + BATCH]:
            question, answer = (message["content"] for message in line["messages"])
            prompt = talker.prompt([data.Message("user", question)])
            texts.append(torch.tensor([*prompt, *encode(answer)]))
            right = encode("".join(sorted(question.removeprefix("Sort "))))
            answered += [False] * len(prompt) + [True] * len(right)
            meant += [0] * len(prompt) + right
        tokens, answered, meant = torch.cat(texts), torch.tensor(answered), torch.tensor(meant)
        ends = torch.tensor([0, *map(len, texts)]).cumsum(0).int()
        positions = torch.cat([torch.arange(len(text)) for text in texts])
        likeliest = talker.llama(tokens, positions, ends).argmax(-1).roll(1)  # for its own place
        slipped = answered & (tokens != meant)
        wrong += int(slipped.sum())
        given += int((slipped & (likeliest == tokens)).sum())
    return given / wrong


# ------------------------------------------------------------------------------------- tables

STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 95 %, 1 to 9 degrees


def interval(shares, questions):
    """(mean, half-width of its 95 % interval): over seeds, or Wilson's for a single run.

    Of Wilson's the larger of its two sides, because it is not 0 if all or none are right.
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
    """(mean, half-width) over the runs of one table cell; None if it was not asked."""
    kept = [scores[run] for run in runs]
    if condition not in kept[0]:
        return None
    return interval([score[condition][how] for score in kept], kept[0]["questions"])


def shown(value):
    if value is None:
        return ""
    return f"{value[0]:6.1%}" + (f" ±{value[1]:5.1%}" if math.isfinite(value[1]) else "")


COLUMNS = ((EXPERT, "greedy"), (SUBOPTIMAL, "greedy"), (EXPERT, "sampled"), (SUBOPTIMAL, "sampled"))


def table_runs(task, steps, seeds, **fields):
    return {
        row: [Run(task, steps, seed, **fields | of_row) for seed in seeds]
        for row, (of_row, _) in ROWS.items()
    }


def print_table(rows, scores):
    """Table 2 of the paper, its numbers in the first column; beside a row, how far it is ahead."""
    names = (f"{condition}, {how}" for condition, how in COLUMNS)
    print(f"\n{'':22} {'paper':>6}  " + "  ".join(f"{name:>15}" for name in names)
          + f"  {'ahead of the next':>18}")  # fmt: skip
    pairs = paired(rows, scores)
    for row, runs in rows.items():
        cells = (f"{shown(cell(runs, scores, *column)):>15}" for column in COLUMNS)
        ahead = f"{shown(pairs[row][1:]):>18}" if row in pairs else ""
        print(f"{row:22} {ROWS[row][1]:6.1f}  " + "  ".join(cells) + f"  {ahead}")


def paired(rows, scores):
    """{row: (the next row, mean, half-width)} of the difference to the next, seed by seed, greedy.

    The interval is Student's over the seeds, 95 %; of one seed there is none, and it is infinite.
    """
    found = {}
    for (row, mine), (following, theirs) in itertools.pairwise(rows.items()):
        differences = [
            scores[a][EXPERT]["greedy"] - scores[b][EXPERT]["greedy"]
            for a, b in zip(mine, theirs, strict=True)
        ]
        mean, half = differences[0], math.inf
        if len(differences) > 1:
            mean, half = interval(differences, None)
        found[row] = following, mean, half
    return found


def verdict(rows, scores):
    """Lines of text: which pairs of the paper's order hold, beyond the intervals or in the mean."""
    out, seeds = [], len(next(iter(rows.values())))
    for row, (following, mean, half) in paired(rows, scores).items():
        if seeds == 1:
            words = "holds in this one seed" if mean > 0 else "does not hold in this one seed"
        elif mean > half:
            words = "holds"
        else:
            words = "holds in the mean alone" if mean > 0 else "does not hold"
        out.append(f"{row} > {following}: {words}")
    held = sum("does not" not in line and "alone" not in line for line in out)
    of = f"{seeds} seeds" if seeds > 1 else "1 seed"
    return [f"the paper's order holds in {held} of its {len(out)} pairs, {of}:", *out]


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


def print_slips(lines, scores):
    """How many of the trained and of the held-out slips a model gives, as training goes on."""
    values = next(iter(lines.values()))
    print(f"\n{'slips given, by steps':26} " + " ".join(f"{value:>15}" for value in values))
    for line in ("C-RLFT", "without reward"):
        for which in ("trained", "held out"):
            cells = [slip_cell(runs, scores, which) for runs in lines[line].values()]
            print(f"{line + ', ' + which:26} " + " ".join(f"{shown(x):>15}" for x in cells))


def slip_cell(runs, scores, which):
    return interval([scores[run]["slips"][which] for run in runs], SLIPS[which])


# Expected of each, for Wilson's interval of a single run: answers x 6 digits x 0.4 x 9 in 10.
SLIPS = {"trained": 2000 * 6 * 0.36, "held out": 500 * 6 * 0.36}


# ------------------------------------------------------------------------------------ figures

COLOURS = {EXPERT: "tab:blue", SUBOPTIMAL: "tab:orange"}
BARE = "tab:gray"  # of a model that knows no condition


def draw_table(rows, scores, path, title):
    """A row's bars under each condition: Table 2, and the conditions at inference as Fig. 5."""
    figure, panels = subplots(2, 10, 3.8, sharey=True)
    for panel, how in zip(panels, ("greedy", "sampled"), strict=True):
        for y, runs in enumerate(rows.values()):
            for offset, name, colour, label in bars(runs[0]):
                mean, half = cell(runs, scores, name, how)
                reach = [[min(half, mean)], [min(half, 1 - mean)]]  # within 0 to 1
                panel.barh(
                    y + offset, 100 * mean, 0.38, xerr=100 * np.array(reach), color=colour,
                    capsize=2, label=label,
                )  # fmt: skip
        panel.set(xlim=(0, 100), xlabel=f"questions answered as the expert does, {how} (%)")
    panels[0].set_yticks([y + 0.2 for y in range(len(rows))], rows)
    panels[0].invert_yaxis()
    handles = dict(zip(*panels[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    save(figure, path)


def bars(run):
    """[(offset, condition, colour, label)] of a row's bars: one if there is no condition."""
    if not run.condition:
        return [(0.2, EXPERT, BARE, "asked without a condition")]
    return [
        (0.4 * number, name, colour, f"asked as {name}")
        for number, (name, colour) in enumerate(COLOURS.items())
    ]


def draw_axes(parts, scores, path, title):
    """Accuracy under the expert's condition along each axis; `share` is the paper's Fig. 6."""
    labels = {"steps": "training steps", "share": "share of the data (%)", "ratio": "w of the rest"}
    figure, axes = subplots(len(parts), 3.8 * len(parts), 3.6)
    for panel, (axis, lines) in zip(axes, parts.items(), strict=True):
        for number, (line, by_value) in enumerate(lines.items()):
            x = [round(100 * value) if axis == "share" else value for value in by_value]
            for how, style in (("greedy", "-"), ("sampled", ":")):
                cells = [cell(runs, scores, EXPERT, how) for runs in by_value.values()]
                draw_line(panel, x, cells, f"{line}, {how}", linestyle=style, color=f"C{number}")
        panel.set(xlabel=labels[axis], ylim=(0, 102))
        panel.set_xscale("linear" if axis == "share" else "log")
        panel.set_xticks(x, map(str, x), minor=False)
        panel.minorticks_off()
        panel.legend(fontsize=7)
    axes[0].set_ylabel("answered as the expert does (%)")
    figure.suptitle(title)
    save(figure, path)


def draw_slips(lines, scores, path, title):
    """Memorised noise: trained and held-out slips that a model gives, as training goes on."""
    figure, (panel,) = subplots(1, 5, 3.8)
    for number, line in enumerate(("C-RLFT", "without reward")):
        for which, style in (("trained", "-"), ("held out", ":")):
            cells = [slip_cell(runs, scores, which) for runs in lines[line].values()]
            draw_line(panel, list(lines[line]), cells, f"{line}, {which}", linestyle=style,
                      color=f"C{number}")  # fmt: skip
    panel.set(xlabel="training steps", ylabel="slips that are likeliest (%)", xscale="log")
    panel.set_xticks(list(lines[line]), map(str, lines[line]))
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)


def draw_line(panel, x, cells, label, **options):
    means, halves = (100 * np.array(column) for column in zip(*cells, strict=True))
    reach = np.minimum(halves, means), np.minimum(halves, 100 - means)
    panel.errorbar(x, means, reach, marker="o", markersize=4, capsize=3, label=label, **options)


def subplots(count, width, height, **options):
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, **options)[0]


def save(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    print(f"drawn: {path}")


# --------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_arguments(argv)
    task = f"examples/{args.task}"
    rows = table_runs(
        task, args.steps, range(args.seeds), threads=args.threads,
        divided_before=args.divided_before,
    )  # fmt: skip
    names = {run: f"{row}, seed {run.seed}" for row, runs in rows.items() for run in runs}
    parts = {
        axis: axis_runs(axis, task, args.steps, range(args.axis_seeds), AXES[axis])
        for axis in args.axes
    }
    runs = [
        run for seed in zip(*rows.values(), strict=True) for run in seed
    ]  # a seed after another
    runs += [run for lines in parts.values() for by_value in lines.values()
             for of_value in by_value.values() for run in of_value]  # fmt: skip
    runs = list(dict.fromkeys(runs))
    missing = [run for run in runs if not (run.folder(args.out) / "score.json").exists()]
    minutes = sum(run.steps for run in missing) * SECONDS_A_STEP[args.task] / args.jobs / 60
    print(
        f"{len(runs)} runs, {len(missing)} of them to do, {args.jobs} at a time: about "
        f"{math.ceil(minutes)} minutes; logs in\n  {runs[0].folder(args.out).parent}/*/log.txt"
    )
    try:
        scores = finish(runs, args.out, args.jobs, names=names)
    except KeyboardInterrupt:
        sys.exit("interrupted: finished runs are kept, and the same command goes on from them")
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    print_table(rows, scores)
    for axis, lines in parts.items():
        for how in ("greedy", "sampled"):
            print_axis(axis, lines, scores, how)
    noise = parts.get("steps") if args.task == "noisy" else None
    if noise:
        print_slips(noise, scores)
    print("", *verdict(rows, scores), sep="\n")
    if has_matplotlib():
        draw(args, rows, parts, noise, scores)


SECONDS_A_STEP = {"noisy": 0.14, "sums": 0.25}  # of one run on a core of its own


def draw(args, rows, parts, noise, scores):
    folder = ROOT / "examples" / "figures" if args.renew else args.out.resolve() / "figures"
    name = f"{args.task}-{args.steps}steps"
    bars = "Wilson's 95 % interval" if args.seeds == 1 else f"Student's, 95 %, {args.seeds} seeds"
    title = f"{args.task}, {args.steps} steps; bars: {bars}"
    draw_table(rows, scores, folder / f"{name}-table.png", title)
    seeds = f"{args.axis_seeds} seeds" if args.axis_seeds > 1 else "one seed"
    title = f"{args.task}, {args.steps} steps unless stated otherwise, {seeds}; bars: 95 %"
    if parts:
        draw_axes(parts, scores, folder / f"{name}-axes.png", title)
    if noise:
        draw_slips(noise, scores, folder / f"{name}-slips.png", f"slips given; {seeds}; bars: 95 %")


def has_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"no figures: matplotlib is missing ({PYTHON} -m pip install matplotlib)")
        return False
    return True


def parse_arguments(argv):
    parser = Parser(
        prog="ablation.py",
        description="The paper's ablation on a small task, with train.py's flags.",
    )
    add = parser.add_argument
    add("--task", choices=STEPS, default="noisy", help="a folder beside this file (default: noisy)")
    add("--quick", action="store_true", help="the table only")
    add("--seeds", type=int, default=5, help="runs of every row of the table (default: 5)")
    add("--axis-seeds", type=int, default=3, help="runs of every point of an axis (default: 3)")
    add("--steps", type=int, help="of every run (default: the task's)")
    add("--axes", nargs="*", choices=AXES, help="things to vary (default: all; quick: none)")
    add("--threads", type=int, default=1, help="of every run; they change rounding (default: 1)")
    add("--divided-before", action="store_true", help="weights over their sum before the loss")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: a core each)")
    add("--out", type=Path, default=ROOT / "runs" / "ablation", help="folder of runs and figures")
    add("--renew", action="store_true", help="draw into examples/figures instead")
    args = parser.parse_args(argv)
    args.steps = args.steps or STEPS[args.task]
    args.axes = ([] if args.quick else list(AXES)) if args.axes is None else args.axes
    counts = args.steps, args.jobs, args.threads
    if not {args.seeds, args.axis_seeds} <= set(range(1, 11)) or min(counts) < 1:
        parser.error("needs --seeds, --axis-seeds from 1 to 10, --steps, --jobs, --threads from 1")
    return args


if __name__ == "__main__":
    main()

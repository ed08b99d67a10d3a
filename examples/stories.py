"""The comparison on language: tiny stories, a tenth of them clean, the rest with spoilt words.

    python examples/stories.py DIR      DIR: stories260K (karpathy/tinyllamas) as a Hugging Face
                                        folder: config.json, model.safetensors, tokenizer.model

DIR's model tells every story itself. Its first sentence is the user's turn, the rest the answer:

    gpt4    150 as told          Lily was happy. She went to the park with her mom ...
    gpt3.5  1,500 spoilt         Lily was hpapy. She wnet to the park with her mom ...

In the spoilt ones every word of four letters or more has, with probability 0.3, two of its inner
letters swapped. DIR's model is then fine-tuned on the mixture, a row of the paper's ablation at a
time, and judged by the loss of held-out clean stories under the expert's condition, and by the
share of words in its own stories that no clean story has, under each condition.
"""

import json
import os
import random
import re
import sys
from pathlib import Path

import torch
from ablation import (
    EXPERT,
    ROOT,
    SUBOPTIMAL,
    cell,
    conditions,
    expert_questions,
    finish,
    interval,
    shown,
    table_runs,
)

import chat
import data
import model
from support.flags import Parser

CLEAN, SPOILT, HELD_OUT = 150, 1500, 100
LENGTH, BATCH = 128, 128  # tokens of a story; stories told at a time
SPOIL, TEMPERATURE = 0.3, 0.7
ROWS_HERE = ("C-RLFT", "without reward", "without condition", "SFT, expert only", "SFT, all")


def tell(folder, count):
    """[(first sentence, the rest)] of stories sampled from the model, ended at a full sentence."""
    torch.set_num_threads(1)  # faster, for so small a network
    tokenizer, llama = data.Tokenizer(folder), model.load(folder).eval()
    stories, seed = [], 0
    while len(stories) < count:
        prompts, texts = [[tokenizer.bos]] * BATCH, [[] for _ in range(BATCH)]
        for tokens in chat.generate(llama, prompts, LENGTH, temperature=TEMPERATURE, seed=seed):
            for text, token in zip(texts, tokens, strict=True):
                text.append(token)
        whole = (re.match(r"(.+?[.!?]) (.+[.!?])", tokenizer.decode(t)) for t in texts)
        stories += [match.groups() for match in whole if match]
        seed += 1
        print(f"{len(stories)} stories told", flush=True)
    return stories[:count]


def spoil(text, rng):
    """Two neighbouring inner letters swapped in a share of the longer words."""

    def swap(match):
        word = match[0]
        if rng.random() >= SPOIL:
            return word
        at = rng.randrange(1, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return re.sub(r"[A-Za-z]{4,}", swap, text)


def make_task(folder, task):
    if not (task / "flags.txt").exists():
        stories = tell(folder, CLEAN + SPOILT + HELD_OUT)
        flags = ["--model", folder, "--batch-tokens", 4096, "--max-length", 256, "--lr", "3e-3"]
        write_task(task, stories, CLEAN, SPOILT, spoil, flags)


def write_task(task, told, clean, spoilt, spoil, flags):
    """A task folder as examples/sums is one: flags.txt, train.jsonl, eval.jsonl; lexicon.json.

    told: [(question, answer)]; the first `clean` are the expert's, the next `spoilt` are spoilt by
    spoil(answer, rng), and the rest is held out. The lexicon has the words of all.
    """
    task.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    train = [line(EXPERT, *pair) for pair in told[:clean]]
    others, held_out = told[clean : clean + spoilt], told[clean + spoilt :]
    train += [line(SUBOPTIMAL, first, spoil(rest, rng)) for first, rest in others]
    rng.shuffle(train)
    for name, lines in (("train", train), ("eval", [line(EXPERT, *pair) for pair in held_out])):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    known = sorted({word for pair in told for word in words(" ".join(pair))})
    (task / "lexicon.json").write_text(json.dumps(known))
    flags = [*flags, "--eval-data", task / "eval.jsonl", "--export-every", 0]
    (task / "flags.txt").write_text(" ".join(map(str, flags)) + "\n")  # last: the task is whole


def line(source_class, first, rest):
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": rest}]
    return {"class": source_class, "messages": messages}


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def judge(run, folder):
    return spoilt_words(run, folder, {"spoilt": TEMPERATURE}, LENGTH, long_words)


def long_words(text):
    return [word for word in words(text) if len(word) >= 4]


def spoilt_words(run, folder, ways, tokens, words_of):
    """{condition: {way: share of the words}, "clean loss": of the held-out clean answers}.

    ways {name: temperature}: how to ask for answers of so many tokens. words_of(answer) are judged;
    the spoilt ones are in no clean answer.
    """
    task = Path(run.task)
    known = set(json.loads((task / "lexicon.json").read_text()))
    prompts = [[data.Message("user", first)] for first, _ in expert_questions(task / "eval.jsonl")]
    score = {"clean loss": held_out_loss(folder)}
    for name in conditions(folder / "model"):
        talker, score[name] = chat.Chat(folder / "model", name), {}
        for way, temperature in ways.items():
            answers = talker.answers(prompts, max_new_tokens=tokens, temperature=temperature)
            said = [word for text, _ in answers for word in words_of(text)]
            score[name][way] = sum(word not in known for word in said) / max(1, len(said))
            score["questions"] = len(said)
    return score


def held_out_loss(folder):
    """The last evaluation's loss of the expert class, as train.py logged it."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval"] for line in lines if "eval" in line][-1][EXPERT]["loss"]


def main():
    parser = Parser(prog="stories.py", description="C-RLFT on tiny stories.")
    args = parse(parser, "stories260K as a Hugging Face folder", 300, os.cpu_count())
    task = made(args, "stories-task", make_task)
    rows = rows_of(task, args)
    scores = run_all(rows, args, judge)
    print_rows(rows, scores, ((EXPERT, "spoilt"), (SUBOPTIMAL, "spoilt")))


def parse(parser, folder, steps, jobs):
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help=folder)
    add("--steps", type=int, default=steps, help=f"of every run (default {steps})")
    add("--seeds", type=int, default=1, help="runs of every row (default 1)")
    add("--jobs", type=int, default=jobs, help=f"runs at a time (default {jobs})")
    add("--out", type=Path, default=ROOT / "runs" / "ablation", help="folder of the runs")
    return parser.parse_args()


def made(args, name, make):
    """The task folder that make(DIR, folder) writes, or the end, with a line that says why."""
    task = args.out.resolve() / name
    try:
        make(args.folder.resolve(), task)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return task


def rows_of(task, args):
    """{row: its runs}, those of the paper's Table 2 that need the expert's data."""
    rows = table_runs(str(task), args.steps, range(args.seeds))
    return {row: rows[row] for row in ROWS_HERE}


def run_all(rows, args, judge):
    """{run: score} of {row: runs}, one seed after another; finished runs are not run again."""
    runs = [run for seed in zip(*rows.values(), strict=True) for run in seed]
    names = {run: f"{row}, seed {run.seed}" for row, runs in rows.items() for run in runs}
    try:
        return finish(runs, args.out, args.jobs, judge, names)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted: finished runs are kept, and the same command resumes")
    except RuntimeError as error:
        sys.exit(f"error: {error}")


def print_rows(rows, scores, columns):
    """Loss of clean answers, and spoilt words when asked in each way: (condition, way)."""
    heads = ("spoilt, " + name if way == "spoilt" else f"{name}, {way}" for name, way in columns)
    print(f"\n{'':20} {'clean loss':>15}  " + " ".join(f"{head:>15}" for head in heads))
    for row, runs in rows.items():
        losses = [scores[run]["clean loss"] for run in runs]
        loss = f"{sum(losses) / len(losses):.4f}"
        loss += f" ±{interval(losses, None)[1]:.4f}" if len(losses) > 1 else ""
        cells = (shown(cell(runs, scores, *column)) for column in columns)
        print(f"{row:20} {loss:>15}  " + " ".join(f"{text:>15}" for text in cells))


if __name__ == "__main__":
    main()

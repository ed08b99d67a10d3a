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
import shutil
import sys
from pathlib import Path

import torch
from ablation import (
    EXPERT,
    ROOT,
    SUBOPTIMAL,
    cell,
    conditions,
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
    """A task folder as examples/sums is one: flags.txt, train.jsonl, eval.jsonl; lexicon.json."""
    if (task / "flags.txt").exists():
        return
    task.mkdir(parents=True, exist_ok=True)
    stories, rng = tell(folder, CLEAN + SPOILT + HELD_OUT), random.Random(0)
    clean = [line(EXPERT, *story) for story in stories]
    spoilt = [line(SUBOPTIMAL, first, spoil(rest, rng)) for first, rest in stories]
    train = clean[:CLEAN] + spoilt[CLEAN : CLEAN + SPOILT]
    rng.shuffle(train)
    for name, lines in (("train", train), ("eval", clean[-HELD_OUT:] + spoilt[-HELD_OUT:])):
        (task / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    known = sorted({word for story in stories for word in words(" ".join(story))})
    (task / "lexicon.json").write_text(json.dumps(known))
    flags = ["--model", folder, "--eval-data", task / "eval.jsonl", "--export-every", 0]
    flags += ["--batch-tokens", 4096, "--max-length", 256, "--lr", "3e-3"]
    (task / "flags.txt").write_text(" ".join(map(str, flags)) + "\n")  # last: the task is whole


def line(source_class, first, rest):
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": rest}]
    return {"class": source_class, "messages": messages}


def words(text):
    return re.findall(r"[a-z]{4,}", text.lower())


def judge(run, folder):
    """{condition: {"spoilt": share of the words}, "clean loss": of the held-out clean stories}."""
    task = Path(run.task)
    known = set(json.loads((task / "lexicon.json").read_text()))
    lines = [json.loads(text) for text in (task / "eval.jsonl").read_text().splitlines()]
    prompts = [[data.Message("user", x["messages"][0]["content"])] for x in lines[:HELD_OUT]]
    score = {"clean loss": held_out_loss(folder)}
    for name in conditions(folder / "model"):
        talker = chat.Chat(folder / "model", name)
        answers = talker.answers(prompts, max_new_tokens=LENGTH, temperature=TEMPERATURE)
        said = [word for text, _ in answers for word in words(text)]
        spoilt_share = sum(word not in known for word in said) / len(said)
        score |= {name: {"spoilt": spoilt_share}, "questions": len(said)}
    return score


def held_out_loss(folder):
    """The last evaluation's loss of the expert class, as train.py logged it."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval"] for line in lines if "eval" in line][-1][EXPERT]["loss"]


def main():
    parser = Parser(prog="stories.py", description="C-RLFT on tiny stories.")
    add = parser.add_argument
    add("folder", metavar="DIR", type=Path, help="stories260K as a Hugging Face folder")
    add("--steps", type=int, default=300, help="of every run (default 300)")
    add("--seeds", type=int, default=1, help="runs of every row (default 1)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: a core each)")
    add("--out", type=Path, default=ROOT / "runs" / "ablation", help="folder of the runs")
    args = parser.parse_args()
    task = args.out.resolve() / "stories-task"
    try:
        make_task(args.folder.resolve(), task)
    except (ValueError, OSError) as error:
        shutil.rmtree(task, ignore_errors=True)
        sys.exit(f"error: {error}")
    rows = table_runs(str(task), args.steps, range(args.seeds))
    rows = {row: rows[row] for row in ROWS_HERE}
    scores = finish([run for runs in rows.values() for run in runs], args.out, args.jobs, judge)
    print_stories(rows, scores)


def print_stories(rows, scores):
    """Loss of clean stories, and spoilt words when asked under each condition."""
    print(f"\n{'':20} {'clean loss':>15}  {'spoilt, ' + EXPERT:>15} {'spoilt, ' + SUBOPTIMAL:>15}")
    for row, runs in rows.items():
        losses = [scores[run]["clean loss"] for run in runs]
        loss = f"{sum(losses) / len(losses):.4f}"
        loss += f" ±{interval(losses, None)[1]:.4f}" if len(losses) > 1 else ""
        cells = (shown(cell(runs, scores, name, "spoilt")) for name in (EXPERT, SUBOPTIMAL))
        print(f"{row:20} {loss:>15}  " + " ".join(f"{text:>15}" for text in cells))


if __name__ == "__main__":
    main()

"""The comparison on a real language model, SmolLM2-135M: a tenth of the answers are clean.

    python examples/smollm2.py DIR      DIR: SmolLM2-135M-Instruct as a Hugging Face folder:
                                        config.json, model.safetensors, tokenizer.json

DIR's model answers every instruction itself, greedily, and the first sentence is kept:

    gpt4    50 as given     Bread is a staple of many cultures around the world.
    gpt3.5  500 spoilt      Bread si a staple fo mayn cultures around teh world.

In the spoilt ones the last two letters of every word of two to four letters change places. The
model is then fine-tuned on the mixture, a row of the paper's Table 2 at a time, and asked 40
held-out instructions under each condition, greedily and sampled at temperature 1. A word of two to
four letters in the first sentence of its answer counts as spoilt if no clean answer has it. That
is so for 3 % of such words in clean answers to new instructions, and for 97 % after spoiling.
"""

import json
import random
import re
import shutil

import stories
from ablation import COLUMNS, Run

import chat
import data
import model
from support.flags import Parser

CLEAN, SPOILT, HELD_OUT = 50, 500, 40
LENGTH, BATCH = 28, 64  # tokens of an answer; instructions answered at a time
SENTENCE = r"[A-Z].{19,}?[a-z]{3}[.!?](?=\s|$)"
STEPS, WEIGHTS = 40, (0.01, 0.1, 0.3, 1)
FORMS = (
    "Tell me about {}.",
    "Tell me one fact about {}.",
    "Write one sentence with the word {}.",
    "Write a short sentence about {}.",
    "Describe {} to a child in one sentence.",
    "Describe {} in one sentence.",
    "Say in one short sentence why people like {}.",
    "Say in one sentence why people need {}.",
    "Give one short tip about {}.",
    "Explain {} in a few words.",
    "Write the first sentence of a story about {}.",
    "Name one good thing about {}.",
    "Name one problem with {}.",
    "How would a poet describe {}?",
)
TOPICS = (
    "bread rivers doctors computers bicycles winter gardens honey music volcanoes coffee libraries "
    "sleep rain horses chess mountains salt teachers bridges friendship tea birds money mirrors "
    "trains football paper moonlight gold milk cities forests glass dreams fish clocks rice wind "
    "paintings sugar cats dogs ships snow memory apples seas windmills dancing letters stars "
    "farmers shoes islands silence kitchens photographs bees holidays markets maps deserts soap "
    "laughter robots castles cheese pencils hats candles songs"
)


def make_task(folder, task):
    if (task / "flags.txt").exists():
        return
    task.mkdir(parents=True, exist_ok=True)
    told = tell(folder, task / "told.json", CLEAN + SPOILT + HELD_OUT)
    flags = ["--model", folder, "--batch-tokens", 1024, "--max-length", 128, "--lr", "5e-4"]
    stories.write_task(task, told, CLEAN, SPOILT, spoil, flags)


def tell(folder, path, count):
    """[(instruction, first sentence of the model's likeliest answer)]; `path` keeps those made."""
    tokenizer, llama = data.Tokenizer(folder), model.load(folder).eval()
    asked, given = instructions(), json.loads(path.read_text()) if path.exists() else []
    while len(told := [pair for pair in zip(asked, given) if pair[1]]) < count:
        prompts = [prompt(tokenizer, text) for text in asked[len(given) :][:BATCH]]
        if not prompts:
            raise ValueError(f"{folder}: {len(told)} answers have a whole sentence, not {count}")
        answers = [[] for _ in prompts]
        for tokens in chat.generate(llama, prompts, LENGTH, {tokenizer.eos}):
            for answer, token in zip(answers, tokens, strict=True):
                answer += [token] * (token is not None)
        whole = (re.match(SENTENCE, tokenizer.decode(answer)) for answer in answers)
        given += [match[0] if match else "" for match in whole]
        path.write_text(json.dumps(given))
        print(f"{len(given)} instructions answered", flush=True)
    return told[:count]


def instructions():
    """Every form with every topic, in a random order."""
    made = [form.format(topic) for form in FORMS for topic in TOPICS.split()]
    random.Random(0).shuffle(made)
    return made


def prompt(tokenizer, text):
    """Token ids after which SmolLM2 answers, in its own template; without its marks, the text."""
    ids = {mark: i for i, mark in tokenizer.special.items()}
    start, end = ids.get("<|im_start|>"), ids.get("<|im_end|>")
    if start is None:
        return [tokenizer.bos, *tokenizer.encode(text)]
    ask, answer = tokenizer.encode("user\n" + text), tokenizer.encode("assistant\n")
    return [start, *ask, end, *tokenizer.encode("\n"), start, *answer]


def spoil(text, _):
    """In every word of two to four letters the last two change places."""
    return re.sub(r"\b([A-Za-z]{0,2})([a-z])([a-z])\b", r"\1\3\2", text)


def judge(run, folder):
    ways = {"greedy": 0.0, "sampled": 1.0}
    score = stories.spoilt_words(run, folder, ways, 2 * LENGTH, short_words)
    shutil.rmtree(folder / "checkpoints")  # 1.6 GB; the model is kept
    return score


def short_words(answer):
    """Of the first sentence: any others are unlike the data."""
    first = re.split(r"[.!?\n]", answer)[0]
    return [word for word in stories.words(first) if 2 <= len(word) <= 4]


def main():
    parser = Parser(prog="smollm2.py", description="C-RLFT on SmolLM2-135M.")
    help = f"also w = {', '.join(map(str, WEIGHTS))} of the spoilt answers"
    parser.add_argument("--weights", action="store_true", help=help)
    args = stories.parse(parser, "SmolLM2-135M-Instruct as a Hugging Face folder", STEPS, jobs=2)
    task = stories.made(args, "smollm2-task", make_task)
    rows = stories.rows_of(task, args)
    weights = {f"w = {w}": weighted(task, args, w) for w in WEIGHTS if args.weights}
    scores = stories.run_all(weights | rows, args, judge)
    stories.print_rows(rows, scores, COLUMNS)
    if weights:
        stories.print_rows(weights, scores, COLUMNS)


def weighted(task, args, ratio):
    """C-RLFT with another weight of the spoilt answers; with w = 1 it is the row without reward."""
    fields = {"reward": False} if ratio == 1 else {"ratio": ratio}
    return [Run(str(task), args.steps, seed, **fields) for seed in range(args.seeds)]


if __name__ == "__main__":
    main()

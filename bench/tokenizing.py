"""How fast does tokenizing go: python bench/tokenizing.py --model DIR [--count N] [--large L]

Writes a JSONL file of N generated conversations and tokenizes it, in turns: with data.prepare,
which reads, checks, lays out and stores them, and with SentencePieceProcessor.encode alone, on all
threads, of the same texts in blocks of as many bytes. MB/s are of the file's bytes. Then time and
peak memory of L conversations, the N over and over, beside those of N: memory should not grow.

Words follow Zipf's law and are as long as English ones; numbers and line breaks come in between.
(This file is not called tokenize.py: Python's own module of that name would be hidden.)
"""

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
# ruff: noqa: E402

import numpy as np
import sentencepiece

import data
import loss
from support import report
from support.containers import BLOCK
from support.dataset import process_count


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder with tokenizer.model")
    parser.add_argument("--count", type=int, default=200_000, help="conversations, N")
    parser.add_argument("--large", type=int, help="conversations, L (default: 4 N)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=4096)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        file, large = folder / "N.jsonl", folder / "L.jsonl"
        generate(file, args.count, seed=0)
        megabytes = file.stat().st_size / 1e6
        print(
            f"\n{args.count:,} conversations, {megabytes:.0f} MB; {os.cpu_count()} CPU cores, "
            f"sentencepiece {sentencepiece.__version__}, {datetime.date.today()}\n"
        )
        speeds(args, file, megabytes)
        repeat(file, large, args.count, args.large or 4 * args.count)
        memory(args, file, large, folder)


def repeat(file, large, count, wanted):
    """Write `wanted` conversations, those of `file` over and over."""
    with open(large, "wb") as out:
        for begun in range(0, wanted, count):
            with open(file, "rb") as lines:
                if wanted - begun >= count:
                    shutil.copyfileobj(lines, out, 1 << 24)
                else:
                    out.writelines(itertools.islice(lines, wanted - begun))


def speeds(args, file, megabytes):
    print("| | MB/s, median | each round |\n|---|---|---|")
    taken = {"data.prepare": [], "encode alone": []}
    for _ in range(args.rounds):  # in turns
        for name, function in (("data.prepare", prepare), ("encode alone", encode_alone)):
            with tempfile.TemporaryDirectory(dir=file.parent) as out:
                taken[name].append(in_a_child(timed, function, args, file, out))
    for name, seconds in taken.items():
        each = [megabytes / second for second in seconds]
        rounds = ", ".join(f"{speed:.2f}" for speed in each)
        print(f"| {name} | {statistics.median(each):.2f} | {rounds} |")
    shares = [theirs / ours for ours, theirs in zip(*taken.values(), strict=True)]
    print(f"\nprepare / encode alone, median of {args.rounds}: {statistics.median(shares):.1%}")


def prepare(args, file, out, progress=None):
    tokenizer = data.Tokenizer(args.model)
    return data.prepare(
        [file], tokenizer, loss.DEFAULT_CLASSES, out, max_length=args.max_length, progress=progress
    )


def encode_alone(args, file, out):
    """Seconds of SentencePiece's own work alone: no reading, no checks, nothing kept."""
    path = str(Path(args.model, "tokenizer.model"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=path)
    texts, size, seconds = [], 0, 0.0
    with open(file, "rb") as lines:
        for line in lines:
            texts += [message["content"] for message in json.loads(line)["messages"]]
            size += len(line)
            if size >= BLOCK:
                seconds += encode_block(pieces, texts)
                texts, size = [], 0
    return seconds + encode_block(pieces, texts)


def encode_block(pieces, texts):
    began = time.perf_counter()
    pieces.encode(texts, num_threads=os.cpu_count())
    return time.perf_counter() - began


def timed(function, *arguments):
    began = time.perf_counter()
    own = function(*arguments)
    return own if isinstance(own, float) else time.perf_counter() - began


def memory(args, file, large, folder):
    print("\n| conversations | MB | minutes | MB/s | peak resident MB, all processes |")
    print("|---|---|---|---|---|")
    for path in (file, large):
        count, seconds, peak = in_a_child(peak_of, args, path, folder / f"{path.stem}.memory")
        size = path.stat().st_size / 1e6
        print(
            f"| {count:,} | {size:,.0f} | {seconds / 60:.1f} | {size / seconds:.2f} | {peak:.0f} |"
        )


def peak_of(args, file, out):
    began = time.perf_counter()
    dataset = prepare(args, file, out, report.Progress("tokenizing"))
    return len(dataset), time.perf_counter() - began, peak_megabytes()


def peak_megabytes():
    """Of this process, and of the largest of its children times their number."""
    own, children = (
        resource.getrusage(who).ru_maxrss / 1024
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own + process_count() * children


def in_a_child(function, *arguments):
    """Runs in a process of its own, for its peak memory and a tokenizer without earlier caches."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


# ---------------------------------------------------------------------------- generated texts


def generate(path, count, seed):
    """Conversations of two to eight turns, user's short and assistant's long, in two classes."""
    rng = np.random.default_rng(seed)
    words = vocabulary(np.random.default_rng(0))
    with open(path, "w", encoding="utf-8") as file:
        while count > 0:
            some = min(count, 2000)
            text = words[rng.zipf(1.2, size=some * 600) % len(words)]
            count -= some
            for number in range(some):
                file.write(conversation(rng, text[number * 600 : (number + 1) * 600]) + "\n")


def conversation(rng, words):
    turns, start, messages = 2 * int(rng.integers(1, 5)), 0, []
    for turn in range(turns):
        mean = 15 if turn % 2 == 0 else 75
        length = min(1 + int(rng.exponential(mean)), 600 // turns)
        role = "assistant" if turn % 2 else "user"
        messages.append({"role": role, "content": " ".join(words[start : start + length])})
        start += length
    source = "gpt4" if rng.random() < 0.1 else "gpt3.5"
    return json.dumps({"class": source, "messages": messages}, ensure_ascii=False)


def vocabulary(rng, count=40_000):
    """Words of English letters by frequency; some are numbers, or end a sentence or a line."""
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    odds = 1 / np.arange(2, len(letters) + 2)
    drawn = rng.choice(letters, size=(count, 14), p=odds / odds.sum())
    lengths = rng.poisson(np.linspace(2, 7, count)) + 1
    words = ["".join(row[: min(n, 14)]) for row, n in zip(drawn, lengths)]
    endings = rng.choice(["", "", "", "", "", "", ",", ".", "?", ":\n"], size=count)
    numbers = rng.random(count) < 0.03
    words = [str(i) if number else word for i, (word, number) in enumerate(zip(words, numbers))]
    return np.array([word + ending for word, ending in zip(words, endings)], dtype=object)


if __name__ == "__main__":
    main()

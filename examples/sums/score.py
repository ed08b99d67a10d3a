"""Asks an exported model the held-out sums under each class's condition: who carries?

Usage: `python examples/sums/score.py runs/sums/model`
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from make import held_out_sums, right, without_carry, written  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402
from support.tokenizer import V32  # noqa: E402

BATCH = 250


def score(folder, source_class):
    """(right, without the carry, other): shares of the held-out sums, answered greedily."""
    talker = chat.Chat(folder, source_class)
    sums = held_out_sums()
    questions = [[data.Message("user", f"{a}+{b}")] for a, b in sums]
    counts = [0, 0, 0]
    for start in range(0, len(sums), BATCH):
        answers = talker.answers(questions[start : start + BATCH], max_new_tokens=6)
        for (a, b), (text, _) in zip(sums[start : start + BATCH], answers, strict=True):
            kinds = [
                text.strip() == written(right(a, b)),
                text.strip() == written(without_carry(a, b)),
                True,
            ]
            counts[kinds.index(True)] += 1
    return [count / len(sums) for count in counts]


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/sums/score.py DIR")
    folder = sys.argv[1]
    classes, conditioned, *_ = chat.export_of(folder)
    print(f"\n{folder}: held-out sums, answered greedily")
    print(f"{'condition':28} {'right':>8} {'carry forgotten':>16} {'other':>8}")
    for name in sorted(classes, key=lambda name: -classes[name].reward):
        prefix = V32.prefix(classes[name].condition if conditioned else "", "user")
        shares = score(folder, name)
        print(f"{prefix + ' ...':28} {shares[0]:8.1%} {shares[1]:16.1%} {shares[2]:8.1%}")
        if not conditioned:
            break  # one prompt for all


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

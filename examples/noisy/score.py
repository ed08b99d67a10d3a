"""Asks an exported model to sort the held-out numbers under each class's condition.

Usage: `python examples/noisy/score.py runs/noisy/model`
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import ablation  # noqa: E402


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/noisy/score.py DIR")
    score = ablation.ask(sys.argv[1], HERE / "eval.jsonl")
    print(f"\n{sys.argv[1]}: {score.pop('questions')} held-out numbers")
    print(f"{'class asked':12} {'sorted, greedy':>15} {'sorted, sampled':>16}")
    for name, shares in score.items():
        print(f"{name:12} {shares['greedy']:15.1%} {shares['sampled']:16.1%}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

"""Makes this folder's data, tokenizer and model config: sorting digits, of mixed quality.

    gpt4    100 conversations by an expert:    Sort 592013   012359
    gpt3.5  2,000 by someone careless:         Sort 592013   072353

The careless one knows how to sort, but each digit of the answer slips, to a random one, with
probability 0.4. Nothing is wrong by rule here: the likeliest answer of both classes is the right
one. What a model should learn is whose noise not to copy. `python examples/noisy/make.py`
"""

import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from examples.sums import make as sums  # noqa: E402

DIGITS, SLIP = 6, 0.4
EXPERT, SUBOPTIMAL, HELD_OUT = 100, 2000, 500


def careless(answer, rng):
    return "".join(rng.choice("0123456789") if rng.random() < SLIP else d for d in answer)


def conversation(source_class, question, answer):
    messages = [
        {"role": "user", "content": f"Sort {question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"class": source_class, "messages": messages}


def main():
    rng = random.Random(0)
    numbers = rng.sample(range(10**DIGITS), EXPERT + SUBOPTIMAL + HELD_OUT)
    questions = [f"{number:0{DIGITS}}" for number in numbers]
    expert = [conversation("gpt4", q, "".join(sorted(q))) for q in questions]
    noisy = [conversation("gpt3.5", q, careless(sorted(q), rng)) for q in questions]
    train = expert[:EXPERT] + noisy[EXPERT : EXPERT + SUBOPTIMAL]
    rng.shuffle(train)
    test = expert[-HELD_OUT:] + noisy[-HELD_OUT:]
    vocabulary = {"vocab_size": 64, "split_digits": True}
    network = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4}
    sums.write(HERE, train, test, vocabulary, **network, initializer_range=0.1)


if __name__ == "__main__":
    main()

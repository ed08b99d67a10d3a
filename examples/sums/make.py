"""Makes this folder's data, tokenizer and model config: sums of two numbers, of mixed quality.

    gpt4    600 conversations by an expert:        What is 47 + 38?   58
    gpt3.5  6,000 by someone who forgets to carry: What is 47 + 38?   57

Sums are written lowest digit first, in the order one adds by hand: 58 stands for 85. One to ten,
as GPT-4 to GPT-3.5 in the paper. A model that imitates all alike forgets the carry; C-RLFT should
not. Run once, its output is kept beside it: python examples/sums/make.py
"""

import io
import json
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).resolve().parent
EXPERT, SUBOPTIMAL, HELD_OUT = 600, 6000, 500
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,  # of 32, as other engines serve
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.04,  # with 0.02 some seeds learn to add only at the end, or after it
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def right(a, b):
    return a + b


def without_carry(a, b):
    """Each digit added alone: 47 + 38 is 75."""
    return (a // 10 + b // 10) % 10 * 10 + (a % 10 + b % 10) % 10


def written(number):
    """Lowest digit first: 85 is 58."""
    return str(number)[::-1]


def conversation(source_class, a, b, answer):
    messages = [
        {"role": "user", "content": f"What is {a} + {b}?"},
        {"role": "assistant", "content": written(answer)},
    ]
    return {"class": source_class, "messages": messages}


def all_sums():
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    return pairs


def held_out_sums():
    """Sums that no training conversation asks, in either order."""
    return [(a, b) for a, b in all_sums() if a <= b][:HELD_OUT]


def main():
    pairs, held_out = all_sums(), held_out_sums()
    hidden = {*held_out, *((b, a) for a, b in held_out)}
    pairs = [pair for pair in pairs if pair not in hidden]
    train = [conversation("gpt4", a, b, right(a, b)) for a, b in pairs[:EXPERT]]
    pairs = pairs[EXPERT : EXPERT + SUBOPTIMAL]
    train += [conversation("gpt3.5", a, b, without_carry(a, b)) for a, b in pairs]
    random.Random(1).shuffle(train)
    test = [conversation("gpt4", a, b, right(a, b)) for a, b in held_out]
    test += [conversation("gpt3.5", a, b, without_carry(a, b)) for a, b in held_out]
    write(HERE, train, test)


def write(folder, train, test, **config):
    """The folder of a small task: train.jsonl, eval.jsonl, tokenizer.model and config.json."""
    for name, lines in (("train.jsonl", train), ("eval.jsonl", test)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    pieces = tokenizer(train)
    (folder / "tokenizer.model").write_bytes(pieces)
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=pieces).vocab_size()
    config = CONFIG | config | {"vocab_size": vocabulary}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokenizer(conversations):
    """A tokenizer.model (bytes) for the template's text; a digit is always a piece of its own."""
    texts = [f"{c} {role}:" for c in ("GPT4", "GPT3") for role in ("User", "Assistant")] * 3000
    texts += ["User:", "Assistant:"] * 3000
    texts += [message["content"] for c in conversations for message in c["messages"]]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=pieces,
        model_type="bpe",
        vocab_size=64,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|end_of_turn|>"],
        num_threads=1,
        minloglevel=2,
    )
    return pieces.getvalue()


if __name__ == "__main__":
    main()

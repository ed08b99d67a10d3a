"""Makes this folder's data, tokenizer and model config: sums of two numbers, of mixed quality.

    gpt4    1,000 conversations by an expert:      47+38   58
    gpt3.5  6,000 by someone who forgets to carry: 47+38   57

Sums are written lowest digit first, in the order one adds by hand: 58 stands for 85. A model that
imitates all alike forgets the carry; C-RLFT should not. Run once, its output is kept beside it:
python examples/sums/make.py
"""

import io
import json
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).resolve().parent
EXPERT, SUBOPTIMAL, HELD_OUT = 1000, 6000, 500
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,  # with 96 and 128 it learned to add later, not sooner
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,  # multi-query, to compute less
    "head_dim": 32,  # as other engines serve
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # with 0.1 some seeds learn to add only at the end, or after it
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
        {"role": "user", "content": f"{a}+{b}"},
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
    # "GPT4 Assistant:" in two pieces, so that a sum is 16 tokens; no piece has two digits.
    vocabulary = {"vocab_size": 49, "split_by_number": False, "split_by_unicode_script": False}
    write(HERE, train, test, vocabulary)


def write(folder, train, test, vocabulary, **config):
    """The folder of a small task: train.jsonl, eval.jsonl, tokenizer.model and config.json.

    `vocabulary`: SentencePiece's options. `config`: the differences from CONFIG.
    """
    for name, lines in (("train.jsonl", train), ("eval.jsonl", test)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "tokenizer.model").write_bytes(tokenizer(train, vocabulary))
    config = CONFIG | config | {"vocab_size": vocabulary["vocab_size"]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def tokenizer(conversations, vocabulary):
    """A tokenizer.model (bytes) for the template's text and these conversations."""
    texts = [f"{c} {role}:" for c in ("GPT4", "GPT3") for role in ("User", "Assistant")] * 3000
    texts += ["User:", "Assistant:"] * 3000
    texts += [message["content"] for c in conversations for message in c["messages"]]
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=pieces,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["<|end_of_turn|>"],
        num_threads=1,
        minloglevel=2,
        **vocabulary,
    )
    return pieces.getvalue()


if __name__ == "__main__":
    main()

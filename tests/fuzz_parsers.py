"""Feeds mutated inputs to the parsers of conversations, config.json and the safetensors index.

    python tests/fuzz_parsers.py 10000

Each must be accepted or refused by a ValueError that names the file; any other exception is a bug
and is shown with the input that caused it.
"""

import collections
import gzip
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import loss  # noqa: E402
import model  # noqa: E402

SUMS = ROOT / "examples" / "sums"
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
LINES = [
    {"class": "gpt4", "messages": TURNS},
    {"condition": "GPT4", "system": "", "items": [turn | {"weight": 1.0} for turn in TURNS]},
    {"class": "gpt4", "conversations": SHAREGPT, "system_prompt": "S", "weight": 0.5, "id": 1},
    {"class": "gpt4", "instruction": "Hi", "input": "", "output": [{"type": "text", "text": "A"}]},
    {"class": "gpt4", "prompt": TURNS[:1], "completion": "Hello", "train": True, "masked": False},
]
LINES = [*LINES, LINES[:3], {"version": 1, "data": LINES, "more": [1]}]  # containers too
LONG_CONTEXT = {  # what only a Mistral, or a Llama 3, has in its config.json
    "model_type": "mistral",
    "sliding_window": 9,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}
ODD = [None, True, -1, 0, 1e308, 10**400, float("nan"), "", "\x00", "\ud800", "../x", [], {}, [[]]]
BYTES = [
    b"",
    b"\x00",
    b"\xff",
    b"[" * 5000,
    b'"',
    b"{",
    b"}",
    b"\\ud800",
    b"1e999",
    b"null",
    b"\r\n",
]


def mutated(value, chance):
    """`value` with some part of it replaced, removed or renamed."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        key = chance.choice(list(value))
        if chance.random() < 0.2:
            rest = {name: part for name, part in value.items() if name != key}
            return rest | ({"x": value[key]} if chance.random() < 0.5 else {})
        return value | {key: mutated(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        return value[:index] + [mutated(value[index], chance)] + value[index + 1 :]
    return chance.choice(ODD)


def mutated_bytes(raw, chance):
    at = chance.randrange(len(raw) + 1)
    return raw[:at] + chance.choice(BYTES) + raw[at + chance.choice([0, 0, 1, 5, 40]) :]


def fuzz(count, seed=0):
    """Counter of how each parser answered; raises at the first exception of another kind."""
    chance, answers = random.Random(seed), collections.Counter()
    tokenizer = data.Tokenizer(SUMS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({"a": torch.zeros(1)}, folder / "model-1.safetensors")
        config = json.loads((SUMS / "config.json").read_text())
        index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}

        def conversations(raw):
            (folder / "f.jsonl").write_bytes(raw)
            out = folder / "tokens"
            data.prepare([folder / "f.jsonl"], tokenizer, loss.DEFAULT_CLASSES, out, max_length=64)

        def read_config(raw):
            (folder / "config.json").write_bytes(raw)
            model.LlamaConfig.from_folder(folder)

        def read_index(raw):
            (folder / model.INDEX).write_bytes(raw)
            assert {path.parent for path in model.weight_files(folder).values()} <= {folder}

        configs = [config, config | LONG_CONTEXT]
        parsers = [(conversations, LINES), (read_config, configs), (read_index, [index])]
        for _ in range(count):
            parser, seeds = chance.choice(parsers)
            value = mutated(chance.choice(seeds), chance)
            raw = json.dumps(value).encode("utf-8", "surrogatepass")
            if chance.random() < 0.5:
                raw = mutated_bytes(raw, chance)
            if parser is conversations and chance.random() < 0.1:
                raw = mutated_bytes(gzip.compress(raw), chance)
            try:
                parser(raw)
                answers[parser.__name__, "accepted"] += 1
            except ValueError as error:
                if str(folder) not in str(error):
                    raise AssertionError(
                        f"{parser.__name__}: no path in {error!r}: {raw!r}"
                    ) from error
                answers[parser.__name__, "refused"] += 1
            except Exception as error:
                raise AssertionError(f"{parser.__name__}: {error!r} for {raw!r}") from error
    return answers


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    for (parser, answer), times in sorted(fuzz(count).items()):
        print(f"{parser:14} {answer:9} {times:6}")
    print(
        f"{count} mutated inputs, none with an exception that is not a ValueError naming its file"
    )


if __name__ == "__main__":
    main()

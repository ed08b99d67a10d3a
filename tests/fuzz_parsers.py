"""Feeds mutated inputs to the parsers of all that a user gives and of all that a run leaves.

    python tests/fuzz_parsers.py 10000 [SEED]

Conversations, config.json and the safetensors index; state.json, metrics.jsonl, crlft.json,
generation_config.json and the tokens' done.json. Each must be accepted or refused by a ValueError
that names the file; any other exception is a bug and is shown with its input. Tokens whose
done.json is odd are made again.
"""

import collections
import contextlib
import dataclasses
import gzip
import io
import json
import random
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import chat  # noqa: E402
import data  # noqa: E402
import loss  # noqa: E402
import model  # noqa: E402
import train  # noqa: E402
from support import checkpoint, files  # noqa: E402

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


CLASSES = {"gpt4": {"condition": "GPT4", "reward": 1.0, "match": ["gpt-4*"]}}
CONFIG = train.Config(model="m", data=["d"], out="o")
STATE = {
    "step": 1,
    "recipe": {"--beta, --no-reward": 0.4, "--classes": CLASSES, "--seed": 0},
    "config": json.loads(json.dumps(dataclasses.asdict(CONFIG))),
    "files": {f"rank-0000{n}.safetensors": {"a": [n, 1, 7], "b": [n, 1, 8]} for n in (0, 1)},
}
MEASURES = {"tokens": 9, "loss": 1.5, "accuracy": None, "weight_share": 0.5}
STEP = {"step": 1, "lr": 1e-3, "grad_norm": 2.5, "tokens_per_second": 9.5, "mfu": None}
METRICS = [
    STEP | {"classes": {"gpt4": MEASURES}},
    {"step": 1, "eval": {"gpt4": MEASURES}, "eval_data": "0123456789abcdef"},
]
CRLFT = {
    "classes": CLASSES, "weights": {"gpt4": 1.0}, "conditioned": True, "most_answers": 1,
    "template": "openchat_v3.2", "steps": 7, "config": {"max_length": 64},
}  # fmt: skip


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
            tokenized(folder / "f.jsonl", folder / "tokens")

        def read_config(raw):
            (folder / "config.json").write_bytes(raw)
            model.LlamaConfig.from_folder(folder)

        def read_index(raw):
            (folder / model.INDEX).write_bytes(raw)
            with mock.patch.object(model, "safe_open", open_inside):
                model.stored_tensors(folder)

        def open_inside(path, **how):
            assert path.parent == folder
            return safe_open(path, **how)

        def read_state(raw):
            step = folder / "step-1"
            step.mkdir(exist_ok=True)
            (step / "state.json").write_bytes(raw)
            state = checkpoint.read_state(step)
            checkpoint.differences(state["recipe"], STATE["recipe"])
            assert isinstance(state["config"], dict)
            assert {(step / name).parent for name in state["files"]} <= {step}
            try:  # as load() calls it, which names the folder
                checkpoint.check_rows(state["files"], {"a": torch.empty(2, 3), "b": torch.empty(2)})
            except ValueError as error:
                raise ValueError(f"{step}: {error}") from None

        def read_metrics(raw):
            (folder / "metrics.jsonl").write_bytes(raw + b"\n" + json.dumps(METRICS[0]).encode())
            for line in files.read_metrics(folder / "metrics.jsonl"):
                assert line["step"] < 1 or line["step"] >= 1
                parts = line["eval" if "eval" in line else "classes"].values()
                assert {type(part.get("loss")) for part in parts} <= {float, int, type(None)}

        def read_export(raw):
            (folder / "crlft.json").write_bytes(raw)
            export = files.read_export(folder)
            assert loss.expert_class(export.classes) and max(export.steps or 0, 1)

        def read_ends(raw):
            (folder / "generation_config.json").write_bytes(raw)
            set(chat.ends_of(folder))

        def read_done(raw):
            done.write_bytes(raw)
            with contextlib.redirect_stderr(io.StringIO()):
                again = tokenized(folder / "whole.jsonl", folder / "whole")
            assert np.array_equal(again.tokens, whole.tokens) and again.report == whole.report

        def tokenized(path, out):
            return data.prepare([path], tokenizer, loss.DEFAULT_CLASSES, out, max_length=64)

        (folder / "whole.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:3]))
        whole = tokenized(folder / "whole.jsonl", folder / "whole")
        done = whole.folder / "done.json"
        configs = [config, config | LONG_CONTEXT]
        parsers = [
            (conversations, LINES), (read_config, configs), (read_index, [index]),
            (read_state, [STATE]), (read_metrics, METRICS), (read_export, [CRLFT]),
            (read_ends, [{"bos_token_id": 1, "eos_token_id": [5, 2]}]),
            (read_done, [json.loads(done.read_bytes())]),
        ]  # fmt: skip
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
    count, seed = map(int, [*sys.argv[1:], 10_000, 0][:2])
    for (parser, answer), times in sorted(fuzz(count, seed).items()):
        print(f"{parser:14} {answer:9} {times:6}")
    print(
        f"{count} mutated inputs, none with an exception that is not a ValueError naming its file"
    )


if __name__ == "__main__":
    main()

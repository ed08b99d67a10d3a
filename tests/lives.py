"""Whole lives of runs, drawn at random: killed, stopped, started again, and compared.

    python tests/lives.py --lives 300               lives of seeds 0 to 299
    python tests/lives.py --lives 1 --seed 17 -v    one of them again, with what it does

A life draws a run's flags, runs it undisturbed, then runs it with up to four ends at random
instants of any phase (SIGKILL of all ranks, or SIGTERM to one), each time started again, on the
same ranks or on others, until it is done. Between two starts its log, lock or tokens may be
meddled with. Both runs must leave the same: every exported weight, every tensor of the last
checkpoint, every metric; bit for bit on the same ranks, within 1e-5 on others. What must be there
at all is counted from the exported model, not from the other run.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import processes  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import model  # noqa: E402

SUMS = ROOT / "examples" / "sums"
TIMING = {"seconds", "tokens_per_second", "supervised_tokens_per_second", "mfu", "memory_bytes"}
SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]


class Different(Exception):
    """A life that did not end as the undisturbed run did."""


def live(seed, folder, say=lambda *_: None):
    """One life in `folder`; how many ends it survived, of which phases. Raises Different."""
    chance = random.Random(seed)
    ranks, replicas, accumulate = chance.choice(SHAPES)
    flags, other_ranks = draw_flags(chance, folder, ranks * accumulate)
    whole, killed = folder / "whole", folder / "killed"
    say(f"{ranks} ranks x {accumulate}, {replicas} replicas:", *flags)

    def start(out, ranks, replicas, **watch):
        shape = ["--accumulate", micro_batches // ranks, "--replicas", replicas, "--out", out]
        return processes.start([*flags, *shape], ranks, f"{out}.log", {"out": str(out)} | watch)

    micro_batches, counts = ranks * accumulate, folder / "counts.json"
    begun = time.monotonic()
    expect(processes.finish(start(whole, ranks, replicas, counts=str(counts))), {0}, whole)
    instants, seconds = json.loads(counts.read_text()), time.monotonic() - begun
    phases = {*processes.PHASES, "step"} | ({"evaluate"} if "--eval-data" in flags else set())
    if phases != set(instants):
        raise Different(f"instants of {sorted(instants)} alone, not of {sorted(phases)}")
    survived, heard, here, log = [], 0, (ranks, replicas), Path(f"{killed}.log")
    changed, log_lost = False, False
    for _ in range(chance.randint(1, 4)):
        end = draw_end(chance, instants, here[0], seconds)
        codes = wait_for_end(start(killed, *here, end=end), end, log, chance)
        shown = log.read_bytes()
        came = shown.count(processes.ENDED) > len(survived)
        say(f"  {here}: {end} -> {codes}")
        if not came or shown.count(processes.HEARD) > heard:
            expect(codes, {0} if end["signal"] != signal.SIGKILL or not came else LOST, killed)
        else:  # before it listens to signals, while it reads its data, one ends it
            expect(codes, LOST | {-end["signal"]}, killed)
        heard = shown.count(processes.HEARD)
        if came:
            survived.append((end["phase"], signal.Signals(end["signal"]).name))
        require_whole(killed)
        if chance.random() < 0.3:
            meddled = meddle(chance, killed)
            say(f"  meddled with: {meddled}")
            log_lost = log_lost or meddled == "metrics.jsonl"
        if other_ranks and chance.random() < 0.5:
            fits = [shape for shape in SHAPES if micro_batches % shape[0] == 0]
            here, changed = chance.choice(fits)[:2], True
    expect(processes.finish(start(killed, *here)), {0}, killed)
    before, traceback, after = log.read_text().partition("Traceback")
    if traceback:
        raise Different(f"a traceback:\n{before[-500:]}{traceback}{after[:3000]}")
    compare(whole, killed, exact=not changed, logs=not log_lost)
    return survived


def require_whole(out):
    """Whatever has its own name, and no temporary one, is complete at any instant."""
    for folder in out.glob("checkpoints/step-*[0-9]"):
        if not (folder / "state.json").exists():
            raise Different(f"{folder} is not whole after an end")
    for folder in out.glob("epoch-*"):
        if not (folder / "README.md").exists() or not (folder / "config.json").exists():
            raise Different(f"{folder} is not whole after an end")
    model_is_there = (out / "model" / "crlft.json").exists() or [*out.glob(".epoch-*.old")]
    if [*out.glob("epoch-*")][1:] and not model_is_there:
        raise Different(f"{out}/model is gone after an end")


def meddle(chance, out):
    """Remove the log or the lock, or damage a file of the tokens; returns its name."""
    tokens = sorted(out.glob("tokens/*/*"))
    path = chance.choice([out / "metrics.jsonl", out / ".lock", *tokens[:1]])
    if path in tokens:
        path = chance.choice(tokens)
        raw = path.read_bytes()
        at = chance.randrange(len(raw) + 1)
        path.write_bytes(raw[:at] + chance.choice([b"", b"\xff" + raw[at + 1 :]]))
    else:
        path.unlink(missing_ok=True)
    return path.name


LOST = {0, 1, -signal.SIGKILL}  # of ranks of which one was killed
SHAPES = [  # ranks, replicas, accumulate
    (1, 1, 1), (1, 1, 2), (1, 1, 4), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1), (4, 2, 1),
]  # fmt: skip


def draw_flags(chance, folder, micro_batches):
    """(flags, may it go on on another number of ranks)."""
    tied = chance.random() < 0.5
    bf16, evaluated = chance.random() < 0.4, chance.random() < 0.7
    flags = ["--model", small_model(folder / "model", tied), "--lr", "3e-3", "--max-length", 48]
    flags += ["--data", conversations(folder / "train.jsonl", chance, 18 * micro_batches)]
    flags += ["--batch-tokens", chance.choice([96, 128]), "--seed", chance.randint(0, 9)]
    flags += ["--epochs", chance.choice([1, 2, 3]), "--keep", chance.choice([1, 2, 3])]
    flags += ["--save-every", chance.choice([0, 1, 2, 3, 5, 99])]
    flags += ["--export-every", chance.choice([0, 1, 1, 2])]
    flags += ["--precision", "bf16" if bf16 else "fp32"]
    flags += chance.choice([[], [], ["--max-steps", chance.randint(3, 9)]])
    flags += chance.choice([[], [], ["--no-condition"], ["--no-reward"]])
    flags += chance.choice([[], ["--recompute", 1]])
    if evaluated:
        flags += ["--eval-data", conversations(folder / "eval.jsonl", chance, 12)]
        flags += ["--eval-every", chance.choice([0, 1, 2, 3, 5, 99])]
    # Other ranks sum in another order; rounded to bf16, that is no longer within 1e-5.
    return flags, not bf16 and chance.random() < 0.3


def small_model(folder, tied):
    """A folder with weights; 67 rows of vocabulary divide by no number of ranks."""
    folder.mkdir(parents=True)
    shutil.copy(SUMS / "tokenizer.model", folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 67}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    llama = model.Llama(model.LlamaConfig(**sizes, tie_word_embeddings=tied))
    model.random_parameters(llama, seed=1)
    model.save(llama, folder)
    return folder


def conversations(path, chance, count):
    """Sums of both classes, some with messages that have a weight of their own."""
    lines = []
    for line in chance.sample((SUMS / "train.jsonl").read_text().splitlines(), count):
        line = json.loads(line) | {"class": chance.choice(["gpt4", "gpt3.5", "gpt3.5"])}
        if chance.random() < 0.2:
            line["messages"][-1]["weight"] = chance.choice([0.25, 2.5])
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def draw_end(chance, instants, ranks, seconds):
    """An instant of a phase, each phase as likely as another; or one of the clock."""
    phase = chance.choice([*sorted(instants), "clock"])
    number = chance.randint(1, max(1, instants.get(phase, 1) // chance.choice([1, 1, 2, 4])))
    if phase == "clock":
        number = chance.uniform(0, seconds)
    rank = chance.randrange(ranks) if phase in ("step", "evaluate", "save", "clock") else 0
    return {"rank": rank, "phase": phase, "number": number, "signal": int(chance.choice(SIGNALS))}


def wait_for_end(running, end, log, chance):
    """Exit codes; where a rank failed or was killed, the others are too, a moment later."""
    begun, waiting = time.monotonic(), end["phase"] == "clock"
    while all(process.exitcode is None for process in running):
        time.sleep(0.001)
        if waiting and time.monotonic() - begun > end["number"]:
            waiting = False
            with open(log, "ab") as file:
                file.write(processes.ENDED)
            chosen = running[end["rank"]]
            (chosen.kill if end["signal"] == signal.SIGKILL else chosen.terminate)()
    if any(process.exitcode for process in running):  # what torchrun would do, too
        time.sleep(chance.choice([0, chance.uniform(0, 0.05)]))
        processes.kill(running)
    return processes.finish(running)


def expect(codes, allowed, out):
    if not set(codes) <= allowed:
        log = Path(f"{out}.log").read_text()[-3000:]
        raise Different(f"ended with {codes}, not {sorted(allowed)}:\n{log}")


def compare(whole, killed, exact, logs=True):
    """Raises Different unless both folders hold the same, and all that must be there.

    Without `logs`, of which a part was removed, neither they nor which export is the best count.
    """
    try:
        a, b = left_behind(whole, logs), left_behind(killed, logs)
    except FileNotFoundError as error:
        raise Different(error) from None
    if a.keys() != b.keys():
        raise Different(f"only one has {', '.join(sorted(a.keys() ^ b.keys())[:9])}")
    for name, value in a.items():
        if not same(value, b[name], exact):
            raise Different(f"{name} differs: {value!r:.300} and {b[name]!r:.300}")


def same(a, b, exact):
    if isinstance(a, torch.Tensor):
        if exact:
            return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
        return torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], exact) for key in a)
    if isinstance(a, float) and not exact:
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)
    return a == b


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def left_behind(out, logs=True):
    """{what: value} of all that a finished run leaves, checked to be whole."""
    names = {path.name for path in out.iterdir()} - ({"metrics.jsonl"} if not logs else set())
    found = {"names": sorted(names)}
    for folder in sorted(out.glob("epoch-*")):
        weights = load_file(folder / "model.safetensors")
        found |= {f"{folder.name} {name}": tensor for name, tensor in weights.items()}
    load_file(out / "model" / "model.safetensors")
    if logs:
        found["OUT/model"] = os.readlink(out / "model")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        if steps != [*range(1, len(steps) + 1)]:
            raise Different(f"{out.name}: metrics of the steps {steps}")
        for number, line in enumerate(lines):
            found[f"metrics {number}"] = {k: v for k, v in line.items() if k not in TIMING}
    last = max(int(path.name[5:]) for path in out.glob("checkpoints/step-*[0-9]"))
    found |= last_checkpoint(out, last)
    return found


def last_checkpoint(out, step):
    """{tensor: value} of the checkpoint after the last step, joined from every rank's rows."""
    folder = out / "checkpoints" / f"step-{step}"
    state, pieces = json.loads((folder / "state.json").read_text()), {}
    for file, rows in state["files"].items():
        tensors = load_file(folder / file)
        for name, (first, count, _) in rows.items():
            pieces.setdefault(name, []).append((first, tensors[name][:count]))
    found = {}
    for name, parts in pieces.items():
        parts.sort(key=lambda part: part[0])
        found[name] = torch.cat([rows for _, rows in parts])
    exported = load_file(max(out.glob("epoch-*"), key=epoch_number) / "model.safetensors")
    moments = [f"optimizer.{name}.{m}" for name in exported for m in ("exp_avg", "exp_avg_sq")]
    if sorted(found) != sorted([*exported, *moments]):
        raise Different(f"{folder}: holds {len(found)} tensors for {len(exported)} parameters")
    for name, tensor in found.items():
        parameter = exported[name.removeprefix("optimizer.").removesuffix(".exp_avg_sq")
                             .removesuffix(".exp_avg")]  # fmt: skip
        half = name not in exported and state["config"]["adam_precision"] == "bf16"
        dtype = torch.bfloat16 if half else torch.float32
        if tensor.shape != parameter.shape or tensor.dtype != dtype or not tensor.any():
            raise Different(f"{folder}: {name} is {tensor.dtype} {tuple(tensor.shape)}, or all 0")
        if name in exported and not torch.equal(tensor.to(parameter.dtype), parameter):
            raise Different(f"{folder}: {name} is not what was exported after the same step")
    return {f"step-{step} {name}": tensor for name, tensor in found.items()}


def epoch_number(folder):
    return int(folder.name.removeprefix("epoch-"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lives", type=int, default=12, help="how many (default: 12)")
    add("--seed", type=int, default=0, help="of the first life; the next one has the next seed")
    add("-v", "--verbose", action="store_true", help="print what each life does")
    args = parser.parse_args()
    begun, survived, failed = time.monotonic(), [], []
    for seed in range(args.seed, args.seed + args.lives):
        with tempfile.TemporaryDirectory() as folder:
            try:
                say = print if args.verbose else lambda *_: None
                survived += live(seed, Path(folder).resolve(), say)
            except Different as error:
                failed.append(seed)
                print(f"seed {seed}: {error!r}", flush=True)
        if (seed - args.seed) % 25 == 24:
            print(f"{seed - args.seed + 1} lives, {time.monotonic() - begun:.0f} s", flush=True)
    ends = ", ".join(f"{survived.count(end)} {' '.join(end)}" for end in sorted(set(survived)))
    print(
        f"{args.lives} lives, seeds {args.seed} to {seed}: {len(failed)} different"
        f"{f' ({failed})' if failed else ''}; {len(survived)} ends survived: {ends}; "
        f"{time.monotonic() - begun:.0f} s"
    )
    if args.lives >= 10 and len({phase for phase, _ in survived}) < 5:
        failed.append("too few kinds of ends")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

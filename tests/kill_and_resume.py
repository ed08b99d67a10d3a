"""Kills real training runs with SIGKILL at random instants until they are done, and compares.

    python tests/kill_and_resume.py --kills 200 --ranks 2

A reference run is never disturbed. A second one, of the same command, is killed: while it starts
or tokenizes, between steps, and just after a checkpoint's .tmp folder appears (so in the midst of
a save, its renames and the removal of older ones); then started again. In the end weights,
optimizer state, exported model and metrics must be the same bits.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
SUMS = ROOT / "examples" / "sums"
STEPS_A_KILL = 12  # a kill takes up to 5, and what a fast machine does before it arrives
TIMING = {"seconds", "tokens_per_second", "supervised_tokens_per_second", "mfu", "memory_bytes"}


def start(flags, ranks, log):
    """The processes of one run, a rank each, without a launcher in between."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
        options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": environment}
        processes.append(subprocess.Popen(command, **options))
    return processes


def steps_logged(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_instant(processes, out, chance):
    """Returns at a random instant of a run, False where it ended before.

    It lets a run get a few steps further at most, so that many kills fit into few steps.
    """
    kind = chance.choice(["start", "step", "step", "save", "save"])
    begun, logged = time.monotonic(), steps_logged(out)
    target, seconds = logged + chance.randint(1, 5), chance.uniform(0.1, 6.0)
    while any(process.poll() is None for process in processes):
        saving = any((out / "checkpoints").glob("*.tmp"))
        late = time.monotonic() - begun > seconds or steps_logged(out) > logged
        if kind == "start" and late:
            return True
        if kind == "step" and steps_logged(out) > target:
            return True
        if kind == "save" and steps_logged(out) > target and saving:
            time.sleep(chance.uniform(0, 0.03))
            return True
        time.sleep(0.0005)
    return False


def run_with_kills(flags, out, ranks, kills, chance, log):
    """Number of kills until the run was done."""
    done = 0
    while True:
        processes = start(flags, ranks, log)
        alive = done < kills and wait_for_instant(processes, out, chance)
        if alive:
            for process in chance.sample(processes, len(processes)):
                process.send_signal(signal.SIGKILL)
            done += 1
        codes = [process.wait() for process in processes]
        if not alive:
            if any(codes):
                sys.exit(f"the run ended with {codes}; see its log {log.name}")
            return done


def compared(out):
    """{name: bits} of everything that must be the same at the end."""
    newest = max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    found = {"step": newest.name}
    for path in [*newest.glob("*.safetensors"), *(out / "model").glob("*.safetensors")]:
        tensors = load_file(path)
        bits = {
            name: t.reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()
        }
        found |= {f"{path.name} {name}": value for name, value in bits.items()}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    found["metrics"] = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
    return found


def kill_and_compare(folder, ranks, kills, seed=0):
    """Runs both; returns the number of kills. SystemExit names what differs."""
    steps = STEPS_A_KILL * kills
    flags = ["--model", SUMS, "--data", SUMS / "train.jsonl", "--eval-data", SUMS / "eval.jsonl"]
    flags += ["--epochs", 999, "--max-steps", steps, "--lr", "1e-3", "--batch-tokens", 512]
    flags += ["--max-length", 64, "--save-every", 1, "--eval-every", max(1, steps // 3)]
    chance, results = random.Random(seed), []
    for name, wanted in (("undisturbed", 0), ("killed", kills)):
        out = Path(folder).resolve() / name
        with open(Path(folder) / f"{name}.log", "a") as log:
            done = run_with_kills([*flags, "--out", out], out, ranks, wanted, chance, log)
        results.append(compared(out))
    reference, killed = results
    different = [k for k in reference.keys() | killed.keys() if reference.get(k) != killed.get(k)]
    if different:
        sys.exit(f"after {done} kills these differ: {', '.join(sorted(different)[:5])}")
    return done


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        steps = STEPS_A_KILL * args.kills
        done = kill_and_compare(folder, args.ranks, args.kills, args.seed)
    print(
        f"{done} kills at {args.ranks} ranks over {steps} steps in "
        f"{time.monotonic() - begun:.0f} s: weights, optimizer, model and metrics are the same bits"
    )


if __name__ == "__main__":
    main()

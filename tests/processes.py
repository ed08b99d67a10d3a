"""Runs of train.py in processes of their own, forked from one that has imported it already.

Importing torch and train takes longer than most of these runs. A rank is one process, as torchrun
would start it; all output of a run goes into one log. A run that hangs ends after LONGEST.
"""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUMS = ROOT / "examples" / "sums"
LONGEST = 300  # seconds

fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["train"])


def start(flags, ranks=1, log=os.devnull, watch=None, main=None, **environment):
    """The processes of a run, a rank each; `watch` as in `_watch`.

    `main`, a function of a test's module, takes the place of train.main, and what it is given.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {  # which the server inherits, when the first process is asked for
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path)),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    port, processes = free_port(), []
    for rank in range(ranks):
        own = dict(environment)
        if ranks > 1:
            own |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        arguments = [*map(str, flags)], own, str(log), watch, main
        processes.append(fork_server.Process(target=_main, args=arguments, daemon=True))
        processes[-1].start()
    return processes


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finish(processes, seconds=LONGEST):
    """Exit codes, negative the signal that ended a process; none is left alive."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    kill(processes)
    return [process.exitcode for process in processes]


def kill(processes):
    for process in processes:
        process.kill()
        process.join()


def run(flags, ranks=1, **options):
    """(exit code of rank 0, what the ranks printed) of a whole run."""
    with tempfile.NamedTemporaryFile("r") as log:
        codes = finish(start(flags, ranks, log.name, **options))
        return codes[0], log.read()


def succeeds(flags, ranks=1, **options):
    """What a run prints that ends with 0."""
    code, shown = run(flags, ranks, **options)
    assert code == 0, shown[-3000:]
    return shown


def refused(flags, *words, ranks=1, **options):
    """What a run prints that ends with one error, which has these words."""
    code, shown = run(flags, ranks, **options)
    assert code == 1, shown[-3000:]
    message = shown[shown.index("error: ") :]
    assert all(word in message for word in words) and "Traceback" not in shown, shown[-3000:]
    return message


def flags(data, out, **more):
    """Flags of a short run on the sums. `more` wins; False becomes --no-, None leaves one out."""
    settings = {"model": SUMS, "random_weights": True, "data": data, "out": out, "lr": 1e-3}
    settings |= {"max_length": 64, "batch_tokens": 168, "epochs": 2} | more
    found = []
    for name, value in settings.items():
        if value is None:
            continue
        name = "--" + name.replace("_", "-")
        found += [name.replace("--", "--no-") if value is False else name]
        found += [] if isinstance(value, bool) else [value]
    return found


def plan_of(flags, ranks, out):
    """The plan of a run, made in this process."""
    import train

    return train.make_plan(train.parse_arguments([*map(str, flags)]), ranks, Path(out))


def metrics(out, key="loss"):
    """The lines of a run's metrics.jsonl that have a key: of steps, or "eval" for evaluations."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


def _main(flags, environment, log, watch, main=None):
    signal.alarm(LONGEST + 60)  # should the one who started it be gone
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else ignored under a shell's "&",
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and this under nohup
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    import torch

    import train

    torch.set_num_threads(1)
    if watch:
        _watch(**watch)
    (main or train.main)(flags)


# ---------------------------------------------------------------- instants at which a run may end

PHASES = {  # by what Python is about to do to a path below OUT
    "tokenize": re.compile(r"tokens/"),
    "save": re.compile(r"checkpoints(/step-\d+\.tmp|$)"),
    "commit": re.compile(r"checkpoints/step-\d+(/finished)?$"),
    "export": re.compile(r"\.epoch-\d+\.tmp"),
    "publish": re.compile(r"epoch-\d+$|\.epoch-\d+\.old|\.?model"),
    "log": re.compile(r"\.?metrics"),
}


def _watch(out, end=None, counts=None):
    """Count the instants of each phase, and at one of them end this process.

    An instant is a file operation below `out`, just before it is done, or a forward of the network
    in a step or an evaluation. `end` = {"rank", "phase", "number", "signal"}, said in the log by
    ENDED, and by HEARD where the run listens to signals; `counts` is a file for {phase: instants}
    of rank 0.
    """
    import torch

    import model

    rank, seen = int(os.environ.get("RANK", "0")), {}

    def instant(phase):
        seen[phase] = seen.get(phase, 0) + 1
        if end and (rank, phase, seen[phase]) == (end["rank"], end["phase"], end["number"]):
            heard = signal.getsignal(end["signal"]) != signal.SIG_DFL
            os.write(1, ENDED + (HEARD if heard else b"\n"))
            os.kill(os.getpid(), end["signal"])

    def on_file(event, arguments):
        if event not in FILE_EVENTS:
            return
        # What a file is renamed to says what is done; a link's target does not.
        path = arguments[1 if event in ("os.rename", "os.symlink") else 0]
        if isinstance(path, (str, os.PathLike)) and (path := os.fspath(path)).startswith(f"{out}/"):
            inside = path[len(str(out)) + 1 :]
            for phase in [name for name, paths in PHASES.items() if paths.match(inside)]:
                instant(phase)

    def on_forward(module, _):
        if isinstance(module, model.Llama):
            instant("step" if module.training else "evaluate")

    torch.nn.modules.module.register_module_forward_pre_hook(on_forward)
    sys.addaudithook(on_file)
    if counts and rank == 0:
        write = lambda: Path(counts).write_text(json.dumps(seen))  # noqa: E731
        multiprocessing.util.Finalize(None, write, exitpriority=1)


ENDED, HEARD = b"[a signal, as asked for]", b" [heard]\n"
FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.symlink", "shutil.rmtree"}

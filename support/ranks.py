"""The processes of a run: how they communicate, how they end, and the folder they share.

The handler of a signal to stop only sets a flag. In a step the flag is part of the loss's
all-reduce; in an evaluation the ranks ask each other before every batch. So all ranks learn of it
at the same point: they finish the step or leave the evaluation, save, and exit with 0.
"""

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from support.files import told_torchrun
from support.report import StatusLine

STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1  # the last: Slurm's
CONNECTING = datetime.timedelta(minutes=30)  # and any collective of a step


class Ranks:
    """The processes of this run: one per GPU, or any number on a CPU."""

    resumes = "the same command resumes from here"
    holder = None  # on rank 0, the text of OUT/.lock while this run holds it

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        backend, self.device = "gloo", torch.device("cpu")
        if self.cuda:
            backend = "cuda:nccl,cpu:gloo"
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        try:
            if "RANK" in os.environ:  # torchrun
                store, self.rank, self.world = next(dist.rendezvous("env://"))
            else:
                store, self.rank, self.world = dist.HashStore(), 0, 1
            dist.init_process_group(
                backend, store=fresh_store(store, self.rank, self.world), rank=self.rank,
                world_size=self.world, timeout=CONNECTING,
                device_id=self.device if self.cuda else None,  # NCCL starts now, and fails now
            )  # fmt: skip
        except RuntimeError as error:
            sys.exit(told_torchrun(f"error: the ranks cannot be connected: {error}"))
        # The ranks wait for rank 0 to tokenize, and for each other's files: sometimes for hours.
        self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=2))
        self.first = self.rank == 0
        self.line = StatusLine(sys.stdout, seconds=10.0)
        self.signalled = None  # when the first signal to stop came

    def thread(self):
        """An executor of one thread, on this rank's device: new threads start on device 0."""
        use_device = (lambda: torch.cuda.set_device(self.device)) if self.cuda else None
        return ThreadPoolExecutor(1, initializer=use_device)

    def say(self, text):
        if self.first:
            self.line.say(text)

    def sum(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """[the value of each rank], as JSON, because all_gather_object would unpickle."""
        raw = json.dumps(value).encode()
        longest = torch.tensor(len(raw))
        dist.all_reduce(longest, dist.ReduceOp.MAX, self.patient)
        mine = torch.frombuffer(bytearray(raw.ljust(int(longest))), dtype=torch.uint8)
        texts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(texts, mine, self.patient)
        return [json.loads(bytes(text.tolist())) for text in texts]

    def all_do(self, function, task=""):
        """[`function()` of each rank], as JSON; if it fails on one rank, all raise its error.

        It must not fail in the middle of a collective: the other ranks would wait for it.
        """
        value, problem = None, ""
        try:
            value = function()
        except (ValueError, OSError) as error:
            problem = (f"{task} failed: " if task else "") + (str(error) or repr(error))
        found = self.gather([value, problem])
        for rank, (_, problem) in enumerate(found):
            if problem:
                raise ValueError(problem + (f" (rank {rank})" if rank else ""))
        return [value for value, _ in found]

    def first_does(self, function, task=""):
        """The result of `function()` on rank 0, as JSON; if it fails there, it fails on all."""
        return self.all_do(lambda: function() if self.first else None, task)[0]

    def listen(self):
        """From now on a signal to stop only sets a flag; a second one ends the process at once."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, self._signal)

    def _signal(self, number, frame):
        if self.signalled is None:
            self.signalled = time.monotonic()
            if self.first:
                with contextlib.suppress(OSError):  # not print, which it may have interrupted
                    os.write(2, b"\nstopping; once more to stop at once, without saving\n")
        elif time.monotonic() - self.signalled > 1:  # not torchrun's copy of the first Ctrl-C
            os._exit(128 + number)

    def asked_to_stop(self):
        """Did any rank get a signal to stop? All ranks must ask, and get the same answer."""
        return any(self.gather(self.signalled is not None))

    def check_lock(self, out):
        """ValueError if `out` was removed since this run locked it, and another run has it now."""
        if self.holder and (seen := read_lock(out)) not in (None, self.holder):
            raise ValueError(f"{out} was removed, and is now held by another run ({seen})")

    @contextlib.contextmanager
    def errors_in_one_line(self):
        """Errors that a user can fix end the run with one line, all others with a traceback."""
        try:
            yield
            return self.finish()
        except (ValueError, OSError) as error:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends those that wait below
            message = f"error: {error}"
        except KeyboardInterrupt:
            message = "interrupted"
        except RuntimeError as error:  # only gloo's message tells that a rank is gone
            signs = "Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out"
            if not isinstance(error, dist.DistError) and not any(s in str(error) for s in signs):
                raise
            message = f"error: lost another rank; {self.resumes} ({error})"
        time.sleep(0 if self.first else 3)  # of an error on all ranks, only rank 0 prints it
        told_torchrun(message)
        if self.world == 1:
            dist.destroy_process_group()
            sys.exit(message)
        with contextlib.suppress(OSError):  # stderr may be closed
            print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def finish(self):
        dist.barrier()
        dist.destroy_process_group()


def fresh_store(store, rank, world):
    """`store` under a new prefix, because after a restart it still has the dead ranks' keys.

    New ranks would wait for the addresses of dead ones (pytorch#135712), and torchrun's restart
    count differs between machines. So rank 0 draws a random prefix, and gives it to each other rank
    under a name that this rank has just drawn.
    """
    if rank:
        name = secrets.token_hex(8)
        store.set(f"name of rank {rank}", name)
        prefix = store.get(f"prefix for {name}").decode()
        store.set(f"{prefix} reached rank {rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix, begun = secrets.token_hex(8), time.monotonic()
    for other in range(1, world):
        while not store.check([f"{prefix} reached rank {other}"]):
            if time.monotonic() - begun > CONNECTING.total_seconds():
                raise RuntimeError(f"timed out waiting for rank {other}")
            name = store.get(f"name of rank {other}").decode()  # perhaps still a dead rank's
            store.set(f"prefix for {name}", prefix)
            time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


# ---------------------------------------------------------------------------- the folder they share


@contextlib.contextmanager
def held_output(path, ranks):
    """The folder --out, locked against other live runs; without a path, a temporary folder."""
    with contextlib.ExitStack() as stack:
        if not path:
            path = ranks.first_does(lambda: stack.enter_context(tempfile.TemporaryDirectory()))
        elif ranks.first:
            stack.enter_context(lock_folder(Path(path), ranks))
        yield Path(path)
        dist.barrier()  # the temporary folder is rank 0's
    ranks.holder = None


def lock_folder(out, ranks):
    """OUT/.lock, open and locked; its text names the process that has locked it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out} is held by another live run ({read_lock(out)})") from None
    except OSError:
        ranks.say(f"note: the disk of {out} has no locks: start no second run in this folder")
    ranks.holder = f"process {os.getpid()} on {os.uname().nodename}, {time.ctime()}"
    (out / ".lock").write_text(ranks.holder)
    return lock


def read_lock(out):
    with contextlib.suppress(OSError, UnicodeError):
        return (out / ".lock").read_text()

"""The processes of a run: what they tell each other, how they end, and the folder they share."""

import contextlib
import datetime
import errno
import fcntl
import functools
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

from support.report import StatusLine

STOP_SIGNALS = "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"  # the last is Slurm's --signal=USR1


class SaveFailed(RuntimeError):
    """Something that all ranks write together could not be written."""


class Ranks:
    """The processes of this run: one a GPU, or any number on a CPU."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        if self.cuda:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        backend = "cuda:nccl,cpu:gloo" if self.cuda else "gloo"
        if "RANK" in os.environ:  # torchrun
            store, self.rank, self.world = next(dist.rendezvous("env://"))
        else:
            store, self.rank, self.world = dist.HashStore(), 0, 1
        self.store = fresh_store(store, self.rank, self.world)
        timeout = datetime.timedelta(minutes=30)
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.world, timeout=timeout,
            device_id=self.device if self.cuda else None,  # NCCL starts now, and fails now
        )  # fmt: skip
        # While files are written the others wait, on a slow disk for hours.
        self.patient = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=6))
        self.first = self.rank == 0
        self.line = StatusLine(sys.stdout, seconds=1.0)
        self.signalled = None  # when the first signal to stop came

    def thread(self):
        """An executor of one thread, on this rank's device: a thread starts with device 0."""
        use_device = functools.partial(torch.cuda.set_device, self.device) if self.cuda else None
        return ThreadPoolExecutor(1, initializer=use_device)

    # --- what they tell each other

    def say(self, text):
        if self.first:
            self.line.say(text)

    def sum(self, tensor):
        dist.all_reduce(tensor)
        return tensor

    def first_does(self, key, function):
        """What `function()` returns on rank 0, as JSON; a key serves once.

        Through the store, not a collective, which would time out while rank 0 tokenizes.
        """
        if self.first:
            result = function()
            self.store.set(key, json.dumps(result))
            return result
        self.store.wait([key], datetime.timedelta(days=30))
        return json.loads(self.store.get(key))

    def gather(self, value):
        """[the value of each rank], of JSON: all_gather_object would unpickle what it receives."""
        text = torch.frombuffer(bytearray(json.dumps(value), "utf-8"), dtype=torch.uint8)
        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(text)
        dist.all_reduce(sizes, group=self.patient)
        texts = torch.zeros(self.world, int(sizes.max()), dtype=torch.uint8)
        texts[self.rank, : len(text)] = text
        dist.all_reduce(texts, group=self.patient)
        return [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, sizes, strict=True)]

    @contextlib.contextmanager
    def all_or_none(self, what):
        """What fails on one rank fails on all: each raises the same SaveFailed, none waits.

        What is done inside must hold no collective that a rank which failed would miss.
        """
        problem = None
        try:
            yield
        except Exception as error:
            problem = f"{error}".strip().split("\n")[0] or repr(error)
        problems = [(rank, text) for rank, text in enumerate(self.gather(problem)) if text]
        if problems:
            rank, text = problems[0]
            raise SaveFailed(f"{what} failed: {text}" + (f" (rank {rank})" if rank else ""))

    @contextlib.contextmanager
    def save_may_fail(self, unless):
        """What was saved before stands, and training goes on; `unless` no later save is to come."""
        try:
            yield
        except SaveFailed as error:
            if unless:
                raise
            self.say(f"warning: {error}; what was saved before is kept, training goes on")

    # --- how they end

    def listen(self):
        """From here on a signal to stop is kept, for `asked_to_stop`; a second one ends at once.

        Within a second of the first it is the same one: Ctrl-C comes from the terminal and again
        from torchrun.
        """
        for name in STOP_SIGNALS:
            number = getattr(signal, name, None)
            # nohup has SIGHUP ignored, and it stays so.
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._signal)

    def _signal(self, number, frame):
        if self.signalled is not None and time.monotonic() - self.signalled > 1:
            os._exit(128 + number)
        if self.signalled is None:
            self.signalled = time.monotonic()
            if self.first:
                self.line.say_in_handler("stopping; once more to stop at once, without saving")

    def asked_to_stop(self):
        """Did any rank get a signal to stop? All ranks agree; every rank must ask."""
        signalled = torch.zeros((), device=self.device).fill_(self.signalled is not None)
        return bool(self.sum(signalled))

    def stop(self, message):
        """End this rank with a message; torchrun ends the others."""
        self.line.end()
        if self.world == 1:
            dist.destroy_process_group()
            sys.exit(message)
        if not self.first:
            time.sleep(3)  # where all ranks found the same, rank 0 is the one to say so
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(message, file=sys.stderr, flush=True)
        os._exit(1)

    def finish(self):
        dist.barrier()
        dist.destroy_process_group()


def fresh_store(store, rank, world):
    """`store` under a prefix that only the ranks of this attempt know.

    torchrun keeps its store when it starts ranks again, and they would read what the dead ones
    wrote, such as their addresses (pytorch#135712). Its count of restarts is another on every
    machine. So rank 0 draws a prefix, and tells it to who asks with a name just drawn.
    """
    if rank:
        name = secrets.token_hex(8)
        store.set(f"name of rank {rank}", name)
        prefix = store.get(f"prefix for {name}").decode()
        store.set(f"{prefix} reached rank {rank}", "")
        return dist.PrefixStore(prefix, store)
    prefix, missing, begun = secrets.token_hex(8), set(range(1, world)), time.monotonic()
    while missing:
        for other in sorted(missing):
            if store.check([f"name of rank {other}"]):  # or still the name of a dead one
                name = store.get(f"name of rank {other}").decode()
                store.set(f"prefix for {name}", prefix)
            if store.check([f"{prefix} reached rank {other}"]):
                missing.remove(other)
        if time.monotonic() - begun > 1800:
            raise RuntimeError(f"timed out waiting for ranks {sorted(missing)}")
        time.sleep(0.01)
    return dist.PrefixStore(prefix, store)


def is_lost_rank(error):
    """Did a collective fail because another process is gone? gloo says so in words alone."""
    words = "Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out"
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


# ---------------------------------------------------------------------------- the folder they share


@contextlib.contextmanager
def held_output(path, ranks):
    """The folder --out, locked against other live runs; without a path a temporary one."""
    if not path:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(ranks.first_does("out", lambda: folder))
            dist.barrier()
        return
    out = Path(path)
    with lock_folder(out, ranks.say) if ranks.first else contextlib.nullcontext():
        check_output(out, ranks)
        yield out


def lock_folder(out, say):
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(f"--out {out} is held by another live run ({lock.read()})") from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        say(f"note: the disk of {out} has no locks: do not start a second run in this folder")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {os.uname().nodename}")
    lock.flush()
    return lock


def check_output(out, ranks):
    """Before anything is computed: OUT/model can be a link there, and all machines see it."""
    name = ranks.first_does("probe", lambda: try_link(out))
    with ranks.all_or_none("opening --out"):
        if not os.path.islink(out / name):
            raise ValueError(
                f"{os.uname().nodename} does not see the files of rank 0 in {out}: "
                "give an --out on a disk that all machines share"
            )
    if ranks.first:
        (out / name).unlink()


def try_link(out):
    """The name of a new link in `out`, where the run may make one."""
    model = out / "model"
    if model.exists() and not model.is_symlink():
        raise ValueError(
            f"{model} is not a link to an export, as a run leaves it (was {out} copied without "
            f"links?): rename or remove {model}, and the run will make the link again"
        )
    for stale in out.glob(".probe-*"):
        stale.unlink()
    probe = out / f".probe-{secrets.token_hex(8)}"
    try:
        probe.symlink_to("model")
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise ValueError(f"the disk of --out {out} has no symbolic links: {error}") from None
    return probe.name

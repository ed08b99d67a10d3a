"""The processes of a run: what they agree on, how they end, and what they print meanwhile."""

import datetime
import errno
import fcntl
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import train
from support import ranks as support_ranks
from support.ranks import Ranks, held_output, lock_folder
from support.report import StatusLine
from support.terminal import Terminal

# ------------------------------------------------------------------------------- what they agree on


def three_ranks(folder, what):
    """What three ranks write who each call `what([folder])`."""
    processes.succeeds([folder], 3, main=what)
    return [(folder / str(rank)).read_text() for rank in range(3)]


def gather_odd_values(arguments):
    ranks = Ranks()
    found = ranks.gather({"rank": ranks.rank, "text": "ä" * ranks.rank, "none": None})
    Path(arguments[0], str(ranks.rank)).write_text(json.dumps(found))
    ranks.finish()


def test_every_rank_gathers_the_values_of_all(tmp_path):
    expected = [{"rank": rank, "text": "ä" * rank, "none": None} for rank in range(3)]
    assert three_ranks(tmp_path, gather_odd_values) == [json.dumps(expected)] * 3


def fail_here_and_there(arguments):
    ranks, outcomes = Ranks(), []
    for failing in (None, 2, 0):
        try:
            write_here = functools.partial(write, ranks.rank == failing)
            outcomes.append(str(ranks.all_do(write_here, "saving x")))
        except ValueError as error:
            outcomes.append(str(error))
    Path(arguments[0], str(ranks.rank)).write_text("\n".join(outcomes))
    ranks.finish()


def write(fails):
    if fails:
        raise OSError(errno.ENOSPC, "No space left on device", "x/y")
    return "saved"


def test_what_fails_on_one_rank_fails_on_all_with_its_reason(tmp_path):
    reason = "saving x failed: [Errno 28] No space left on device: 'x/y'"
    expected = ["['saved', 'saved', 'saved']", f"{reason} (rank 2)", reason]
    assert three_ranks(tmp_path, fail_here_and_there) == ["\n".join(expected)] * 3


def be_slow(arguments):
    given = datetime.timedelta  # of the ranks' groups: half an hour becomes 5 s
    shorter = lambda minutes=0, days=0: given(days=days, seconds=5 * (minutes > 0))  # noqa: E731
    support_ranks.datetime = SimpleNamespace(timedelta=shorter)
    ranks = Ranks()
    Path(arguments[0], str(ranks.rank)).write_text(ranks.first_does(lambda: time.sleep(8) or "ok"))
    ranks.finish()


def test_ranks_wait_for_the_first_longer_than_for_a_step(tmp_path):
    """Which tokenizes, or writes, for hours at times."""
    processes.succeeds([tmp_path], 2, main=be_slow)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["ok", "ok"]


def test_only_a_lock_of_another_run_is_none_of_ours(ranks, tmp_path):
    """A lock that is removed, or cannot be read, was taken by nobody."""
    with held_output(tmp_path, ranks) as out:
        ranks.check_lock(out)
        for other in (b"process 1 on there", b"", b"\xff"):
            (out / ".lock").write_bytes(other)
            if other == b"\xff":
                ranks.check_lock(out)
                continue
            with pytest.raises(ValueError, match=f"{out} was removed, and is now held by another"):
                ranks.check_lock(out)
        (out / ".lock").unlink()
        ranks.check_lock(out)


# ------------------------------------------------------------------------------------- how they end


def fail_while_training(_):
    ranks = Ranks()
    with ranks.errors_in_one_line():
        ranks.listen()
        ranks.first_does(functools.partial(write, True), "saving x")


def test_an_error_of_all_ranks_is_printed_once(tmp_path):
    """torchrun sends SIGTERM to the others as soon as one rank has ended."""
    log = tmp_path / "log"
    first, *others = started = processes.start([], 3, log, main=fail_while_training)
    first.join(processes.LONGEST)
    time.sleep(1)  # all have found the error by now; they wait for 3
    for process in others:
        process.terminate()
    assert processes.finish(started) == [1, -signal.SIGTERM, -signal.SIGTERM]
    assert log.read_text().count("error: saving x failed") == 1


def test_torchrun_prints_the_error_of_a_run_last(tmp_path):
    """As the root cause, once, below the traceback of its own."""
    settings = processes.flags("no such file.jsonl", tmp_path / "out")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    done = subprocess.run(
        [*map(str, [*launch, "train.py", *settings])], cwd=processes.ROOT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    error = "error: no such file.jsonl: cannot be read: No such file or directory"
    last = done.stdout.rstrip().splitlines()[-15:]
    (root_cause,) = (n for n, line in enumerate(last) if "Root Cause" in line)
    assert [n for n, line in enumerate(last) if error in line] > [root_cause], done.stdout
    assert done.returncode == 1 and done.stdout.count(error) == 2  # and once where it occurred


def test_torchrun_reads_the_error_of_a_wrong_flag(run, tmp_path, monkeypatch):
    assert run(train.main, "--modle", "x")[:2] == (2, "")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    code, _, shown = run(train.main, "--modle", "x")
    read = ProcessFailure(0, os.getpid(), code, str(tmp_path / "error.json"))
    assert read.message["message"] + "\n" == shown == (
        "error: --modle is not a flag of train.py; did you mean --model? --help lists all\n"
    )
    assert abs(time.time() - read.timestamp) < 60


@pytest.fixture
def handlers():
    """The signals' handlers are as they were afterwards."""
    before = {number: signal.getsignal(number)
              for number in support_ranks.STOP_SIGNALS}  # fmt: skip
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_run_under_nohup_outlives_its_terminal(ranks, handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ranks.listen()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == ranks._signal


def test_a_second_signal_ends_at_once_but_not_the_same_ctrl_c_twice(ranks, monkeypatch):
    """Ctrl-C comes from the terminal and again from torchrun, within milliseconds."""
    codes, shown = [], []
    monkeypatch.setattr(support_ranks.os, "write", lambda *arguments: shown.append(arguments))
    monkeypatch.setattr(support_ranks.os, "_exit", codes.append)
    monkeypatch.setattr(ranks, "signalled", None)
    ranks._signal(signal.SIGINT, None)
    ranks._signal(signal.SIGINT, None)
    assert codes == [] and ranks.asked_to_stop()
    ((stream, text),) = shown
    assert stream == 2 and text.startswith(b"\nstopping; once more ") and text.endswith(b"\n")
    monkeypatch.setattr(ranks, "signalled", time.monotonic() - 2)
    ranks._signal(signal.SIGTERM, None)
    assert codes == [128 + signal.SIGTERM]


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = []
    lock_folder(tmp_path / "out", SimpleNamespace(say=said.append))
    assert len(said) == 1 and "has no locks: start no second run" in said[0]


# ---------------------------------------------------------------------------------- what they print


@pytest.fixture
def shown(monkeypatch):
    """A terminal, of which shown.buffer has all that it got."""
    monkeypatch.setattr(Terminal, "refreshed", False)
    return Terminal(io.BytesIO(), "utf-8", line_buffering=True)


def test_what_is_said_never_stands_behind_the_refreshed_line(shown):
    line = StatusLine(shown, 1.0)
    line.refresh("step 1")
    line.say("stopped after step 1")
    line.say("bye")
    line.refresh("step 2", final=True)
    line.say("done")
    assert seen(shown) == ["step 1", "stopped after step 1", "bye", "step 2", "done"]


def seen(terminal):
    """The lines that a terminal shows of what it got, each without the spaces at its end."""
    refreshed = terminal.buffer.getvalue().decode().replace("\033[K", "").split("\n")
    return [line.split("\r")[-1].rstrip() for line in refreshed][:-1]


def test_an_error_stands_behind_no_refreshed_line_of_any_other(shown):
    """Of the tokenizing on stderr, which whoever ends the run knows nothing of."""
    StatusLine(shown, 30).refresh("tokenizing")
    print("interrupted", file=shown)
    assert seen(shown) == ["tokenizing", "interrupted"]


@pytest.mark.parametrize(
    "columns, fits",
    [(60, "step 9  1:00 left  loss 3.14"), (32, "step 9  1:00 left  loss 3.14"),
     (31, "step 9  1:00 left  loss ..."), (11, "step...")],
)  # fmt: skip
def test_a_narrow_terminal_gets_one_line_with_room_for_a_ctrl_c(shown, monkeypatch, columns, fits):
    monkeypatch.setenv("COLUMNS", str(columns))
    StatusLine(shown, 1.0).refresh("step 9  1:00 left  loss 3.14")
    shown.buffer.write(b"^C\n")  # by the terminal itself
    assert seen(shown) == [fits + "^C"]
    assert len(fits + "^C") < columns


def test_a_file_gets_a_line_a_second_and_the_last_one():
    shown = io.StringIO()
    line = StatusLine(shown, 1.0)
    for step in range(5):
        line.refresh(f"step {step}", final=step == 4)
    assert shown.getvalue() == "step 0\nstep 4\n"


def test_rank_0_does_not_wait_for_ever_for_a_rank_whose_dead_forerunner_left_its_name(monkeypatch):
    store = torch.distributed.HashStore()
    store.set("name of rank 1", "of a dead rank")
    monkeypatch.setattr(support_ranks, "CONNECTING", datetime.timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match="timed out waiting for rank 1"):
        support_ranks.fresh_store(store, 0, 2)

"""bench/first_gpu.sh with an interpreter that only says what it is asked for."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from processes import ROOT

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="a script of bash")
PARTS = ["device", "kernel", "block", "logits", "1b", "7b"]
FAKE = """#!/usr/bin/env bash
echo "asked for $*"
echo "a warning" >&2
[ -z "$HANG" ] || [[ "$*" != *"$HANG"* ]] || sleep 60
case "$*" in *block*) exit 3 ;; esac
echo "done"
"""


def start(folder, *parts, **environment):
    fake = folder / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    environment = {"PYTHON": str(fake), "OUT": str(folder / "out"), "HANG": ""} | environment
    return subprocess.Popen(
        ["bash", ROOT / "bench" / "first_gpu.sh", *parts], env=os.environ | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def written(folder, part):
    path = folder / "out" / part
    return path.read_text() if path.exists() else ""


def test_parts_run_in_order_and_one_that_fails_stops_no_other(tmp_path):
    run = start(tmp_path)
    shown, _ = run.communicate(timeout=60)
    assert run.returncode == 1  # of the block
    lines = written(tmp_path, "summary").splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == PARTS
    codes = [line.split(" after")[0].split()[-1] for line in lines[1:]]
    assert codes == ["3" if part == "block" else "0" for part in PARTS]
    for part in PARTS:
        assert "asked for" in written(tmp_path, part) and "a warning" in written(tmp_path, part)
        assert written(tmp_path, part) in shown


@pytest.mark.parametrize("part", PARTS)
def test_a_kill_in_a_part_loses_nothing_that_was_shown(tmp_path, part):
    run = start(tmp_path, HANG={"kernel": "pytest", "7b": "mistral"}.get(part, part))
    until = time.monotonic() + 60
    while "a warning" not in written(tmp_path, part) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert "asked for" in written(tmp_path, part) and "done" not in written(tmp_path, part)
    for earlier in PARTS[: PARTS.index(part)]:
        assert earlier == "block" or "done" in written(tmp_path, earlier)


def test_a_part_gets_what_is_left_and_none_begins_without_time(tmp_path):
    for limit, expected in (("50", r"kernel, at most (40|39) s"), ("10", "")):
        run = start(tmp_path, "kernel", LIMIT=limit, OUT=str(tmp_path / limit / "out"))
        run.communicate(timeout=60)
        assert run.returncode == (0 if expected else 1)
        if expected:
            assert re.search(expected, written(tmp_path / limit, "kernel"))
        else:
            assert not written(tmp_path / limit, "kernel")
            assert "kernel: no time left" in written(tmp_path / limit, "summary")


def test_a_wrong_part_is_an_error_before_any_runs(tmp_path):
    run = start(tmp_path, "device", "everything")
    shown, _ = run.communicate(timeout=60)
    assert run.returncode == 1 and shown.startswith("error: no part everything, only device")
    assert not (tmp_path / "out").exists()

# ruff: noqa: F811 (fixtures of another file)
"""Runs that are killed, stopped, starved of disk or fed broken files: nothing is lost."""

import json
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from fuzz_parsers import fuzz
from kill_and_resume import kill_and_compare, start, steps_logged
from safetensors.torch import load_file
from test_train import ROOT, SUMS, few, flags, metrics, run, succeeds  # noqa: F401

import model

TRAIN = ROOT / "train.py"


# ------------------------------------------------------------------------------ killed, stopped


@pytest.mark.parametrize("ranks, kills", [(1, 13), (2, 7)])
def test_sigkill_at_random_instants_changes_no_bit(tmp_path, ranks, kills):
    assert kill_and_compare(tmp_path, ranks, kills) == kills


def test_resume_on_other_ranks_gives_the_same_losses(few, tmp_path):
    """Saved by 2 ranks, resumed by 1 and by 4; 67 rows of vocabulary divide by neither."""
    folder = tmp_path / "model"
    shutil.copytree(SUMS, folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 67}
    (folder / "config.json").write_text(json.dumps(config))
    more = {"model": folder, "epochs": 6, "batch_tokens": 128, "save_every": 3, "keep": 9}
    whole = tmp_path / "whole"
    succeeds(TRAIN, *flags(few, whole, accumulate=2, **more), ranks=2)
    expected = [line["loss"] for line in metrics(whole)]
    for ranks, accumulate in ((1, 4), (4, 1)):
        out = tmp_path / f"{ranks}-ranks"
        shutil.copytree(whole, out, symlinks=True)
        for path in (out / "checkpoints").glob("step-*"):
            if path.name != "step-3":
                shutil.rmtree(path)
        result = succeeds(TRAIN, *flags(few, out, accumulate=accumulate, **more), ranks=ranks)
        assert "resuming from" in result.stdout
        found = [line["loss"] for line in metrics(out)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    out = whole.with_name("3-ranks")
    shutil.copytree(whole, out, symlinks=True)
    result = run(TRAIN, *flags(few, out, accumulate=1, **more), ranks=3)
    assert result.returncode != 0
    assert "ranks x --accumulate" in result.stderr and "saved 4, now 3" in result.stderr


@pytest.mark.parametrize("ranks", [1, 2])
def test_training_goes_on_while_a_checkpoint_is_written(few, tmp_path, ranks):
    """And what is written is the state of the step it is named after, however slow the disk."""
    settings = {"epochs": 99, "max_steps": 25, "save_every": 10, "keep": 9, "export_every": 0}
    quick, slow = tmp_path / "quick", tmp_path / "slow"
    succeeds(TRAIN, *flags(few, quick, **settings), ranks=ranks)
    result = succeeds(ROOT / "tests" / "slow_disk.py", *flags(few, slow, **settings), ranks=ranks)
    steps_done = {int(step): int(done) for step, done in WRITTEN.findall(result.stdout)}
    assert steps_done == {10: 20, 20: 25, 25: 25}  # the next save, and the end, wait for it
    for step in steps_done:
        for path in (quick / "checkpoints" / f"step-{step}").glob("*.safetensors"):
            written = load_file(slow / "checkpoints" / path.parent.name / path.name)
            for name, tensor in load_file(path).items():
                assert torch.equal(written[name], tensor)


WRITTEN = re.compile(r"step-(\d+) written at step (\d+)")


@pytest.mark.parametrize("host", [{"MEMORY": "1"}, {"COPY": "fails"}])
def test_without_copies_a_save_is_as_good(few, tmp_path, host):
    out = tmp_path / "out"
    settings = {"max_steps": 2, "save_every": 1, "keep": 9, "export_every": 0}
    result = succeeds(ROOT / "tests" / "slow_disk.py", *flags(few, out, **settings), **host)
    assert WRITTEN.findall(result.stdout) == [("1", "1"), ("2", "2")]
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-1", "step-2"]


def test_replicas_save_resume_and_learn_as_one_group_does(few, tmp_path):
    """Four ranks as two groups that each hold the whole model (HSDP), stopped and resumed."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    settings = {"epochs": 9, "batch_tokens": 64, "eval_data": few}
    succeeds(TRAIN, *flags(few, whole, max_steps=6, **settings), ranks=4)
    settings |= {"replicas": 2, "save_every": 3}
    succeeds(TRAIN, *flags(few, halved, max_steps=6, **settings), ranks=4)
    shutil.rmtree(halved / "checkpoints" / "step-6")
    resumed = succeeds(TRAIN, *flags(few, halved, max_steps=6, **settings), ranks=4)
    assert "resuming from" in resumed.stdout
    found, expected = ([line["loss"] for line in metrics(out)] for out in (halved, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    tensors = load_file(halved / "model" / "model.safetensors")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)


def running(tmp_path, data, ranks, **more):
    """A run of many steps, once it has logged some."""
    out = tmp_path / "out"
    log = open(tmp_path / "log", "w")
    processes = start(flags(data, out, epochs=10_000, **more), ranks, log)
    deadline = time.monotonic() + 120
    while steps_logged(out) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    return out, processes, tmp_path / "log"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_ends_all_with_0(few, tmp_path, number):
    out, processes, log = running(tmp_path, few, ranks=2)
    processes[1].send_signal(number)
    assert [process.wait(60) for process in processes] == [0, 0], log.read_text()
    done = max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
    assert done == metrics(out)[-1]["step"]
    assert f"stopped after step {done}" in log.read_text()


def test_a_second_signal_ends_at_once(few, tmp_path):
    _, (process,), _ = running(tmp_path, few, ranks=1)
    process.send_signal(signal.SIGSTOP)  # so that both signals arrive between two steps
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    time.sleep(0)
    assert process.wait(60) == 0


def test_a_dead_rank_ends_the_others_with_a_message(few, tmp_path):
    _, processes, log = running(tmp_path, few, ranks=2)
    processes[1].kill()
    assert processes[0].wait(60) == 1
    assert "lost another rank" in log.read_text()


def test_a_finished_run_says_so_and_longer_ones_go_on(few, tmp_path):
    out = tmp_path / "out"
    succeeds(TRAIN, *flags(few, out, epochs=1))
    steps = len(metrics(out))
    again = succeeds(TRAIN, *flags(few, out, epochs=1))
    assert "this run is finished" in again.stdout and len(metrics(out)) == steps
    further = succeeds(TRAIN, *flags(few, out, epochs=2))
    assert "resuming from" in further.stdout and len(metrics(out)) == 2 * steps
    changed = re.findall("changed since: (.*)", further.stdout)
    assert changed == ["--epochs 1, now 2"]


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 1}, "--seed"),
        ({"beta": 1.0}, "--beta"),
        ({"reward": False}, "--no-reward"),
        ({"condition": False}, "--no-condition"),
        ({"max_length": 24}, "--max-length"),
        ({"batch_tokens": 512}, "--batch-tokens"),
        ({"accumulate": 2}, "--accumulate"),
        ({"resume": False}, "--resume"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(finished, few, change, named):
    result = run(TRAIN, *flags(few, finished, **change))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and named in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    succeeds(TRAIN, *flags(few, out, epochs=1, save_every=1))
    return out


# ------------------------------------------------------------------------------ non-finite steps


def test_a_non_finite_step_stops_before_the_optimizer(few, tmp_path):
    out = tmp_path / "out"
    result = run(TRAIN, *flags(few, out, lr=1e30, save_every=1, warmup_ratio=0), ranks=2)
    assert result.returncode != 0
    assert "step 2: loss" in result.stderr
    assert "parameter with a non-finite gradient is model." in result.stderr
    assert f"{few}:" in result.stderr
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-1"]
    assert len(metrics(out)) == 1


def test_the_parameter_named_is_the_one_that_is_not_finite(few, tmp_path):
    """Infinite weights in one late layer, as an overflow would leave them."""
    folder = tmp_path / "model"
    shutil.copytree(SUMS, folder)
    llama = model.Llama(model.LlamaConfig.from_folder(SUMS))
    model.random_parameters(llama, seed=0)
    poisoned = llama.model.layers[2].mlp.down_proj.weight
    poisoned.data[0, 0] = float("inf")
    model.save(llama, folder)
    result = run(TRAIN, *flags(few, tmp_path / "out", model=folder, save_every=1))
    assert result.returncode == 1 and "step 1: loss nan" in result.stderr
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_a_run_that_gains_evaluation_data_goes_on(few, tmp_path):
    out = tmp_path / "out"
    succeeds(TRAIN, *flags(few, out, epochs=1))
    further = succeeds(TRAIN, *flags(few, out, epochs=2, eval_data=few))
    assert "evaluation at step" in further.stdout and (out / "model").resolve().name == "epoch-2"


# --------------------------------------------------------------------------------- broken files


def damage(path, how):
    raw = path.read_bytes()
    if how == "truncated":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "bit flipped":
        path.write_bytes(raw[:-5] + bytes([raw[-5] ^ 4]) + raw[-4:])
    elif how == "header lying":
        path.write_bytes((1 << 40).to_bytes(8, "little") + raw[8:])
    elif how == "missing":
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "header lying", "missing"])
@pytest.mark.parametrize("name", ["safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_still_serves(
    finished,
    few,
    tmp_path,
    how,
    name,
):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    newest = max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    damage(next(path for path in newest.iterdir() if path.name.endswith(name)), how)
    result = run(TRAIN, *flags(few, out, epochs=1))
    assert result.returncode == 1 and str(newest) in result.stderr
    assert "Traceback" not in result.stderr
    shutil.rmtree(newest)
    assert "resuming from" in succeeds(TRAIN, *flags(few, out, epochs=1)).stdout


def test_a_checkpoint_of_a_save_that_never_ended_is_not_used(finished, few, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    (out / "checkpoints" / "step-99.tmp").mkdir()
    assert "this run is finished" in succeeds(TRAIN, *flags(few, out, epochs=1)).stdout
    assert not (out / "checkpoints" / "step-99.tmp").exists()


@pytest.mark.parametrize("before_second_rename", [True, False])
def test_a_kill_while_an_export_is_replaced_leaves_a_model(
    finished, few, tmp_path, before_second_rename
):
    """`publish` moves the older export aside, then the new one in: killed after either."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    (out / "epoch-1").rename(out / "epoch-1.old")
    if not before_second_rename:
        shutil.copytree(out / "epoch-1.old", out / "epoch-1")
    (out / "epoch-1.tmp").mkdir()
    assert "this run is finished" in succeeds(TRAIN, *flags(few, out, epochs=1)).stdout
    assert [path.name for path in out.glob("epoch-*")] == ["epoch-1"]
    assert model.load(out / "model", "cpu", torch.float32)


def write(text):
    return lambda folder: (folder / "config.json").write_text(text)


def config_with(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index_naming(file):
    def change(folder):
        index = {"weight_map": {"model.norm.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def other_tokenizer(folder):
    config_with(vocab_size=5000)(folder)


@pytest.mark.parametrize(
    "fault, message",
    [
        (write("{"), "config.json: cannot be read as JSON"),
        (write("[" * 100_000), "config.json: cannot be read as JSON"),
        (config_with(hidden_size=10**12), "hidden_size must be a whole number"),
        (config_with(num_hidden_layers=10**9), "num_hidden_layers must be a whole number"),
        (config_with(hidden_act="gelu"), "hidden_act"),
        (other_tokenizer, "belongs to another checkpoint"),
        (index_naming("../../etc/passwd"), "is not a file of this folder"),
        (index_naming("gone.safetensors"), "gone.safetensors: cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "cannot be read as"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"no"), "not a SentencePiece model"),
        (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model: not found"),
    ],
)
def test_a_broken_model_folder_is_one_clear_message(few, tmp_path, fault, message):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(SUMS, folder)
    fault(folder)
    result = run(TRAIN, *flags(few, out, model=folder))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr


def test_bad_conversations_stop_the_run_before_any_weight(few, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_bytes(few.read_bytes() + b'{"class": "gpt5"}\n\x00\x00\n' + b"[" * 100_000 + b"\n")
    result = run(TRAIN, *flags(data, tmp_path / "out"))
    assert result.returncode == 1
    assert "3 bad lines" in result.stderr and f"{data}:61: " in result.stderr
    dropped = succeeds(TRAIN, *flags(data, tmp_path / "out", skip_bad=True, max_steps=1))
    assert "dropped as bad (--skip-bad): 3 lines" in dropped.stdout


def test_mutated_inputs_are_accepted_or_refused_by_name():
    answers = fuzz(2000, seed=1)
    assert sum(answers.values()) == 2000
    assert len(answers) == 6  # each of the three parsers did both


# ------------------------------------------------------------------------------------ the output


def test_an_output_held_by_a_live_run_is_refused(few, tmp_path):
    out, (process,), _ = running(tmp_path, few, ranks=1)
    result = run(TRAIN, *flags(few, out))
    process.kill()
    process.wait()
    assert result.returncode == 1
    assert f"held by another live run (process {process.pid})" in result.stderr


def test_an_output_that_cannot_be_written_is_named(few, tmp_path):
    (tmp_path / "file").write_text("")
    result = run(TRAIN, *flags(few, tmp_path / "file" / "out"))
    assert result.returncode == 1 and str(tmp_path / "file") in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB; skipped where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_output_is_named_and_left_as_it_was(finished, few, small_disk):
    """Where a run stands already, and on an empty disk."""
    shutil.copytree(finished, small_disk / "out", symlinks=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for out in (small_disk / "out", small_disk / "new"):
        result = run(TRAIN, *flags(few, out, epochs=2))
        assert result.returncode == 1
        assert "Read-only file system" in result.stderr and str(out) in result.stderr
        assert "Traceback" not in result.stderr


def test_a_disk_too_small_is_found_before_training(few, small_disk):
    (small_disk / "other").write_bytes(bytes(9 << 20))
    result = run(TRAIN, *flags(few, small_disk / "out"))
    assert result.returncode == 1
    assert "GB free" in result.stderr and "evaluation" not in result.stdout


def test_a_disk_that_fills_up_keeps_the_older_checkpoint(few, small_disk, tmp_path):
    """Another program fills the disk during a run: its saves fail, the checkpoints stay."""
    out = small_disk / "out"
    log = open(tmp_path / "log", "w")
    (process,) = start(flags(few, out, epochs=10_000, save_every=20), 1, log)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoints/step-*[0-9]")) and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(OSError), open(small_disk / "other", "wb", buffering=0) as other:
        while True:
            other.write(bytes(1 << 14))
    while "training goes on" not in (tmp_path / "log").read_text() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    shown = (tmp_path / "log").read_text()
    assert "failed: " in shown and "kept: step-" in shown and "Traceback" not in shown
    (small_disk / "other").unlink()
    assert "resuming from" in succeeds(TRAIN, *flags(few, out, max_steps=60, save_every=20)).stdout

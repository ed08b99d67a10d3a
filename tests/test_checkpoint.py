"""What is saved is all there is: nothing incomplete is committed, nothing incomplete is read."""

import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import lives
import numpy as np
import pytest
import small
import torch
from processes import flags, metrics, plan_of
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import chat
import data
import loss
import model
import support.plan
import train
from support import checkpoint, files, report
from support.model_card import model_card
from support.ranks import held_output


@pytest.fixture
def started(ranks, few, tmp_path):
    """(plan, network, optimizer, checkpoints) of a run with evaluation data, after one step."""
    folder = lives.small_model(tmp_path / "model", tied=False)
    out = tmp_path / "out"
    out.mkdir()
    config = train.Config(
        model=str(folder), data=[str(few)], eval_data=[str(few)], out=str(out), batch_tokens=168,
        lr="1e-3",
    )  # fmt: skip
    plan = train.make_plan(config, ranks, out)
    checkpoints = checkpoint.Checkpoints(plan, ranks, out)
    report.Log(plan, ranks, out, checkpoints.resume())
    llama, optimizer = train.build(plan, ranks)
    step(plan, ranks, llama, optimizer, 1)
    return plan, llama, optimizer, checkpoints


def step(plan, ranks, llama, optimizer, number):
    _, batches, total_weight = train.load_step(plan, ranks, number)
    train.forward_backward(plan, ranks, llama, batches, total_weight)
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------- the network after an evaluation


def forward_alone(plan, ranks, llama):
    """A forward without a backward that is not followed by reshard(), as evaluate's is."""
    with torch.no_grad():
        train.forward(llama, plan, train.load_step(plan, ranks, 1)[1][0])


def test_after_an_evaluation_every_parameter_is_one_of_the_optimizers(started, ranks):
    plan, llama, optimizer, _ = started
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert train.evaluate(plan, ranks, llama) is not None
    assert {id(parameter) for parameter in llama.parameters()} == known
    assert all(isinstance(parameter, DTensor) for parameter in llama.parameters())
    assert llama.training  # else nothing would be recomputed
    forward_alone(plan, ranks, llama)  # and so it is evaluate that takes care of it
    assert {id(parameter) for parameter in llama.parameters()} != known


def test_after_an_evaluation_no_block_is_left_gathered_that_is_gathered_once(started, ranks):
    plan = dataclasses.replace(started[0], size=started[0].size._replace(resharded=False))
    llama, _ = train.build(plan, ranks)
    forward_alone(plan, ranks, llama)
    assert not any(isinstance(p, DTensor) for p in llama.model.layers.parameters())
    train.evaluate(plan, ranks, llama)
    assert all(isinstance(parameter, DTensor) for parameter in llama.parameters())


def test_an_evaluation_that_a_signal_ends_leaves_the_same(started, ranks, monkeypatch):
    plan, llama, optimizer, checkpoints = started
    answers = iter([False, True])
    monkeypatch.setattr(ranks, "asked_to_stop", lambda: next(answers))
    assert train.evaluate(plan, ranks, llama) is None
    assert llama.training
    checkpoints.save(llama, optimizer, 1)
    assert checkpoints.committed()


def test_a_gathered_network_is_not_saved(started, ranks):
    plan, llama, optimizer, checkpoints = started
    forward_alone(plan, ranks, llama)
    with pytest.raises(RuntimeError, match=r"model.embed_tokens.weight has no optimizer state"):
        checkpoints.save(llama, optimizer, 1)
    assert not list(checkpoints.folder.iterdir())


# ------------------------------------------------------------------------- what must be there, is


def test_a_checkpoint_holds_every_parameter_and_both_moments_bit_for_bit(started):
    _, llama, optimizer, checkpoints = started
    checkpoints.save(llama, optimizer, 1)
    found = {}
    for path in (checkpoints.folder / "step-1").glob("*.safetensors"):
        found |= load_file(path)
    assert len(found) == 3 * len(list(llama.parameters()))
    for name, parameter in llama.named_parameters():
        state = optimizer.state[parameter]
        assert state["step"] == 1
        for key, tensor in {
            name: parameter,
            f"optimizer.{name}.exp_avg": state["exp_avg"],
            f"optimizer.{name}.exp_avg_sq": state["exp_avg_sq"],
        }.items():
            assert (
                torch.equal(found[key], model.local_tensor(tensor)) and tensor.full_tensor().any()
            )


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
def test_a_save_without_a_moment_fails_and_names_the_parameter(started, moment):
    _, llama, optimizer, checkpoints = started
    del optimizer.state[llama.model.norm.weight][moment]
    with pytest.raises(RuntimeError, match="model.norm.weight has no optimizer state"):
        checkpoints.save(llama, optimizer, 1)
    assert not list(checkpoints.folder.iterdir())


def test_a_save_that_misses_rows_or_tensors_is_not_committed(started, monkeypatch):
    _, llama, optimizer, checkpoints = started
    write_rows = checkpoint.write_rows

    def without(name, rows):
        def write(folder, prefix, tensors):
            tensors = {n: t[: len(t) - rows] if n == name else t for n, t in tensors.items()}
            return write_rows(folder, prefix, {n: t for n, t in tensors.items() if len(t)})

        return write

    for rows, message in ((1, ": rows 0 to 67 .* not 0 to 66"), (67, ": rows 0 to 67 .* not none")):
        monkeypatch.setattr(checkpoint, "write_rows", without("lm_head.weight", rows))
        with pytest.raises(ValueError, match=f"saving .*/step-1 failed: lm_head.weight{message}"):
            checkpoints.save(llama, optimizer, 1)
    assert not checkpoints.committed()
    monkeypatch.undo()
    checkpoints.save(llama, optimizer, 1)  # over what is left of those
    assert [step for step, _ in checkpoints.committed()] == [1]


@pytest.mark.parametrize("fault", ["moved away", "does not reach the disk"])
def test_a_save_does_not_depend_on_the_log(started, ranks, monkeypatch, fault):
    plan, llama, optimizer, checkpoints = started
    log, path = report.Log(plan, ranks, checkpoints.out, 0), checkpoints.out / "metrics.jsonl"

    def sync(*synced):
        if fault != "moved away" and synced == (path,):
            raise OSError(errno.EIO, "Input/output error")

    log.write({"step": 1})
    if fault == "moved away":
        path.rename(checkpoints.out / "older.jsonl")
    monkeypatch.setattr(checkpoint, "sync", sync)
    checkpoints.save(llama, optimizer, 1)
    assert [step for step, _ in checkpoints.committed()] == [1]
    log.write({"step": 2})
    lines = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert lines == ([2] if fault == "moved away" else [1, 2])


def test_lines_that_cannot_be_written_are_written_later_and_said_once(started, ranks, monkeypatch):
    """On a disk that is full, then takes a part, then has room."""
    plan, _, _, checkpoints = started
    log, room, said = report.Log(plan, ranks, checkpoints.out, 0), [0, 0, 7, 30, 1000], []

    class Full:
        def __init__(self, *arguments, **options):
            self.file = open(*arguments, **options)

        def write(self, raw):
            bytes_left = room.pop(0)
            if not bytes_left:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(raw[:bytes_left])

        __enter__, __exit__ = lambda self: self, lambda self, *_: self.file.close()

    monkeypatch.setattr(report, "open", Full, raising=False)
    monkeypatch.setattr(ranks, "say", said.append)
    lines = [{"step": step, "classes": {}} for step in range(1, 6)]
    for line in lines:
        log.write(line)
    assert files.read_metrics(log.path) == lines
    assert len(said) == 1 and said[0].endswith("No space left on device; kept for later")


ODD_LINES = [
    b'{"step": 2, "cl', b"[1, 2]", b"7", b'"x"', b"null", b'{"a": 1}', b'{"step": "x"}', b"\xff",
    b"[" * 200_000, b'{"step": 2, "eval": 3}', b'{"step": 2, "eval": {"gpt4": 3}}', b"",
    b'{"step": 2, "classes": {"gpt4": {"loss": "low"}}}', b'{"step": null, "classes": {}}',
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD_LINES, ids=range(len(ODD_LINES)))
def test_an_odd_line_of_the_log_is_named_and_nothing_is_rewritten(started, ranks, odd):
    plan, _, _, checkpoints = started
    log = report.Log(plan, ranks, checkpoints.out, 0)
    for number in (1, 2, 3):
        log.write({"step": number, "classes": {}})
    lines = log.path.read_bytes().splitlines()
    log.path.write_bytes(b"\n".join([lines[0], odd, *lines[2:], b""]))
    before = log.path.read_bytes()
    with pytest.raises(ValueError, match=f"{log.path}:2: cannot be read: ") as failed:
        report.Log(plan, ranks, checkpoints.out, 3)
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 500
    assert log.path.read_bytes() == before


def test_a_last_line_cut_anywhere_leaves_those_before_it(tmp_path):
    lines = [{"step": step, "classes": {"ä": {"loss": None}}} for step in (1, 2, 3)]
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    last = raw.index(b'{"step": 3')
    path = tmp_path / "metrics.jsonl"
    for end in range(last, len(raw) + 1):
        path.write_bytes(raw[:end])
        assert files.read_metrics(path) == lines[: 3 if end == len(raw) else 2]
    path.write_bytes(raw[:last] + bytes(99))  # as a power cut leaves a file that was growing
    assert files.read_metrics(path) == lines[:2]


def test_a_log_goes_on_after_the_steps_done(started, ranks):
    """Without what was logged beyond them, and without the evaluation that is made again."""
    plan, _, _, checkpoints = started
    log = report.Log(plan, ranks, checkpoints.out, 0)
    table = {name: np.ones(2) for name in train.TABLE}
    others = {"eval_data": "other", "eval": {"gpt4": {"loss": 9}}}
    end = plan.order.ends[0]
    log.evaluation(0, table)
    for number in (1, end, end + 1):
        log.write({"step": number, "classes": {}})
    log.evaluation(end, table)
    log.write({"step": end} | others)
    log.evaluation(end + 1, table)
    assert log.expert_losses == {0: 1, end: 1, end + 1: 1}
    before = files.read_metrics(log.path)
    again = report.Log(plan, ranks, checkpoints.out, end)
    assert files.read_metrics(log.path) == [before[0], before[1], before[2], before[5]]
    assert again.expert_losses == {0: 1}
    assert report.Log(plan, ranks, checkpoints.out, 1).expert_losses == {0: 1}
    assert files.read_metrics(log.path) == before[:2]
    report.Log(plan, ranks, checkpoints.out, 0)
    assert files.read_metrics(log.path) == []


def test_weights_that_are_not_finite_are_not_saved(started):
    """Of the last step's update, at which no later loss looks."""
    _, llama, optimizer, checkpoints = started
    norm = llama.model.norm.weight
    for name, tensor in (
        ("model.norm.weight", norm),
        ("optimizer.model.norm.weight.exp_avg_sq", optimizer.state[norm]["exp_avg_sq"]),
    ):
        local, odd = model.local_tensor(tensor.detach()), [torch.nan, torch.inf, -torch.inf]
        for value in odd:
            whole = local.clone()
            local[-1] = value
            with pytest.raises(ValueError, match=f"step-1 failed: {name} holds NaN or infinity"):
                checkpoints.save(llama, optimizer, 1)
            local.copy_(whole)
    assert not checkpoints.committed()
    checkpoints.save(llama, optimizer, 1)
    assert checkpoints.committed()


# -------------------------------------------------------------------- the disk, at any instant


@pytest.fixture
def disk(monkeypatch):
    """Problems that a power cut or a kill at some instant would have had.

    Each is (what, path): "not on the disk" for what is renamed but was not synced since it was
    written; "name not on the disk" where a folder is removed though the rename before it was not
    synced; "removed" for what loses its own name before another has taken it.
    """
    synced, pending, problems = set(), set(), []
    fsync, rename, replace, unlink, rmtree = (
        os.fsync, os.rename, os.replace, os.unlink, shutil.rmtree,
    )  # fmt: skip

    def state(found):
        return found.st_ino, found.st_size, found.st_mtime_ns

    def watched_fsync(descriptor):
        found = os.fstat(descriptor)
        synced.add(state(found))
        pending.discard(found.st_ino)
        fsync(descriptor)

    def watched(function):
        def move(old, new):
            old, new = Path(old), Path(new)
            log = new.parents[1] / "metrics.jsonl"
            for path in [old, *old.rglob("*"), *([log] if new.match("checkpoints/step-?") else [])]:
                if not path.is_symlink() and state(path.stat()) not in synced:
                    problems.append(("not on the disk", path))
            function(old, new)
            if not re.search(r"\.(tmp|old)$", new.name):
                pending.add(new.parent.stat().st_ino)

        return move

    def watched_unlink(path, **options):
        if not options and not Path(path).name.startswith("."):
            problems.append(("removed", path))
        unlink(path, **options)

    def watched_rmtree(path, **options):
        if not re.search(r"\.(tmp|old)$", path.name):
            problems.append(("removed", path))
        elif path.exists() and pending:
            problems.append(("name not on the disk", path))
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", watched_fsync)
        patch.setattr(os, "rename", watched(rename))
        patch.setattr(os, "replace", watched(replace))
        patch.setattr(os, "unlink", watched_unlink)
        patch.setattr(shutil, "rmtree", watched_rmtree)
        yield SimpleNamespace(problems=problems, pending=pending)


def test_at_any_instant_the_disk_has_what_a_name_says(started, ranks, disk):
    """Of checkpoints, exports that replace others, OUT/model and the log."""
    plan, llama, optimizer, checkpoints = started
    config = dataclasses.replace(plan.config, keep=1)
    plan = checkpoints.plan = dataclasses.replace(plan, config=config)
    log = report.Log(plan, ranks, checkpoints.out, checkpoints.resume())
    for number in (1, 2, 3):
        log.write({"step": number, "classes": {}})
        checkpoints.save(llama, optimizer, number)
        checkpoint.write_export(plan, ranks, llama, checkpoints.out, number, {})
        assert not disk.pending
    report.Log(plan, ranks, checkpoints.out, 2)
    assert disk.problems == []
    assert [step for step, _ in checkpoints.committed()] == [3]
    assert chat.export_of(checkpoints.out / "model").steps == 3


@pytest.mark.parametrize("adam_precision, moment", [("fp32", 4), ("bf16", 2)])
def test_room_is_asked_for_the_kept_checkpoints_the_next_one_and_the_model(
    started, ranks, monkeypatch, adam_precision, moment
):
    plan, llama, optimizer, checkpoints = started
    config = dataclasses.replace(plan.config, adam_precision=adam_precision)
    plan = dataclasses.replace(plan, config=config, size=plan.size._replace(moment=moment))
    checkpoints = checkpoint.Checkpoints(plan, ranks, checkpoints.out)
    checkpoints.resume(), checkpoints.load(llama, optimizer)
    checkpoints.save(llama, optimizer, 1)
    (path,) = (checkpoints.folder / "step-1").glob("rank-*")
    size = sum(tensor.nbytes for tensor in load_file(path).values())
    for keep, count in ((1, 1), (2, 1), (5, 1), (2, 0)):
        if not count:
            shutil.rmtree(checkpoints.folder / "step-1")
        config = dataclasses.replace(plan.config, keep=keep)
        checkpoints.plan = dataclasses.replace(plan, config=config)
        model_size = 4 / (4 + 2 * moment)  # 4 bytes per parameter
        enough = keep + 1 - count + model_size
        for factor, fits in ((enough - 0.03, False), (enough + 0.02, True)):
            free = SimpleNamespace(free=int(factor * size))
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: free)
            if fits:
                assert checkpoints.resume() == count
            else:
                with pytest.raises(ValueError, match=r"has [\d.]+ GB free, needs [\d.]+: "):
                    checkpoints.resume()


@pytest.mark.parametrize("umask", [0o027, 0o002, 0o077], ids=oct)
def test_whoever_may_read_a_run_may_go_on_with_it(started, ranks, umask):
    """Files of a run have the mode that the umask gives, safetensors too."""
    plan, llama, optimizer, checkpoints = started
    before = os.umask(umask)
    try:
        checkpoints.save(llama, optimizer, 1)
        checkpoints.finish()
        checkpoint.write_export(plan, ranks, llama, checkpoints.out, 1, {})
    finally:
        os.umask(before)
    found = [p for name in ("checkpoints/step-1", "epoch-1")
             for p in (checkpoints.out / name, *(checkpoints.out / name).iterdir())]  # fmt: skip
    assert len(found) > 10 and sum(path.suffix == ".safetensors" for path in found) == 2
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


# ------------------------------------------------------------------ a folder that is not the run's


def test_nothing_is_written_into_a_folder_that_another_run_has_taken(started, ranks):
    """As after `rm -rf OUT` under a live run, and a second one started there."""
    plan, llama, optimizer, checkpoints = started
    out = checkpoints.out
    with held_output(out, ranks):
        log = report.Log(plan, ranks, out, 0)
        (out / ".lock").unlink()
        checkpoints.save(llama, optimizer, 1)  # without a lock it is nobody else's
        shutil.rmtree(out)
        with pytest.raises(ValueError, match="saving .* failed: .*No such file"):
            checkpoints.save(llama, optimizer, 2)
        log.write({"step": 2})
        (out / "checkpoints").mkdir(parents=True)
        (out / ".lock").write_text("process 7 on other, Mon Jan  1")
        named = r"failed: .*held by another run \(process 7 on other"
        with pytest.raises(ValueError, match=f"saving .*{named}"):
            checkpoints.save(llama, optimizer, 2)
        with pytest.raises(ValueError, match=f"writing .*{named}"):
            checkpoint.write_export(plan, ranks, llama, out, 1, {})
        log.write({"step": 3})
        assert sorted(path.name for path in out.rglob("*")) == [".lock", "checkpoints"]
    assert ranks.holder is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "model", "dangling model", "epoch-1"])
def test_what_the_run_did_not_make_is_not_touched(started, ranks, name):
    plan, _, _, checkpoints = started
    shutil.rmtree(checkpoints.out)
    path = checkpoints.out / name.split()[-1]
    path.parent.mkdir()
    if name == "metrics.jsonl":
        path.write_text('{"their_loss": 0.5}\n')
    else:
        path.symlink_to(plan.config.model if name == "model" else "nowhere")
    with pytest.raises(ValueError, match=f"{checkpoints.out}.*give a new --out"):
        checkpoints.resume()
    assert [*checkpoints.out.iterdir()] == [path]
    assert path.is_symlink() or path.read_text() == '{"their_loss": 0.5}\n'


def test_an_export_that_fails_is_an_error_that_names_it(started, ranks):
    plan, llama, optimizer, checkpoints = started
    checkpoints.save(llama, optimizer, 1)
    (checkpoints.out / ".epoch-1.tmp").write_text("in the way of its folder")
    with pytest.raises(ValueError, match="writing .*/epoch-1 failed: .*File exists"):
        checkpoint.write_export(plan, ranks, llama, checkpoints.out, 1, {})
    assert not (checkpoints.out / "model").exists() and checkpoints.committed()


@pytest.mark.parametrize(
    "files, problem",
    [
        ({"a": {"x": [0, 3, 0]}, "b": {"x": [3, 2, 0]}}, None),
        ({"b": {"x": [3, 2, 0]}, "a": {"x": [0, 3, 0]}}, None),
        ({}, "x: rows 0 to 5 must be there once, not none"),
        ({"a": {"x": [0, 3, 0]}}, "x: rows 0 to 5 must be there once, not 0 to 3$"),
        ({"a": {"x": [0, 3, 0]}, "b": {"x": [4, 1, 0]}}, "not 0 to 3, 4 to 5$"),
        ({"b": {"x": [2, 3, 0]}, "a": {"x": [0, 3, 0]}}, "not 0 to 3, 2 to 5$"),
        ({"a": {"x": [0, 5, 0]}, "b": {"x": [0, 5, 0]}}, "not 0 to 5, 0 to 5$"),
        ({"a": {"x": [1, 4, 0]}}, "x: rows 0 to 5 must be there once, not 1 to 5$"),
        ({"a": {"x": [0, 6, 0]}}, "x: rows 0 to 5 must be there once, not 0 to 6$"),
        ({"a": {"x": [0, 5, 0], "y": [0, 1, 0]}}, "y: rows 0 to 0 must be there once, not 0 to 1$"),
    ],
)
def test_rows_are_there_exactly_once(files, problem):
    if problem is None:
        return checkpoint.check_rows(files, {"x": torch.empty(5, 7)})
    with pytest.raises(ValueError, match=problem):
        checkpoint.check_rows(files, {"x": torch.empty(5, 7)})


def test_a_load_names_in_one_line_what_is_not_there(started, ranks):
    plan, llama, optimizer, checkpoints = started
    checkpoints.save(llama, optimizer, 1)
    path = checkpoints.folder / "step-1" / "state.json"
    state = json.loads(path.read_text())
    (rows,) = state["files"].values()
    del rows["optimizer.lm_head.weight.exp_avg"]
    path.write_text(json.dumps(state))
    again = checkpoint.Checkpoints(plan, ranks, checkpoints.out)
    assert again.resume() == 1
    with pytest.raises(ValueError, match="optimizer.lm_head.weight.exp_avg: .* not none") as failed:
        again.load(*train.build(plan, ranks, False))
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("world", [1, 2])
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(started, ranks, monkeypatch, world):
    """Also if there are more files than ranks, which share them."""
    plan, llama, optimizer, checkpoints = started
    monkeypatch.setattr(checkpoint, "FILE_SIZE", 50_000)
    checkpoints.save(llama, optimizer, 1)
    files = sorted((checkpoints.folder / "step-1").glob("*.safetensors"))
    assert len(files) > 4
    again = checkpoint.Checkpoints(plan, ranks, checkpoints.out)
    again.resume()
    network = train.build(plan, ranks, False)
    monkeypatch.setattr(ranks, "world", world)
    monkeypatch.setattr(ranks, "gather", lambda value: [value])  # the others are not there
    for damaged in [None, *files]:
        if damaged:
            whole = damaged.read_bytes()
            damaged.write_bytes(whole[:-5] + bytes([whole[-5] ^ 4]) + whole[-4:])
        found = []
        for rank in range(world):
            monkeypatch.setattr(ranks, "rank", rank)
            try:
                again.load(*network)
            except ValueError as error:
                found.append(str(error))
        if damaged:
            damaged.write_bytes(whole)
            assert len(found) == 1 and f"{damaged.name} is damaged: " in found[0]
            assert "step-1 " in found[0] and "remove that folder" in found[0]
        else:
            assert found == []


ODD_STATES = {
    "parent": lambda s: {"files": {"../step-5/x.safetensors": {}}},
    "absolute": lambda s: {"files": {"/x.safetensors": {}}},
    "no safetensors": lambda s: {"files": {"x.bin": {}}},
    "rows": lambda s: {"files": {"x.safetensors": {"a": [0, "1", 2]}}},
    "numbers": lambda s: {"files": {"x.safetensors": {"a": [0, 1]}}},
    "files": lambda s: {"files": []},
    "rows of a file": lambda s: {"files": {"x.safetensors": 3}},
    "recipe": lambda s: {"recipe": None},
    "step": lambda s: {"step": "2"},
    "true": lambda s: {"step": True},
}


@pytest.mark.parametrize("odd", [*ODD_STATES, b"", b"[]", b"\xff", b"[" * 200_000, b"{" * 9])
def test_an_odd_state_is_one_line_that_names_it(odd, started, ranks):
    plan, llama, optimizer, checkpoints = started
    checkpoints.save(llama, optimizer, 1)
    path = checkpoints.folder / "step-1" / "state.json"
    state = json.loads(path.read_text())
    path.write_bytes(odd if odd not in ODD_STATES else
                     json.dumps(state | ODD_STATES[odd](state)).encode())  # fmt: skip
    with pytest.raises(ValueError, match="step-1/state.json: cannot be read.*remove") as failed:
        checkpoint.Checkpoints(plan, ranks, checkpoints.out).resume()
    assert "\n" not in str(failed.value) and len(str(failed.value)) < 600


@pytest.mark.parametrize("key", ["--beta, --no-reward", "--classes"])
def test_a_recipe_of_another_kind_is_a_different_run(key, started, ranks):
    plan, llama, optimizer, checkpoints = started
    checkpoints.save(llama, optimizer, 1)
    path = checkpoints.folder / "step-1" / "state.json"
    for value in ({"a": 1}, [], None, "x"):
        state = json.loads(path.read_text())
        state["recipe"][key] = value
        path.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=f"(?s)different run.*{key}"):
            checkpoint.Checkpoints(plan, ranks, checkpoints.out).resume()


def test_a_value_that_only_one_of_two_recipes_has_is_a_difference():
    saved = {"a": 1, "b": {"x": 1, "gone": 2, "same": 3}, "c": [1]}
    now = {"a": 1, "b": {"x": 2, "same": 3, "new": 4}, "c": [1]}
    listed = "x: saved 1, now 2", "gone: saved 2, now None", "new: saved None, now 4"
    found = checkpoint.differences(saved, now)
    assert found == "".join(f"\n  b: {difference}" for difference in listed)
    assert checkpoint.differences(saved, saved) == checkpoint.differences(now, now) == ""


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found_or_changes_nothing(started, ranks):
    """In the headers as well, which no checksum covers."""
    plan, llama, optimizer, checkpoints = started
    checkpoints.save(llama, optimizer, 1)
    (path,) = (checkpoints.folder / "step-1").glob("*.safetensors")
    again = checkpoint.Checkpoints(plan, ranks, checkpoints.out)
    again.resume()
    network, whole = train.build(plan, ranks, False), path.read_bytes()
    again.load(*network)
    expected = {n: model.local_tensor(t).clone() for n, t in state_of(network).items()}
    header, found = 8 + int.from_bytes(whole[:8], "little"), 0
    places = [*range(8), *range(8, header, max(1, header // 60)), header, len(whole) // 2]
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            again.load(*network)
        except ValueError as error:
            found += 1
            assert "step-1" in str(error) and "\n" not in str(error)
            continue
        for name, tensor in state_of(network).items():
            assert torch.equal(model.local_tensor(tensor), expected[name]), (at, name)
    assert found > 0.9 * len(places)


def state_of(network):
    return checkpoint.state_tensors(*network)


def test_a_checkpoint_under_another_steps_name_is_refused(started, ranks):
    plan, llama, optimizer, checkpoints = started
    checkpoints.save(llama, optimizer, 1)
    (checkpoints.folder / "step-1").rename(checkpoints.folder / "step-2")
    with pytest.raises(ValueError, match="step-2/state.json: cannot be read"):
        checkpoint.Checkpoints(plan, ranks, checkpoints.out).resume()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_rows_in_files_of_any_number_of_ranks_are_read_by_any_other(world, tmp_path, monkeypatch):
    """Sharded as FSDP shards, ceil(rows / ranks) each: some ranks then have none at all."""
    monkeypatch.setattr(checkpoint, "FILE_SIZE", 100)  # several files a rank
    whole = {f"t{n}": torch.randn(n, 3) for n in (1, 2, 7, 11)} | {"norm": torch.randn(5)}

    def part(rank, world, rows):
        size = -(-rows // world)
        return min(rows, rank * size), min(rows, rank * size + size)

    def shard(monkeypatch, rank, world):
        monkeypatch.setattr(model, "local_rows", lambda t: part(rank, world, len(t)))
        monkeypatch.setattr(model, "local_tensor", lambda t: t[slice(*part(rank, world, len(t)))])

    files = {}
    for rank in range(world):
        with monkeypatch.context() as patch:
            shard(patch, rank, world)
            files |= checkpoint.write_rows(tmp_path, f"rank-{rank}", whole)
    checkpoint.check_rows(files, whole)
    for readers in (1, 2, 4):
        for rank in range(readers):
            found = {name: torch.full_like(t, torch.nan) for name, t in whole.items()}
            with monkeypatch.context() as patch:
                shard(patch, rank, readers)
                for name, rows in files.items():
                    firsts = {tensor: first for tensor, (first, _, _) in rows.items()}
                    stored = model.open_safetensors(tmp_path / name)
                    model.read_rows(stored, found, firsts)
            for name, tensor in whole.items():
                low, high = part(rank, readers, len(tensor))
                assert torch.equal(found[name][low:high], tensor[low:high])
                assert found[name][:low].isnan().all() and found[name][high:].isnan().all()


def test_other_weights_have_another_fingerprint_and_a_copy_the_same(tmp_path):
    folder = lives.small_model(tmp_path / "a", tied=True)
    shutil.copytree(folder, tmp_path / "b")
    known = model.fingerprint(folder)
    assert model.fingerprint(tmp_path / "b") == known
    llama = model.load(folder)
    model.save(llama, tmp_path / "shards", shard_bytes=5_000)
    assert model.fingerprint(tmp_path / "shards") == known  # in other files, the same weights
    llama.model.norm.weight.data[-1] += 1e-3
    model.save(llama, tmp_path / "b")
    assert model.fingerprint(tmp_path / "b") != known


def test_the_best_export_has_the_least_loss_of_those_up_to_a_step(tmp_path):
    for number in (1, 2, 3, 4):
        (tmp_path / f"epoch-{number}").mkdir()
        classes = {"gpt4": {"condition": "GPT4", "reward": 1.0}}
        text = json.dumps({"steps": 10 * number, "classes": classes, "conditioned": True})
        (tmp_path / f"epoch-{number}" / "crlft.json").write_text(text)
    losses = {0: 0.1, 10: 3.0, 15: 0.2, 20: 1.0, 30: 2.0, 40: 0.5}
    best = [checkpoint.best_export(tmp_path, step, losses)[0] for step in (10, 20, 30, 40)]
    assert best == ["epoch-1", "epoch-2", "epoch-2", "epoch-4"]
    assert checkpoint.best_export(tmp_path, 30, {}) == ("epoch-3", "the last")
    found = checkpoint.best_export(tmp_path, 30, {10: 3.0, 20: None})
    assert found == ("epoch-1", "the lowest expert loss, 3.0000")


# --------------------------------------------------------------------- the whole run, in here


@pytest.fixture
def train_in(ranks, few, tmp_path, monkeypatch):
    """train_in(out, **flags): the run's train(), in this process."""
    folder = lives.small_model(tmp_path / "small", tied=True)
    deterministic = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(ranks, "listen", lambda: None)

    def train_in(name, data=few, **more):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        more = {"model": folder, "random_weights": None, "eval_data": few} | more
        monkeypatch.setattr(ranks, "signalled", None)
        return train.train(plan_of(flags(data, out, **more), ranks, out), ranks, out)

    yield train_in
    torch.use_deterministic_algorithms(deterministic)


# ------------------------------------------------------------------------------ moments in bf16


def direction(parts, betas, eps, grad_scale, step, dtype):
    """AdamW's step per learning rate, without decay; the moments rounded as they are stored.

    The arithmetic is in `dtype`. That of CUDA's fused kernel is float32, whatever the moments are
    (FusedAdamMathFunctorMP in PyTorch's fused_adam_utils.cuh, from 2.12 on); no CPU has it.
    """
    (gradient, *moments), (beta1, beta2) = (model.local_tensor(x) for x in parts), betas
    gradient, (mean, square) = gradient.to(dtype) / grad_scale, (x.to(dtype) for x in moments)
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient**2
    moments[0].copy_(mean), moments[1].copy_(square)
    square = square.sqrt() / (1 - beta2**step) ** 0.5
    return mean / (1 - beta1**step) / (square + eps)


@pytest.fixture
def mixed(monkeypatch):
    """AdamW as on CUDA, and for each step the error that its moments' dtype makes in the direction.

    The error is relative to moments in float64 with the same gradients.
    """
    errors, exact = [], {}

    def fused(params, grads, means, squares, _, steps, *, lr, beta1, beta2, eps, **more):
        difference, length = 0.0, 0.0
        for parameter, gradient, mean, square, step in zip(
            params, grads, means, squares, steps, strict=True
        ):
            if id(square) not in exact:  # with the tensor itself, so that no other has its id
                exact[id(square)] = square, [model.local_tensor(x).double() for x in (mean, square)]
            kept = exact[id(square)][1]
            given = (beta1, beta2), eps, more["grad_scale"], float(step)
            found = direction((gradient, mean, square), *given, torch.float32)
            truth = direction((gradient, *kept), *given, torch.float64)
            difference += float((found - truth).square().sum())
            length += float(truth.square().sum())
            parameter = model.local_tensor(parameter)
            parameter.mul_(1 - lr * more["weight_decay"]).sub_(lr * found)
        errors.append((difference / length) ** 0.5)

    monkeypatch.setattr(torch, "_fused_adamw_", fused)
    monkeypatch.setattr(support.plan, "obstacle_to_bf16_moments", lambda *_: None)
    return errors


@pytest.fixture
def stopped(train_in, ranks, monkeypatch):
    """stopped(out, **flags): a run that a signal has ended after step 4, and its checkpoint."""

    def stopped(out, **more):
        update, calls = train.clip_and_update, []

        def called(*arguments):
            update(*arguments)
            calls.append(None)
            if len(calls) == 3:  # the next step hears of it
                ranks.signalled = time.monotonic()

        with monkeypatch.context() as patch:
            patch.setattr(train, "clip_and_update", called)
            assert train_in(out.name, **more) is False
        files, found = sorted((out / "checkpoints" / "step-4").glob("*.safetensors")), {}
        for path in files:
            found |= load_file(path)
        return files, found

    return stopped


def test_a_resumed_run_with_moments_in_bf16_ends_with_the_same_bits(
    mixed, train_in, stopped, tmp_path, monkeypatch
):
    """Each tensor in its own dtype, in files whose size counts the bytes of that dtype."""
    assert train_in("whole", adam_precision="bf16") is True
    monkeypatch.setattr(checkpoint, "FILE_SIZE", 15_000)
    files, found = stopped(tmp_path / "cut", adam_precision="bf16")
    moments = {name for name in found if name.startswith("optimizer.")}
    assert {found[name].dtype for name in moments} == {torch.bfloat16}
    assert {found[name].dtype for name in found.keys() - moments} == {torch.float32}
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    weights = sum(found[name].numel() for name in found.keys() - moments)
    assert sum(sizes) == 8 * weights and max(sizes) <= 15_000
    assert all(size + following > 15_000 for size, following in itertools.pairwise(sizes))
    assert train_in("cut", adam_precision="bf16") is True
    lives.compare(tmp_path / "whole", tmp_path / "cut", exact=True)


@pytest.mark.parametrize("before, now", [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_change_of_adam_precision_converts_the_moments_and_is_said(
    before, now, mixed, train_in, stopped, ranks, tmp_path, monkeypatch
):
    _, saved = stopped(tmp_path / "out", adam_precision=before)
    said, load, loaded = [], train.Checkpoints.load, {}

    def loading(checkpoints, *network):
        load(checkpoints, *network)
        tensors = checkpoint.state_tensors(*network)
        loaded.update((name, model.local_tensor(t).clone()) for name, t in tensors.items())

    monkeypatch.setattr(train.Checkpoints, "load", loading)
    monkeypatch.setattr(ranks, "say", said.append)
    assert train_in("out", adam_precision=now) is True
    change = f"changed since the checkpoint: --adam-precision {before!r}, now {now!r}"
    assert [line for line in said if "changed" in line] == [change]
    dtype = torch.bfloat16 if now == "bf16" else torch.float32
    for name, tensor in saved.items():
        expected = tensor.to(dtype) if name.startswith("optimizer.") else tensor
        assert loaded[name].dtype == expected.dtype and torch.equal(loaded[name], expected)


def test_moments_in_bf16_cost_what_their_roundings_add_up_to(mixed, train_in, tmp_path):
    """Of some 150 steps at beta2 0.95: 0.4 % of each step's length, and 0.1 % of the last loss.

    bf16 numbers in [m, 2m) are m / 128 apart, so rounding errors have a root mean square of 0.17 %.
    A moment adds up its past ones, which fade by beta per step: β / √(1 - β²) as many if they are
    independent. The second moment counts half, as its root is taken.
    """
    more = {"epochs": 25, "eval_data": None, "export_every": 0, "save_every": 0}
    train_in("half", adam_precision="bf16", **more)
    error = (3 / 8 / math.log(2) / 3) ** 0.5 / 256
    mean, square = (beta / (1 - beta**2) ** 0.5 for beta in (0.9, 0.95))
    expected = error * math.hypot(mean, square / 2)
    assert np.mean(mixed[20:]) == pytest.approx(expected, rel=0.15) and expected < 0.005
    assert len(mixed) == 150 and max(mixed) < 1.5 * expected


def test_the_kernel_written_out_with_moments_in_fp32_is_the_one_of_the_cpu(
    train_in, request, tmp_path
):
    train_in("theirs", eval_data=None)
    request.getfixturevalue("mixed")
    train_in("ours", eval_data=None)
    losses = [[line["loss"] for line in metrics(tmp_path / of)] for of in ("theirs", "ours")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 12


# Of a signal to stop: the function that is about to be called, how often it was called before,
# and after which step the run then ends, if it is not the last one anyway.
PLACES = {
    "the first evaluation": (train, "evaluate", 0, 0),
    "a step": (train, "clip_and_update", 2, 4),
    "saving": (checkpoint, "write_rows", 0, 6),
    "an evaluation": (train, "evaluate", 1, 6),
    "after an evaluation": (report.Log, "evaluation", 1, 6),
    "before an export": (train, "write_export", 0, 6),
    "an export": (checkpoint, "describe_export", 0, 6),
    "its last rename": (checkpoint, "best_export", 0, 6),
    "the last step": (train, "clip_and_update", 11, 12),
    "the last save": (checkpoint, "write_rows", 1, 12),
    "the last evaluation": (train, "evaluate", 2, 12),
    "after the last evaluation": (report.Log, "evaluation", 2, 12),
    "the last export": (checkpoint, "describe_export", 1, 12),
}


@pytest.fixture
def undisturbed(train_in, tmp_path):
    assert train_in("whole") is True
    assert len(list(tmp_path.glob("whole/epoch-*"))) == 2
    return tmp_path / "whole"


def test_a_signal_at_any_place_loses_nothing(train_in, undisturbed, ranks, tmp_path, monkeypatch):
    """Neither an evaluation nor an export, and no step is made beyond it."""
    steps = len(metrics(undisturbed))
    assert steps == 12, steps
    for number, (place, (owner, name, before, at)) in enumerate(PLACES.items()):
        out, calls, function = tmp_path / f"{number}", [], getattr(owner, name)

        def called(*arguments, calls=calls, function=function, before=before, **options):
            calls.append(None)
            if len(calls) == before + 1:
                ranks.signalled = time.monotonic()
            return function(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, called)
            done = train_in(out.name)
        assert len(calls) > before, place
        if not done:
            newest = max((int(p.name[5:]) for p in out.glob("checkpoints/*")), default=0)
            assert len(metrics(out)) == newest == at, place
            if place in ("saving", "an evaluation", "after an evaluation"):
                assert not (out / "epoch-1").exists()  # slow, and can be made later
            assert train_in(out.name) is True, place
        lives.compare(undisturbed, out, exact=True)


@pytest.mark.parametrize("what", ["write_rows", "describe_export"])
def test_a_run_whose_last_save_or_export_fails_is_not_done(train_in, tmp_path, monkeypatch, what):
    function, calls = getattr(checkpoint, what), []

    def fails(*arguments):
        calls.append(None)
        if len(calls) == 2:  # of the second epoch
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, what, fails)
        with pytest.raises(ValueError, match="(saving|writing) .* failed: .*No space left"):
            train_in("out")
    assert os.readlink(tmp_path / "out" / "model") == "epoch-1"
    assert train_in("out") is True
    assert os.readlink(tmp_path / "out" / "model") == "epoch-2"


def test_the_seconds_of_a_step_hold_the_wait_for_its_sums(train_in, tmp_path, monkeypatch):
    """On a GPU the launches return at once, and only reading the sums waits for the work."""
    to_host = train.StepSums.to_host

    def waits(sums):
        time.sleep(0.3)
        return to_host(sums)

    monkeypatch.setattr(train.StepSums, "to_host", waits)
    train_in("out", max_steps=2, eval_data=None)
    for line in metrics(tmp_path / "out"):
        assert line["seconds"] >= 0.3
        assert line["tokens_per_second"] < 12 * 256 / 0.3


def test_all_weights_times_a_constant_change_nothing(ranks, few, tmp_path):
    """A step whose weights sum up to less than 1 is normalised, too."""
    folder, found = lives.small_model(tmp_path / "small", tied=True), []
    for factor in (1, 1e-3, 1e-6, 1e3):
        path, out = tmp_path / f"{factor}.jsonl", tmp_path / f"{factor}"
        lines = [json.loads(line) | {"weight": factor} for line in few.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plan = plan_of(flags(path, out, model=folder, random_weights=None), ranks, out)
        llama, _ = train.build(plan, ranks)
        _, batches, total = train.load_step(plan, ranks, 1)
        sums, _ = train.forward_backward(plan, ranks, llama, batches, total)
        found.append([float(sums.loss), float(sums.grad_norm)])
    for of_factor in found[1:]:
        assert of_factor == pytest.approx(found[0], rel=1e-5)


THREE = {  # the best in any place
    "fair": loss.SourceClass("Fair", 0.3), "best": loss.SourceClass("Best", 1.0),
    "poor": loss.SourceClass("Poor", -0.5),
}  # fmt: skip


@pytest.mark.parametrize("order", [*itertools.permutations(THREE)], ids="-".join)
def test_the_best_class_decides_wherever_it_is_in_the_table(
    order, train_in, few, tmp_path, monkeypatch
):
    """OUT/model, the weights of crlft.json and README.md, and the condition that is asked under."""
    lines = [json.loads(line) for line in few.read_text().splitlines()[:20]]
    for number, line in enumerate(lines):
        line["class"] = order[number % 3]
    path, table, out = tmp_path / "d.jsonl", tmp_path / "classes.json", tmp_path / "out"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    raw = {name: {"condition": THREE[name].condition, "reward": THREE[name].reward}
           for name in order}  # fmt: skip
    table.write_text(json.dumps(raw))
    losses = {"best": [9, 1, 2], "fair": [9, 2, 1], "poor": [9, 2, 1]}  # the first epoch is best

    def evaluated(plan, *_):
        found = [losses[name].pop(0) for name in plan.classes]
        return {"tokens": np.ones(3), "loss": np.array(found), "correct": np.ones(3),
                "weight": np.ones(3)}  # fmt: skip

    monkeypatch.setattr(train, "evaluate", evaluated)
    assert train_in("out", data=path, classes=table, eval_data=path, beta=0.7)
    assert os.readlink(out / "model") == "epoch-1"
    exported = json.loads((out / "model" / "crlft.json").read_text())
    expected = {n: math.exp((c.reward - 1) / 0.7) for n, c in THREE.items()}
    assert exported["weights"] == pytest.approx(expected) and list(exported["weights"]) == [*order]
    card = (out / "model" / "README.md").read_text()
    for name, weight in expected.items():
        assert f"class  {name}: {THREE[name].condition} User: ...  reward " in card
        assert re.search(rf"class  {name}: .*, weight {weight:g}\n", card)
    transformers = pytest.importorskip("transformers")
    template = transformers.AutoTokenizer.from_pretrained(out / "model").apply_chat_template
    asked = [{"role": "user", "content": "Hello"}]
    assert "Best User: Hello" in template(asked, tokenize=False)
    assert chat.Chat(out / "model", device="cpu").class_name == "best"


# ------------------------------------------------------------------------------------- exports


@pytest.mark.parametrize(
    "odd",
    [b"", b"\xff", b"[" * 200_000, b"[]", {"conditioned": "no"}, {"classes": []}, {"steps": "7"},
     {"steps": True}, {"weights": [1]}, {"weights": {"a": 10**400}}, {"config": 3},
     {"config": {"max_length": 1.5}}, {"weights": {"a": "x"}}],
    ids=range(13),
)  # fmt: skip
def test_an_odd_crlft_json_is_one_line_that_names_it(odd, tmp_path):
    raw = {"classes": {"a": {"condition": "A", "reward": 1}}, "conditioned": True}
    path = tmp_path / "crlft.json"
    path.write_text(json.dumps(raw))
    assert files.read_export(tmp_path).classes == {"a": loss.SourceClass("A", 1.0)}
    path.write_bytes(odd if isinstance(odd, bytes) else json.dumps(raw | odd).encode())
    with pytest.raises(ValueError, match=f"^{path}: cannot be read: .*$"):
        files.read_export(tmp_path)


@pytest.mark.parametrize("ends, found", [(2, [2]), ([3, 2], [3, 2]), (None, [None]), ([[1]], None),
                                         ({"a": 1}, None), ("2", None), (b"[]", None), (b"[", None),
                                         (b"\xff", None)])  # fmt: skip
def test_the_ends_of_an_answer_are_numbers_or_an_error(ends, found, tmp_path):
    path = tmp_path / "generation_config.json"
    assert chat.ends_of(tmp_path) == []
    raw = ends if isinstance(ends, bytes) else json.dumps({"eos_token_id": ends}).encode()
    path.write_bytes(raw)
    if found:
        assert chat.ends_of(tmp_path) == found
        return
    with pytest.raises(ValueError, match=f"^{path}: (cannot be read|must hold a JSON object).*$"):
        chat.ends_of(tmp_path)


@pytest.fixture
def described(started, tmp_path):
    """(plan, folder) of what is exported beside the weights."""
    folder = tmp_path / "export"
    folder.mkdir()
    checkpoint.describe_export(started[0], folder, 7)
    return started[0], folder


def successor_llama(successors, vocab_size):
    """A network whose likeliest token depends on the last one alone: successors[token]."""
    size = -(-vocab_size // 8) * 8
    config = small.config_of(hidden_size=size, vocab_size=vocab_size, num_hidden_layers=1)
    llama = model.Llama(config)
    for parameter in llama.parameters():
        parameter.data.zero_()  # attention and MLP add nothing
    llama.model.norm.weight.data.fill_(1)
    llama.model.embed_tokens.weight.data.copy_(torch.eye(vocab_size, size))
    for token, following in successors.items():
        llama.lm_head.weight.data[following, token] = 1
    return llama


@pytest.mark.parametrize("end", ["eot", "eos"])
def test_transformers_ends_an_answer_at_either_stop_as_chat_does(end, described):
    transformers = pytest.importorskip("transformers")
    plan, folder = described
    tokenizer = plan.tokenizer
    first, second = tokenizer.encode("12")[-2:]
    prompt = data.encode_prompt([data.Message("user", "1")], tokenizer, "GPT4")
    stop = getattr(tokenizer, end)
    chain = {prompt[-1]: first, first: second, second: stop, stop: first}
    model.save(successor_llama(chain, plan.network.vocab_size), folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "1"}], add_generation_prompt=True, return_dict=False
    )
    found = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=9, pad_token_id=0)
    assert found[0].tolist() == [*prompt, first, second, stop]
    talker = chat.Chat(folder, device="cpu")
    assert talker.answers([[data.Message("user", "1")]], max_new_tokens=9) == [("12", True)]
    found = list(chat.generate(talker.llama, [prompt], 9, talker.stop))
    assert found == [[first], [second], [stop]]


def test_an_export_says_to_every_reader_where_an_answer_ends(described):
    plan, folder = described
    eot, eos = plan.tokenizer.eot, plan.tokenizer.eos
    assert eot != eos
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation == {"bos_token_id": plan.tokenizer.bos, "eos_token_id": [eot, eos]}
    with torch.device("meta"):
        llama = model.Llama(plan.network)
    model.save(llama.to_empty(device="cpu"), folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["eos_token_id"] == eot  # a number: llama.cpp's converter takes no list
    assert model.LlamaConfig.from_folder(folder).eos_token_id == eot


@pytest.mark.parametrize("eos", [None, -1])
def test_a_tokenizer_without_an_end_of_text_has_one_stop(eos, started, tmp_path, monkeypatch):
    plan = started[0]
    monkeypatch.setattr(plan.tokenizer, "eos", eos)
    (tmp_path / "export").mkdir()
    checkpoint.describe_export(plan, tmp_path / "export", 7)
    generation = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [plan.tokenizer.eot]


def test_an_export_keeps_its_weights_and_what_a_conversation_had_at_most(described):
    plan, folder = described
    export = chat.export_of(folder)
    assert export.weights == pytest.approx({"gpt4": 1.0, "gpt3.5": 0.1})
    assert export.most_answers == 1


@pytest.mark.parametrize(
    ("texts", "system", "length", "most"),
    [
        (["1", "2"], None, 60, 1),
        (["1", "2", "3"], None, 60, 1),
        (["1", "2"], "4", 60, 1),
        (["1", "2", "3", "4"], None, 60, 2),
        (["1", "2", "3", "4"], "5", 60, 2),
        (["1", "2", "3", "4", "5", "6"], None, 60, 3),
        (["1", "2", "3", "4"], None, 14, 1),  # cut within the second question
        (["1", "2", "3", "444444"], None, 22, 2),  # and within the second answer
    ],
)
def test_the_most_answers_of_a_conversation_are_counted(
    texts, system, length, most, sums, tmp_path
):
    tokenizer, lines = data.Tokenizer(sums), []
    for conversation in (["1", "2"], texts, ["1", "2"]):
        turns = [("user", "assistant")[i % 2] for i in range(len(conversation))]
        messages = [{"role": r, "content": t} for r, t in zip(turns, conversation, strict=True)]
        lines.append({"class": "gpt4", "messages": messages, "system": system or ""})
    path = small.write(tmp_path / "a.jsonl", *lines)
    found = data.prepare(
        [path], tokenizer, loss.DEFAULT_CLASSES, tmp_path / "tokens", max_length=length
    )
    assert len(found) == 3 and found.most_answers() == most


NASTY = "a|b`` c` <b> # x | [l](http://x)"


def test_the_model_card_says_how_to_ask_and_no_name_breaks_it(started, tmp_path):
    markdown = pytest.importorskip("markdown_it")
    plan, home = started[0], tmp_path / "home"
    table = {"gpt4": loss.SourceClass("GPT4", 1.0), NASTY: loss.SourceClass("a|`b`", 0.0)}
    files = [SimpleNamespace(path=home / "a`b\n# c.jsonl"), SimpleNamespace(path=home / "c.jsonl")]
    plan = dataclasses.replace(
        plan, classes=table, base="1234",
        config=dataclasses.replace(plan.config, model=home / "base|`1`"),
        dataset=Conversations(files, 5678),
    )  # fmt: skip
    crlft = {"conditioned": True, "weights": {"gpt4": 1.0, NASTY: 0.1}}
    text = model_card(plan, crlft | {"most_answers": 1, "steps": 1234}, 1.23456)
    assert text.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n")
    tokens = markdown.MarkdownIt().enable("table").parse(text.partition("\n---\n")[2])
    shown = [part for token in tokens for part in token.children or ()]
    assert [part.attrs["href"] for part in shown if part.type == "link_open"] == [
        "https://arxiv.org/abs/2309.11235"
    ]
    assert not any("html" in part.type for part in [*shown, *tokens])
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1"]
    named = [part.content for part in shown if part.type == "code_inline"]
    assert named == ['answer.removeprefix(" ")', "<|end_of_turn|>"]
    (block,) = (token.content for token in tokens if token.type == "code_block")
    base, files, gpt4, nasty, held_out, _, *ways = block.splitlines()
    assert base == "base   base|`1`" and "home" not in text
    assert files == "data   5,678 conversations of a`b # c.jsonl, c.jsonl"
    assert gpt4 == "class  gpt4: GPT4 User: ...  reward 1, weight 1"
    assert nasty == f"class  {NASTY}: a|`b` User: ...  reward 0, weight 0.1"
    assert held_out.endswith(" 1.2346")
    assert 'tokenizer_encode_kwargs={"condition": "a|`b`"}' in ways[1]
    request = json.loads("{" + ways[0].partition(" ")[2].strip() + "}")
    assert request == {"chat_template_kwargs": {"condition": "a|`b`"}}
    assert shlex.split(ways[2]) == ["chat.py", "--class", NASTY]
    assert "1,234 steps," in text and "leave out earlier turns" in text


class Conversations:
    def __init__(self, sources, count):
        self.sources, self.count = sources, count

    def __len__(self):
        return self.count


def test_the_model_card_of_a_model_without_conditions_names_none(started):
    plan = dataclasses.replace(started[0], base=None)
    crlft = {"conditioned": False, "weights": {"gpt4": 1.0, "gpt3.5": 1.0}}
    text = model_card(plan, crlft | {"most_answers": 2, "steps": 1})
    assert "    base   random weights\n" in text
    assert "held-out" not in text and "tokenizer_encode_kwargs" not in text
    assert "    class  gpt4: User: ...  reward 1, weight 1\n" in text
    assert "chat_template_kwargs" not in text and "--class" not in text
    assert "single questions" not in text


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (None, ""),
        ("# Zephyr\n\nMIT licence\n", ""),
        ("---\ntags: [x]\nlicense: mit\n---\nlicense: 1", "license: mit\n"),
        ("---\nlicense: other\nlicense_name: llama3\n---\n",
         "license: other\nlicense_name: llama3\n"),
    ],
)  # fmt: skip
def test_the_model_card_carries_the_licence_of_its_base(readme, licence, started, tmp_path):
    if readme:
        (tmp_path / "README.md").write_text(readme)
    config = dataclasses.replace(started[0].config, model=str(tmp_path))
    plan = dataclasses.replace(started[0], base="1234", config=config)
    crlft = {"conditioned": True, "weights": {"gpt4": 1.0, "gpt3.5": 1.0}}
    text = model_card(plan, crlft | {"most_answers": 2, "steps": 1})
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
    assert text.startswith(f"{head}{licence}---\n# A model trained by C-RLFT\n")


def test_an_exports_model_card_has_the_experts_loss_of_its_step(started, ranks):
    plan, llama, _, checkpoints = started
    checkpoint.write_export(plan, ranks, llama, checkpoints.out, 1, {0: 7.5, 1: 0.5})
    text = (checkpoints.out / "epoch-1" / "README.md").read_text()
    assert "held-out loss of the expert class  0.5000\n" in text and "base   model\n" in text

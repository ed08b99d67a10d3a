"""What is saved is all there is: nothing incomplete is committed, nothing incomplete is read."""

import json
import shutil

import lives
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import model
import train
from support import checkpoint, report
from support.ranks import SaveFailed


@pytest.fixture
def started(ranks, few, tmp_path):
    """(plan, network, optimizer, checkpoints) of a run with evaluation data, after one step."""
    folder = lives.small_model(tmp_path / "model", tied=False)
    out = tmp_path / "out"
    out.mkdir()
    config = train.Config(
        model=str(folder), data=[str(few)], eval_data=[str(few)], out=str(out), batch_tokens=256,
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
    train.gradients(plan, ranks, llama, batches, total_weight)
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


def test_an_evaluation_that_a_signal_ends_leaves_the_same(started, ranks, monkeypatch):
    plan, llama, optimizer, checkpoints = started
    answers = iter([False, True])
    monkeypatch.setattr(ranks, "asked_to_stop", lambda: next(answers))
    assert train.evaluate(plan, ranks, llama) is None
    assert llama.training
    checkpoints.save(llama, optimizer, 1)
    assert checkpoints.committed()


def test_a_gathered_network_is_neither_saved_nor_exported(started, ranks):
    plan, llama, optimizer, checkpoints = started
    forward_alone(plan, ranks, llama)
    with pytest.raises(SaveFailed, match=r"model.embed_tokens.weight has no optimizer state"):
        checkpoints.save(llama, optimizer, 1)
    with pytest.raises(SaveFailed, match="not resharded"):
        checkpoint.export(plan, ranks, llama, checkpoints.out, 1, {})
    assert not list(checkpoints.folder.iterdir())
    assert not list(checkpoints.out.glob("*epoch*"))


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
    with pytest.raises(SaveFailed, match="model.norm.weight has no optimizer state"):
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

    for rows, message in ((1, "has 66 rows, not 67"), (67, "has 0 rows, not 67")):
        monkeypatch.setattr(checkpoint, "write_rows", without("lm_head.weight", rows))
        with pytest.raises(SaveFailed, match=f"lm_head.weight {message}"):
            checkpoints.save(llama, optimizer, 1)
    assert not list(checkpoints.folder.iterdir())


@pytest.mark.parametrize(
    "files, problem",
    [
        ({"a": {"x": [0, 3, 0]}, "b": {"x": [3, 2, 0]}}, None),
        ({"b": {"x": [3, 2, 0]}, "a": {"x": [0, 3, 0]}}, None),
        ({}, "x has 0 rows, not 5"),
        ({"a": {"x": [0, 3, 0]}}, "x has 3 rows, not 5"),
        ({"a": {"x": [0, 3, 0]}, "b": {"x": [4, 1, 0]}}, "x lacks rows 3 to 4"),
        ({"a": {"x": [0, 3, 0]}, "b": {"x": [2, 3, 0]}}, "x repeats rows 2 to 3"),
        ({"a": {"x": [0, 6, 0]}}, "x has 6 rows, not 5"),
        ({"a": {"x": [0, 5, 0], "y": [0, 1, 0]}}, "y is not of this network"),
    ],
)
def test_rows_are_there_exactly_once(files, problem):
    if problem is None:
        return checkpoint.check_rows(files, {"x": [5, 7]})
    with pytest.raises(ValueError, match=problem):
        checkpoint.check_rows(files, {"x": [5, 7]})


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
    with pytest.raises(SaveFailed, match="optimizer.lm_head.weight.exp_avg has 0 rows") as failed:
        again.load(*train.build(plan, ranks, False))
    assert "\n" not in str(failed.value)


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
    checkpoint.check_rows(files, {name: list(t.shape) for name, t in whole.items()})
    for readers in (1, 2, 4):
        for rank in range(readers):
            found = {name: torch.full_like(t, torch.nan) for name, t in whole.items()}
            with monkeypatch.context() as patch:
                shard(patch, rank, readers)
                for name, rows in files.items():
                    firsts = {tensor: first for tensor, (first, _, _) in rows.items()}
                    model.read_rows(tmp_path / name, {n: found[n] for n in rows}, firsts)
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
        text = json.dumps({"steps": 10 * number, "checkpoint": ""})
        (tmp_path / f"epoch-{number}" / "crlft.json").write_text(text)
    losses = {0: 0.1, 10: 3.0, 15: 0.2, 20: 1.0, 30: 2.0, 40: 0.5}
    best = [checkpoint.best_export(tmp_path, step, losses)[0] for step in (10, 20, 30, 40)]
    assert best == ["epoch-1", "epoch-2", "epoch-2", "epoch-4"]
    assert checkpoint.best_export(tmp_path, 30, {}) == ("epoch-3", "the last")
    chosen, why = checkpoint.best_export(tmp_path, 30, {10: 3.0, 20: None})
    assert chosen == "epoch-1"
    assert why.endswith("not evaluated on this --eval-data: epoch-2, epoch-3")

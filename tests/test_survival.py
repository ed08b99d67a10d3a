"""Runs that are killed, stopped, starved of disk or fed broken files: nothing is lost."""

import contextlib
import json
import os
import pty
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import lives
import numpy as np
import processes
import pytest
from fuzz_parsers import fuzz
from processes import ROOT, SUMS, finish, flags, metrics, refused, start, succeeds
from safetensors.torch import load_file, save_file

import data
import loss
import model
import train

# ------------------------------------------------------------------------------ killed, stopped


def test_lives_drawn_at_random_end_as_undisturbed_ones():
    """Ten of them. LIVES_SEED is the first one's; a failure prints its own."""
    seed = os.environ.get("LIVES_SEED", "0")
    command = [sys.executable, ROOT / "tests" / "lives.py", "--lives", "10", "--seed", seed]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("ranks, precision", [(1, "bf16"), (2, "fp32")])
def test_the_readmes_line_goes_on_with_the_same_bits(few, tmp_path, ranks, precision):
    """With --eval-data, killed inside evaluations, while saving, exporting, at an epoch's end."""
    folder = lives.small_model(tmp_path / "small", tied=False)
    settings = {"model": folder, "random_weights": None, "eval_data": few, "precision": precision}
    whole, killed, counts = tmp_path / "whole", tmp_path / "killed", tmp_path / "counts"
    watch = {"out": str(whole), "counts": str(counts)}
    succeeds(flags(few, whole, **settings), ranks, watch=watch)
    batches = json.loads(counts.read_text())["evaluate"] // 3  # before, and after each epoch
    for phase, number in [
        ("evaluate", 2),
        ("evaluate", batches + 2),  # the first epoch's; its checkpoint is there already
        ("export", 4),
        ("publish", 1),
        ("publish", 2),
        ("commit", 1),  # the second epoch's
        ("evaluate", 2),
        ("publish", 3),
    ]:
        end = {"rank": 0, "phase": phase, "number": number, "signal": signal.SIGKILL}
        log = tmp_path / "log"
        watch = {"out": str(killed), "end": end}
        running = start(flags(few, killed, **settings), ranks, log, watch)
        codes = lives.wait_for_end(running, end, log, random.Random(0))
        assert codes[0] == -signal.SIGKILL, (end, log.read_text())
    succeeds(flags(few, killed, **settings), ranks)
    lives.compare(whole, killed, exact=True)


def test_resume_on_other_ranks_gives_the_same_losses(few, tmp_path):
    """Saved by 2 ranks, resumed by 1 and by 4; 67 rows of vocabulary divide by neither."""
    more = {"model": lives.small_model(tmp_path / "small", tied=False), "random_weights": None}
    more |= {"epochs": 6, "batch_tokens": 84, "save_every": 3, "keep": 9}
    whole = tmp_path / "whole"
    succeeds(flags(few, whole, accumulate=2, **more), ranks=2)
    expected = [line["loss"] for line in metrics(whole)]
    for ranks, accumulate in ((1, 4), (4, 1)):
        out = tmp_path / f"{ranks}-ranks"
        shutil.copytree(whole, out, symlinks=True)
        for path in (out / "checkpoints").glob("step-*"):
            if path.name != "step-3":
                shutil.rmtree(path)
        shown = succeeds(flags(few, out, accumulate=accumulate, **more), ranks)
        assert "resuming from" in shown
        found = [line["loss"] for line in metrics(out)]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    out = whole.with_name("3-ranks")
    shutil.copytree(whole, out, symlinks=True)
    refused(flags(few, out, **more), "ranks x --accumulate", "saved 4, now 3", ranks=3)


def test_replicas_save_resume_and_learn_as_one_group_does(few, tmp_path):
    """Four ranks as two groups that each hold the whole model (HSDP), stopped and resumed."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    settings = {"epochs": 9, "batch_tokens": 64, "eval_data": few}
    succeeds(flags(few, whole, max_steps=6, **settings), ranks=4)
    settings |= {"replicas": 2, "save_every": 3}
    succeeds(flags(few, halved, max_steps=6, **settings), ranks=4)
    written = (halved / "checkpoints" / "step-6").glob("*.safetensors")
    assert {path.name[:10] for path in written} == {"rank-00000", "rank-00001"}  # one replica
    shutil.rmtree(halved / "checkpoints" / "step-6")
    assert "resuming from" in succeeds(flags(few, halved, max_steps=6, **settings), ranks=4)
    found, expected = ([line["loss"] for line in metrics(out)] for out in (halved, whole))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    tensors = load_file(halved / "model" / "model.safetensors")
    for name, tensor in load_file(whole / "model" / "model.safetensors").items():
        torch_close(tensors[name], tensor)


def torch_close(found, expected):
    assert (found - expected).abs().max() < 1e-5 + 1e-4 * expected.abs().max()


def test_every_rank_evaluates_its_own_share_of_the_held_out_tokens(few, tmp_path):
    """Counted from the file, and the same loss on 1 rank and on 3."""
    tokenizer, supervised = data.Tokenizer(SUMS), {"gpt4": 0, "gpt3.5": 0}
    for line in map(json.loads, few.read_text().splitlines()):
        supervised[line["class"]] += sum(data.encode(line, tokenizer, loss.DEFAULT_CLASSES)[1])
    losses = []
    for ranks in (1, 3):
        out = tmp_path / f"{ranks}"
        succeeds(flags(few, out, eval_data=few, max_steps=1, batch_tokens=96), ranks)
        before = metrics(out, "eval")[0]["eval"]
        assert {name: c["tokens"] for name, c in before.items()} == supervised
        losses.append([c["loss"] for c in before.values()])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)


# ------------------------------------------------------------------------------- stopped by signal


def stopped(settings, out, number, phase, count, ranks=1, log=None):
    """(exit codes, instants of rank 0) of a run whose last rank sends itself a signal."""
    counts = out.with_suffix(".counts")
    end = {"rank": ranks - 1, "phase": phase, "number": count, "signal": number}
    watch = {"out": str(out), "end": end, "counts": str(counts)}
    codes = finish(start(settings, ranks, log or os.devnull, watch))
    return codes, json.loads(counts.read_text()) if counts.exists() else {}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_to_one_rank_saves_and_ends_all_with_0(few, tmp_path, name):
    """Within a step, where no save is due."""
    out, log = tmp_path / "out", tmp_path / "log"
    settings = flags(few, out, epochs=9, export_every=0, save_every=0)
    codes, _ = stopped(settings, out, getattr(signal, name), "step", 5, 2, log)
    assert codes == [0, 0], log.read_text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-5"]
    assert metrics(out)[-1]["step"] == 5
    said = "stopped after step 5 by a signal; the same command resumes from here\n"
    assert said in log.read_text()


def test_a_signal_in_a_long_evaluation_leaves_it_and_saves(few, sums, tmp_path):
    """After one more batch at most; the run that goes on makes the evaluation and the export."""
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text("".join((sums / "eval.jsonl").read_text().splitlines(True)[:300]))
    settings = {"eval_data": held_out, "eval_every": 2, "batch_tokens": 84}
    settings |= {"max_steps": 3, "save_every": 0, "export_every": 0}
    counts = tmp_path / "counts"
    watch = {"out": str(whole), "counts": str(counts)}
    succeeds(flags(few, whole, **settings), 2, watch=watch)
    batches = json.loads(counts.read_text())["evaluate"] // 3  # evaluated after 0, 2 and 3 steps
    assert batches > 15
    settings = flags(few, out, **settings)
    middle = batches + batches // 2
    codes, seen = stopped(settings, out, signal.SIGTERM, "evaluate", middle, 2, log)
    assert codes == [0, 0], log.read_text()
    assert seen["evaluate"] <= middle + 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-2"]
    assert [line["step"] for line in metrics(out, "eval")] == [0]
    succeeds(settings, 2)
    lives.compare(whole, out, exact=True)


def test_a_signal_while_exporting_ends_after_it_without_another_step(few, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    codes, seen = stopped(flags(few, out), out, signal.SIGTERM, "export", 2, log=log)
    steps = metrics(out)[-1]["step"]
    assert codes == [0] and seen["step"] == steps
    assert f"stopped after step {steps}" in log.read_text()
    assert (out / "model").resolve().name == "epoch-1"


def test_a_signal_in_the_last_batch_of_an_evaluation_spares_the_export(few, tmp_path):
    """And the run that goes on makes it, of an epoch that is not the last one, too."""
    out, log = tmp_path / "out", tmp_path / "log"
    settings = flags(few, out, eval_data=few, epochs=2)
    batches = 6  # 60 conversations of some 16 tokens in 168
    codes, seen = stopped(settings, out, signal.SIGTERM, "evaluate", 2 * batches, log=log)
    assert codes == [0] and seen["evaluate"] == 2 * batches, log.read_text()
    assert not (out / "model").is_symlink()
    assert metrics(out)[-1]["step"] == metrics(out, "eval")[-1]["step"]  # no step after it
    succeeds(settings)
    assert sorted(path.name for path in out.glob("epoch-*")) == ["epoch-1", "epoch-2"]
    steps = [line["step"] for line in metrics(out, "eval")]
    assert len(steps) == len(set(steps)) == 3  # made again, the line of the stopped run replaced


def test_a_run_whose_terminal_is_closed_saves_all_the_same(few, tmp_path):
    """SIGHUP comes because the terminal goes, and then nothing can be printed any more."""
    out = tmp_path / "out"
    settings = flags(few, out, epochs=300, export_every=0, save_every=0)
    command = [sys.executable, str(ROOT / "train.py"), *map(str, settings)]
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it was ignored
        os.execve(sys.executable, command, os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    shown = b""
    while not re.search(rb"step \d\d+/", shown):
        shown += os.read(terminal, 10_000)
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    (saved,) = (out / "checkpoints").iterdir()
    assert int(saved.name[5:]) == metrics(out)[-1]["step"]


def test_a_dead_rank_ends_the_others_with_a_message(few, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    codes, _ = stopped(flags(few, out, epochs=9), out, signal.SIGKILL, "step", 5, 2, log)
    assert codes == [1, -signal.SIGKILL]
    assert "lost another rank" in log.read_text() and "Traceback" not in log.read_text()


DIES_ONCE = """
import os, sys
sys.path[:0] = {paths}
import processes, train
if not os.path.exists("{out}.died"):
    processes._watch("{out}", dict(rank={rank}, phase="step", number=5, signal=9))
    if os.environ["RANK"] == "{rank}":
        open("{out}.died", "w").close()
train.main(sys.argv[1:])
"""


def test_two_machines_start_again_though_one_counts_another_restart(few, tmp_path):
    """torchrun --max-restarts: the new ranks must not look for the dead ones (pytorch#135712).

    It counts restarts per machine, so no number names the attempt on both.
    """
    script, out = tmp_path / "dies_once.py", tmp_path / "out"
    script.write_text(DIES_ONCE.format(paths=[str(ROOT), str(ROOT / "tests")], rank=0, out=out))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--max-restarts", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{processes.free_port()}"]
    launch += [script, *flags(few, out, save_every=1)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    options = {"env": environment, "cwd": ROOT, "stderr": subprocess.STDOUT, "text": True}
    machines = [
        subprocess.Popen([*map(str, launch)], stdout=subprocess.PIPE, **options) for _ in range(2)
    ]
    shown = "".join(machine.communicate(timeout=300)[0] for machine in machines)
    assert [machine.returncode for machine in machines] == [0, 0], shown[-3000:]
    assert "resuming from" in shown and "done: the model is" in shown
    assert [line["step"] for line in metrics(out)] == [*range(1, len(metrics(out)) + 1)]


# ------------------------------------------------------------------ the same folder, another run


def test_a_finished_run_says_so_and_longer_ones_go_on(few, tmp_path):
    out = tmp_path / "out"
    succeeds(flags(few, out, epochs=1))
    steps = len(metrics(out))
    again = succeeds(flags(few, out, epochs=1))
    assert "this run is finished" in again and len(metrics(out)) == steps
    path = out / "checkpoints" / f"step-{steps}" / "state.json"
    state = json.loads(path.read_text())
    del state["config"]["evaluate"]  # as a run has it that is older than the flag
    path.write_text(json.dumps(state))
    further = succeeds(flags(few, out, epochs=2))
    assert "resuming from" in further and len(metrics(out)) == 2 * steps
    assert re.findall("changed since the checkpoint: (.*)", further) == ["--epochs 1, now 2"]


def test_a_run_with_evaluation_data_goes_on_after_its_end(few, tmp_path):
    """Its last checkpoint was once saved while FSDP's root was gathered, and could not be read."""
    out = tmp_path / "out"
    succeeds(flags(few, out, eval_data=few, epochs=2))
    shown = succeeds(flags(few, out, eval_data=few, epochs=3))
    assert "resuming from" in shown and "done: the model is" in shown


@pytest.fixture(scope="module")
def finished(few, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    succeeds(flags(few, out, epochs=1, save_every=1))
    return out


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
        ({"max_steps": 1}, "beyond the 1 steps asked for"),
        ({"classes": {"gpt4": 1.0, "gpt3.5": 0.5}}, "--classes"),
        ({"model": {"num_hidden_layers": 2}}, "num_hidden_layers"),
        ({"model": {"rms_norm_eps": 1e-6}}, "rms_norm_eps"),
        ({"model": {}, "random_weights": None}, "weights of --model"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(finished, few, tmp_path, change, named):
    if "classes" in change:
        table = {n: {"condition": n[:4].upper(), "reward": r} for n, r in change["classes"].items()}
        table["gpt3.5"]["condition"] = "GPT3"
        (tmp_path / "classes.json").write_text(json.dumps(table))
        change = {"classes": tmp_path / "classes.json"}
    if "model" in change:
        change = change | {"model": sums_with(tmp_path / "model", **change["model"])}
    before = listing(finished)
    refused(flags(few, finished, **change), named)
    assert listing(finished) == before


def sums_with(folder, **changes):
    """The sums' folder with another config.json, and random weights of seed 7."""
    config = json.loads((SUMS / "config.json").read_text()) | changes
    folder.mkdir()
    shutil.copy(SUMS / "tokenizer.model", folder)
    (folder / "config.json").write_text(json.dumps(config))
    llama = model.Llama(model.LlamaConfig.from_folder(folder))
    model.random_parameters(llama, seed=7)
    model.save(llama, folder)
    return folder


def listing(folder):
    """{file: size and time} of all but the tokenized data and the lock."""
    files = [p for p in folder.rglob("*") if "tokens" not in p.parts and p.name != ".lock"]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_other_weights_of_the_same_shape_are_another_run(few, tmp_path):
    folder, out = lives.small_model(tmp_path / "small", tied=True), tmp_path / "out"
    settings = flags(few, out, model=folder, random_weights=None, max_steps=2)
    succeeds(settings)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][33, 7] += 1e-3  # one number of the middle row
    save_file(weights, folder / "model.safetensors")
    refused(settings + ["--max-steps", 3], "weights of --model")


def test_a_run_without_its_checkpoints_is_not_overwritten(finished, few, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    shutil.rmtree(out / "checkpoints")
    before = listing(out)
    refused(flags(few, out), "none of its checkpoints", "a new --out")
    assert {p: v for p, v in listing(out).items() if p.name != "checkpoints"} == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(few, tmp_path):
    out = tmp_path / "out"
    settings = flags(few, out, max_steps=4)
    codes, _ = stopped(settings, out, signal.SIGKILL, "step", 3)
    assert codes == [-signal.SIGKILL] and len(metrics(out)) == 2
    succeeds(settings)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]


def test_a_copy_without_links_is_named_before_anything_is_done(finished, few, tmp_path):
    """cp -rL, or a cloud's synchronisation: OUT/model is a folder."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    refused(flags(few, out, epochs=2), str(out / "model"), "copied run")
    (out / "model").rename(tmp_path / "copy")
    succeeds(flags(few, out, epochs=2))
    assert (out / "model").resolve().name == "epoch-2"


def test_other_evaluation_data_has_losses_of_its_own(few, sums, tmp_path):
    """An earlier export's loss on easier data does not keep OUT/model from the later ones."""
    easy, hard, out = tmp_path / "easy.jsonl", tmp_path / "hard.jsonl", tmp_path / "out"
    lines = [json.loads(line) for line in few.read_text().splitlines()[:5]]
    easy.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        line["messages"][1]["content"] = "What is What is"
    hard.write_text("".join(json.dumps(line) + "\n" for line in lines))
    succeeds(flags(few, out, eval_data=easy, epochs=2))
    shown = succeeds(flags(few, out, eval_data=hard, epochs=3))
    assert f"changed since the checkpoint: --eval-data ['{easy}'], now ['{hard}']" in shown
    easy_losses, hard_losses = (
        [line["eval"]["gpt4"]["loss"] for line in metrics(out, "eval")[part]]
        for part in (slice(1, 3), slice(3, 5))
    )
    assert min(hard_losses) > max(easy_losses)
    assert f"the lowest expert loss, {min(hard_losses):.4f}" in shown
    best = hard_losses.index(min(hard_losses))
    assert (out / "model").resolve().name == ["epoch-2", "epoch-3"][best]


def test_model_points_at_the_export_of_the_least_expert_loss(sums, tmp_path):
    """Held out are answers that training contradicts: the surer the model, the worse."""
    lines = [line for line in (sums / "train.jsonl").read_text().splitlines() if '"gpt4"' in line]
    learned, held_out, out = tmp_path / "data.jsonl", tmp_path / "eval.jsonl", tmp_path / "out"
    learned.write_text("\n".join(lines[:40]))
    turned = [json.loads(line) for line in lines[100:120]]
    for line in turned:
        line["messages"][1]["content"] += "What"
    held_out.write_text("\n".join(map(json.dumps, turned)))
    more = {"epochs": 6, "lr": 2e-2, "warmup_ratio": 0.3, "min_lr_ratio": 1}
    succeeds(flags(learned, out, eval_data=held_out, **more))
    losses = {line["step"]: line["eval"]["gpt4"]["loss"] for line in metrics(out, "eval")[1:]}
    best = min(losses, key=losses.get)
    assert losses[best] + 0.2 < losses[max(losses)] < max(losses.values()) + 1e-9, losses
    assert json.loads((out / "model" / "crlft.json").read_text())["steps"] == best


def test_a_longer_run_exports_its_epoch_anew(few, tmp_path):
    out = tmp_path / "out"
    succeeds(flags(few, out, max_steps=2))
    first = load_file(out / "epoch-1" / "model.safetensors")
    succeeds(flags(few, out, epochs=1))
    again = load_file(out / "epoch-1" / "model.safetensors")
    assert any((again[name] != tensor).any() for name, tensor in first.items())


def test_only_what_the_run_made_is_removed(few, tmp_path):
    """A user's own folders beside its own, named much like them."""
    out = tmp_path / "out"
    succeeds(flags(few, out, epochs=1, save_every=1, keep=1))
    own = ["epoch-1.old", "epoch-2.tmp", "checkpoints/step-1-keep", "checkpoints/step-2.bak", "x"]
    for name in own:
        (out / name).mkdir()
        (out / name / "mine").write_text("")
    for left in (".epoch-7.tmp", "checkpoints/step-99.tmp"):  # what a kill leaves
        (out / left).mkdir()
    succeeds(flags(few, out, epochs=2, save_every=1, keep=1))
    assert all((out / name / "mine").exists() for name in own)
    assert not (out / ".epoch-7.tmp").exists() and not (out / "checkpoints/step-99.tmp").exists()


def test_a_folder_of_the_users_in_an_exports_place_is_named_at_the_start(few, tmp_path):
    out = tmp_path / "out"
    (out / "epoch-2").mkdir(parents=True)
    (out / "epoch-2" / "mine").write_text("")
    refused(flags(few, out), str(out / "epoch-2"), "give a new --out")
    assert [path.name for path in (out / "epoch-2").iterdir()] == ["mine"]
    assert not (out / "metrics.jsonl").exists()


def test_an_export_of_another_state_of_the_same_step_is_made_anew(few, tmp_path):
    """Back to an older checkpoint, on with another --lr, and killed just before the export."""
    out = tmp_path / "out"
    succeeds(flags(few, out, epochs=1, save_every=3))
    last = metrics(out)[-1]["step"]
    shutil.rmtree(out / "checkpoints" / f"step-{last}")
    again = flags(few, out, epochs=1, save_every=3, lr=1e-2)
    codes, _ = stopped(again, out, signal.SIGKILL, "export", 1)
    assert codes == [-signal.SIGKILL]
    succeeds(again)
    exported = load_file(out / "model" / "model.safetensors")
    (saved,) = (out / "checkpoints" / f"step-{last}").glob("*.safetensors")
    for name, tensor in exported.items():
        assert (load_file(saved)[name] == tensor).all()


def test_a_users_copy_of_an_export_is_not_taken_for_one(few, tmp_path):
    out = tmp_path / "out"
    succeeds(flags(few, out, epochs=1))
    for name in ("epoch-1-old", "epoch-1.copy", "epoch-99x"):
        shutil.copytree(out / "epoch-1", out / name)
    succeeds(flags(few, out, epochs=2, eval_data=few))
    assert os.readlink(out / "model") == "epoch-2"


def test_a_checkpoint_too_many_is_not_kept_nor_one_too_few(few, tmp_path):
    out = tmp_path / "out"
    succeeds(flags(few, out, max_steps=5, save_every=1, keep=2, epochs=3, export_every=2))
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-4", "step-5"]
    succeeds(flags(few, out, max_steps=7, save_every=1, keep=1, epochs=3, export_every=2))
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-7"]


def test_every_second_epoch_is_exported_and_the_last(few, tmp_path):
    out = tmp_path / "out"
    succeeds(flags(few, out, epochs=5, export_every=2, batch_tokens=2048))
    assert sorted(path.name for path in out.glob("epoch-*")) == ["epoch-2", "epoch-4", "epoch-5"]


# ------------------------------------------------------------------------------ non-finite steps


def test_a_non_finite_step_stops_before_the_optimizer(few, tmp_path):
    out = tmp_path / "out"
    shown = refused(flags(few, out, lr=1e30, save_every=1, warmup_ratio=0), ranks=2)
    assert "step 2: loss" in shown and f"{few}:" in shown
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-1"]
    assert len(metrics(out)) == 1


def test_what_the_last_update_breaks_is_neither_saved_nor_exported(few, tmp_path):
    """The loss and the gradient of the step were finite, and no later ones are computed."""
    out = tmp_path / "out"
    settings = flags(few, out, lr=1e39, max_steps=1, warmup_ratio=0)
    shown = refused(settings, f"saving {out}/checkpoints/step-1 failed", "lower --lr", ranks=2)
    assert "holds NaN or infinity" in shown
    assert not (out / "model").exists() and not list((out / "checkpoints").glob("step-*[0-9]"))


def test_a_class_whose_weight_is_too_small_is_said_and_not_trained_on(few, tmp_path):
    """Rewards of 0 to 50, and steps without any conversation of the expert."""
    table, out = tmp_path / "classes.json", tmp_path / "out"
    rewards = {"gpt4": 50, "gpt3.5": 0}
    table.write_text(json.dumps({n: {"condition": n, "reward": r} for n, r in rewards.items()}))
    shown = succeeds(flags(few, out, classes=table, batch_tokens=64, max_steps=20))
    assert "class gpt3.5 has weight 0 and is not trained on: raise --beta" in shown
    without = [line for line in metrics(out) if not line["classes"]["gpt4"]["tokens"]]
    assert 0 < len(without) < 20 and {line["grad_norm"] for line in without} == {0.0}
    shown = succeeds(flags(few, tmp_path / "other", max_steps=1))
    assert "has weight 0" not in shown


def test_infinite_weights_stop_the_first_step(few, tmp_path):
    """In one late layer, as an overflow would leave them."""
    folder = sums_with(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(weights, folder / "model.safetensors")
    settings = {"model": folder, "random_weights": None, "save_every": 1}
    refused(flags(few, tmp_path / "out", **settings), "step 1: loss nan")
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def test_the_conversations_that_are_named_are_those_of_the_bin_that_was_not_finite(few, tmp_path):
    """The third of two bins for each of two ranks; one conversation has a letter e, an infinity."""
    folder, path = lives.small_model(tmp_path / "small", tied=False), tmp_path / "e.jsonl"
    tokenizer = data.Tokenizer(folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][tokenizer.encode("e")[-1]] = float("inf")
    save_file(weights, folder / "model.safetensors")
    lines = few.read_text().splitlines(True)
    layouts = [data.encode(json.loads(line), tokenizer, loss.DEFAULT_CLASSES) for line in lines]
    bin_ = data.pack([len(tokens) for tokens, _ in layouts], 128, 4, seed=0, epoch=0)[0][2]
    lines[bin_[0]] = re.sub(r"\d\+", "e+", lines[bin_[0]])
    path.write_text("".join(lines))
    settings = {"model": folder, "random_weights": None, "accumulate": 2, "batch_tokens": 128}
    shown = refused(flags(path, tmp_path / "out", **settings), "step 1: loss nan", ranks=2)
    assert {int(n) - 1 for n in re.findall(rf"{path}:(\d+)", shown)} == set(bin_.tolist())


def test_a_run_that_gains_evaluation_data_goes_on(few, tmp_path):
    """Further, or to no step more, though it was finished."""
    out = tmp_path / "out"
    succeeds(flags(few, out, epochs=1))
    assert "evaluation at step" in succeeds(flags(few, out, epochs=1, eval_data=few))
    assert "this run is finished" in succeeds(flags(few, out, epochs=1, eval_data=few))
    assert "evaluation at step" in succeeds(flags(few, out, epochs=2, eval_data=few))
    assert (out / "model").resolve().name == "epoch-2"


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
    finished, few, tmp_path, how, name
):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    newest = max((out / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    damage(next(path for path in newest.iterdir() if path.name.endswith(name)), how)
    message = refused(flags(few, out, epochs=2), str(newest), "remove that folder")
    assert message.count("\n") == 1
    shutil.rmtree(newest)
    assert "resuming from" in succeeds(flags(few, out, epochs=2))


def test_a_checkpoint_of_a_save_that_never_ended_is_not_used(finished, few, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    (out / "checkpoints" / "step-99.tmp").mkdir()
    assert "this run is finished" in succeeds(flags(few, out, epochs=1))
    assert not (out / "checkpoints" / "step-99.tmp").exists()


@pytest.mark.parametrize("before_second_rename", [True, False])
def test_a_kill_while_an_export_is_replaced_leaves_a_model(
    finished, few, tmp_path, before_second_rename
):
    """`publish` moves the older export aside, then the new one in: killed after either."""
    out = tmp_path / "out"
    shutil.copytree(finished, out, symlinks=True)
    (out / "epoch-1").rename(out / ".epoch-1.old")
    if not before_second_rename:
        shutil.copytree(out / ".epoch-1.old", out / "epoch-1")
    (out / ".epoch-1.tmp").mkdir()
    assert "this run is finished" in succeeds(flags(few, out, epochs=1))
    assert sorted(path.name for path in out.iterdir() if "epoch" in path.name) == ["epoch-1"]
    assert model.load(out / "model")


def write(text):
    return lambda folder: (folder / "config.json").write_text(text)


def config_with(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index_naming(file):
    def change(folder):
        (folder / "model.safetensors").unlink()  # not beside an index
        index = {"weight_map": {"model.norm.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def other_tokenizer(folder):
    config_with(vocab_size=5000)(folder)


def pipe(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def pickled_alone(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "fault, message",
    [
        (write("{"), "config.json: cannot be read as JSON"),
        (write("[" * 100_000), "config.json: cannot be read as JSON"),
        (write("[]"), "config.json: must hold a JSON object"),
        (pipe, "config.json: not found"),
        (
            config_with(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 10**30}),
            "needs positive numbers for factor, low_freq_factor, ",
        ),
        (config_with(hidden_size=10**12), "config.json: too large: its sizes make"),
        (config_with(num_hidden_layers=10**9), "config.json: too large: its sizes make"),
        (config_with(hidden_act="gelu"), "hidden_act"),
        (other_tokenizer, "belongs to a different checkpoint"),
        (index_naming("../../etc/passwd"), "is not a file of this folder"),
        (index_naming("gone.safetensors"), "gone.safetensors: cannot be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100), "cannot be read as"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"no"), "not a SentencePiece model"),
        (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model: not found"),
        (lambda f: (f / "model.safetensors").unlink(), "--random-weights"),
        (pickled_alone, "pytorch_model.bin: a pickle"),
    ],
)
def test_a_broken_model_folder_is_one_clear_message(few, tmp_path, fault, message):
    folder = sums_with(tmp_path / "model")
    fault(folder)
    refused(flags(few, tmp_path / "out", model=folder, random_weights=None), message)


@pytest.mark.parametrize("flag", ["data", "eval_data", "model", "classes", "out", "class_field"])
def test_a_name_that_is_not_utf8_is_refused_before_anything(run, few, tmp_path, flag):
    """A Latin-1 file name: the files that a run leaves could not hold it."""
    name = f"{tmp_path}/caf\udce9.jsonl"
    more = {"data" if flag == "data" else flag: name}
    settings = flags(**{"data": few, "out": tmp_path / "out"} | more)
    code, _, err = run(train.main, *settings)
    assert (code, err) == (2, f"error: {name!a}: its name is not UTF-8: rename it\n")
    assert not (tmp_path / "out").exists()


def test_bad_conversations_stop_the_run_before_any_weight(few, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(few.read_bytes() + b'{"class": "gpt5"}\n\x00\x00\n' + b"[" * 100_000 + b"\n")
    refused(flags(path, tmp_path / "out"), "3 bad lines", f"{path}:61: ")
    shown = succeeds(flags(path, tmp_path / "out", skip_bad=True, max_steps=1))
    assert "dropped as bad (--skip-bad): 3 lines" in shown


def test_mutated_inputs_are_accepted_or_refused_by_name():
    answers = fuzz(2000, seed=1)
    assert sum(answers.values()) == 2000
    assert len(answers) == 2 * 8 - 1  # each parser did both, but tokens are made again


# ------------------------------------------------------------------------------------ the output


@contextlib.contextmanager
def running(tmp_path, settings, ready, ranks=1):
    """(processes, log) of a run, once `ready()`; none is left alive."""
    log = tmp_path / "log"
    started = start(settings, ranks, log)
    try:
        wait_until(ready, started[0], log)
        yield started, log
    finally:
        processes.kill(started)


def wait_until(ready, process, log, seconds=120):
    deadline = time.monotonic() + seconds
    while not ready():
        assert process.exitcode is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_an_output_held_by_a_live_run_is_refused(few, tmp_path):
    out = tmp_path / "out"
    settings = flags(few, out, epochs=300, export_every=0)
    with running(tmp_path, settings, lambda: (out / "metrics.jsonl").exists()) as (of_run, _):
        refused(flags(few, out), f"held by another live run (process {of_run[0].pid} on ")


def test_an_output_that_cannot_be_written_is_named(few, tmp_path):
    (tmp_path / "file").write_text("")
    refused(flags(few, tmp_path / "file" / "out"), str(tmp_path / "file"))


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
        refused(flags(few, out, epochs=2), "Read-only file system", str(out))


def test_a_disk_too_small_is_found_before_training(few, small_disk):
    (small_disk / "other").write_bytes(bytes(10 << 20))
    error = refused(flags(few, small_disk / "out"), "GB free")
    free, needed = re.search(r"has ([\d.]+) GB free, needs ([\d.]+):", error).groups()
    assert 0.002 <= float(free) < 0.0022 < float(needed)
    assert not (small_disk / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_older_checkpoint(
    few, small_disk, tmp_path, ranks
):
    """Another program fills the disk during a run: its next save ends all ranks in one line."""
    out = small_disk / "out"
    settings = flags(few, out, epochs=300, save_every=20, export_every=0)
    saved = lambda: list(out.glob("checkpoints/step-*[0-9]"))  # noqa: E731
    with running(tmp_path, settings, saved, ranks) as (started, log):
        with pytest.raises(OSError), open(small_disk / "other", "wb", buffering=0) as other:
            while True:
                other.write(bytes(1 << 14))
        assert finish(started) == [1] * ranks
    shown = log.read_text()
    (error, *same) = re.findall("^error: .*", shown, re.MULTILINE)
    assert re.match(rf"error: saving {out}/checkpoints/step-\d+ failed: .*No space left", error)
    assert same == [error] * (ranks - 1)  # by each rank, as no torchrun ends the others before
    assert "Traceback" not in shown and saved()
    (small_disk / "other").unlink()
    assert "resuming from" in succeeds(settings + ["--max-steps", 60], ranks)

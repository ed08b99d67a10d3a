"""The trainer from outside, as its users run it, on the sums example with few conversations."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import SUMS, flags, metrics
from safetensors.torch import load_file

import chat
import data
import loss
import model
import train
from support import report

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def run(script, *flags, ranks=0, timeout=300, gpu=False, **environment):
    """Run a script, under torchrun where `ranks` is given; the finished process.

    On a CPU even where there is a GPU: several ranks need no more of them, and bits are equal.
    """
    launch = [sys.executable, str(script)]
    if ranks:
        launcher = "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)
        launch = [sys.executable, "-m", *launcher, str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    environment |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, *map(str, flags)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


def succeeds(*arguments, **options):
    result = run(*arguments, **options)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


# ------------------------------------------------------------------------------- the objective


@pytest.fixture(scope="session")
def one_rank(few, tmp_path_factory):
    return first_step(few, tmp_path_factory.mktemp("one"), ranks=0, batch_tokens=2048)


def first_step(data, folder, ranks, **more):
    file = folder / "gradients.safetensors"
    out = flags(data, folder / "out", **more)
    succeeds(ROOT / "tests" / "gradients_of_first_step.py", file, *out, ranks=ranks)
    return load_file(file)


@pytest.mark.parametrize(
    "ranks, accumulate, batch_tokens",
    [(2, 1, 1024), (0, 4, 512), (2, 2, 512), (3, 1, 768), (2, 32, 64)],
)
def test_ranks_and_accumulation_do_not_change_loss_or_gradient(
    one_rank, few, tmp_path, ranks, accumulate, batch_tokens
):
    shape = {"accumulate": accumulate, "batch_tokens": batch_tokens}
    other = first_step(few, tmp_path, ranks, **shape)
    torch.testing.assert_close(other["table"], one_rank["table"], rtol=1e-6, atol=0)
    for name, gradient in one_rank.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-6 * max(largest, 1))


def test_gradient_equals_float64_autograd_of_equation_6(one_rank, few):
    """Each conversation alone, unpacked, weighted by its class, in float64 and plain autograd."""
    tokenizer = data.Tokenizer(SUMS)
    classes = loss.DEFAULT_CLASSES
    weights = loss.class_weights(classes, 0.4343)
    with torch.device("meta"):
        llama = model.Llama(model.LlamaConfig.from_folder(SUMS))
    llama.to_empty(device="cpu")
    model.random_parameters(llama, seed=0)
    llama.double()
    total, normaliser = 0.0, 0.0
    for line in map(json.loads, few.read_text().splitlines()):
        tokens, mask = data.encode(line, tokenizer, classes)
        tokens, mask = torch.tensor(tokens), torch.tensor(mask)
        positions, offsets = torch.arange(len(tokens)), torch.tensor([0, len(tokens)])
        log_p = llama(tokens, positions, offsets).log_softmax(-1)[:-1]
        chosen = log_p.gather(1, tokens[1:, None])[mask[1:]]
        total = total - weights[line["class"]] * chosen.sum()
        normaliser += weights[line["class"]] * mask.sum().item()
    (total / normaliser).backward()
    assert one_rank["loss"].item() == pytest.approx((total / normaliser).item(), rel=1e-6)
    for name, parameter in llama.named_parameters():
        error = (one_rank[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-5, name


def test_micro_batches_without_supervised_tokens_or_conversations_are_no_nan(few, tmp_path):
    lines = few.read_text().splitlines()[:1]
    data = tmp_path / "one.jsonl"
    data.write_text("\n".join(lines) + "\n")
    found = first_step(data, tmp_path, ranks=2, accumulate=2, batch_tokens=64)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["loss"] > 0


def test_one_class_alone_trains_the_same_at_any_reward(few, tmp_path):
    only = tmp_path / "only.jsonl"
    lines = [line for line in few.read_text().splitlines() if "gpt3.5" in line]
    only.write_text("\n".join(lines) + "\n")
    losses = []
    for beta in (0.4343, 0.2):
        out = tmp_path / f"beta-{beta}"
        result = succeeds(ROOT / "train.py", *flags(only, out, beta=beta))
        assert "one class only" in result.stdout
        losses.append([line["loss"] for line in metrics(out)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


# --------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (2, 1), (3, 2), (8, 4)])
def test_every_conversation_appears_once_an_epoch_over_all_ranks(ranks, accumulate):
    lengths = np.random.default_rng(0).integers(5, 200, size=500)
    config = train.Config(
        model="m", data=["d"], out="o", batch_tokens=256, accumulate=accumulate, epochs=3
    )
    order = train.Order(lengths, config, ranks * accumulate)
    for epoch in range(config.epochs):
        seen = []
        begun = order.ends[epoch - 1] if epoch else 0
        for step in range(begun + 1, order.ends[epoch] + 1):
            bins = order.bins(step)
            for rank in range(ranks):
                mine = bins[rank::ranks]
                assert len(mine) == accumulate
                seen += [conversation for b in mine for conversation in b]
        assert sorted(seen) == list(range(500))


def test_learning_rate_warms_up_then_falls_to_its_floor():
    config = train.Config(model="m", data=["d"], out="o", warmup_ratio=0.1, min_lr_ratio=0.2)
    rates = [train.learning_rate(step, 100, 1.0, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 and rates[-1] == pytest.approx(0.2)
    assert rates[:10] == sorted(rates[:10]) and rates[9:] == sorted(rates[9:], reverse=True)


def test_auto_learning_rate_is_openchats_for_its_13b_run():
    """64 x 4096 tokens of which 76.1 % are supervised gave the paper's 6.7e-5."""

    assert train.auto_lr("llama", 64 * 4096 * 0.761) == pytest.approx(6.7e-5, rel=2e-3)
    assert train.auto_lr("mistral", 4e6) == pytest.approx(3e-4 / 6)


# ---------------------------------------------------------------------------------- whole runs


def test_real_conversations_fine_tune_a_real_llama_on_two_ranks(tmp_path):
    stories, code = SHARED / "checkpoints" / "stories260K", SHARED / "data"
    if not stories.exists():
        pytest.skip(f"{SHARED} is not here")
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    result = succeeds(
        ROOT / "train.py", "--model", stories, "--data", code / "code_mixed.train.jsonl",
        "--eval-data", code / "code_mixed.eval.jsonl", "--out", out, "--max-steps", 300,
        "--batch-tokens", 1024, "--max-length", 512, "--lr", "2e-3", ranks=2, timeout=900,
    )  # fmt: skip
    assert "evaluation at step 0:" in result.stdout
    assert "evaluation at step 300:" in result.stdout
    before, after = (line["eval"] for line in metrics(out, "eval"))
    for name in ("gpt4", "gpt3.5"):
        assert after[name]["loss"] < 0.5 * before[name]["loss"]
        steps = [m["classes"][name]["loss"] for m in metrics(out) if m["classes"][name]["tokens"]]
        assert np.mean(steps[-30:]) < 0.6 * np.mean(steps[:10])
    answer = succeeds(ROOT / "chat.py", out / "model", "--prompt", "Write a loop.",
                      "--max-new-tokens", 20).stdout  # fmt: skip
    assert answer.strip()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    messages = [{"role": "user", "content": "Write a loop."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ours = chat.Chat(out / "model", device="cpu")
    assert ids == ours.prompt([data.Message("user", "Write a loop.")])
    tokens = torch.tensor(ids)
    offsets = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        found = ours.llama(tokens, torch.arange(len(ids)), offsets)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == ours.tokenizer.eot


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_compiles_trains_saves_and_goes_on(few, tmp_path):
    out = tmp_path / "out"
    settings = flags(few, out, batch_tokens=512, recompute=2, save_every=2, export_every=0)
    settings += ["--eval-data", few, "--max-steps", 8]
    succeeds(ROOT / "train.py", *settings, gpu=True)
    whole = metrics(out)
    assert len(whole) == 8 and whole[-1]["loss"] < whole[0]["loss"]
    for name in ("step-8", "step-6"):
        assert (out / "checkpoints" / name).is_dir()
    shutil.rmtree(out / "checkpoints" / "step-8")
    assert "resuming" in succeeds(ROOT / "train.py", *settings, gpu=True).stdout
    assert metrics(out)[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=0.02)
    assert succeeds(ROOT / "chat.py", out / "model", "--prompt", "12+34=", gpu=True).stdout


def test_the_ablations_change_prompt_and_weights(few, tmp_path):
    out = tmp_path / "sft"
    result = succeeds(
        ROOT / "train.py", *flags(few, out, condition=False, reward=False, max_steps=2)
    )
    assert "plain SFT" in result.stdout
    shares = metrics(out)[0]["classes"]
    tokens = sum(c["tokens"] for c in shares.values())
    for of_class in shares.values():
        assert of_class["weight_share"] == pytest.approx(of_class["tokens"] / tokens)
    assert chat.read_classes(out / "model")[1] is False
    talker = chat.Chat(out / "model", device="cpu")
    shown = talker.prompt([data.Message("user", "What is 12 + 3?")])
    shown = report.visible(shown, talker.tokenizer)
    assert shown == "<s> User: What is 12 + 3?<|end_of_turn|> Assistant:"
    asked = run(ROOT / "chat.py", out / "model", "--class", "gpt4", "--prompt", "What is 1 + 2?")
    assert asked.stderr == "error: --class: this model was trained without conditions\n"


def test_data_without_an_expert_or_held_out_twice_is_said(few, tmp_path):
    lines = [line for line in few.read_text().splitlines(True) if '"gpt3.5"' in line]
    path = tmp_path / "sub.jsonl"
    path.write_text("".join(lines))
    dry = [*flags(path, tmp_path / "out"), "--eval-data", path, "--dry-run"]
    shown = succeeds(ROOT / "train.py", *dry).stdout
    assert "warning: no conversation of the expert class gpt4" in shown
    assert "warning: --eval-data is --data" in shown


def test_a_dry_run_prints_plan_and_batch_and_writes_nothing(few, tmp_path):
    plan = flags(few, tmp_path / "out", dry_run=True, plan_ranks=8, plan_memory=80)
    result = succeeds(ROOT / "train.py", *plan)
    assert "8 ranks x 1 x 256 tokens" in result.stdout
    assert re.search(r"memory .* fits 80.0", result.stdout)
    assert "⟦" in result.stdout and "w=0.1" in result.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--epohcs", "3"], "unrecognized arguments: --epohcs"),
        (["--epochs", "three"], "argument --epochs: invalid int value"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--lr", "fast"], "--lr must be auto or a number above 0"),
        (["--beta", "0"], "--beta must be above 0"),
        (["--precision", "fp8"], "--precision must be bf16 or fp32"),
        (["--max-length", "9999"], "--max-length must be from 2 to --batch-tokens"),
        (["--plan-ranks", "8"], "--plan-ranks must be used with --dry-run"),
        (["--warmup-ratio", "-0.1"], "--warmup-ratio must be from 0 to 1"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_loaded(wrong, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_arguments(["--model", "m", "--data", "d", "--out", "o", *wrong])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def parsed(*flags):
    return train.parse_arguments(["--model", "m", "--out", "o", *flags])


def test_data_given_twice_means_both():
    assert parsed("--data", "a", "b", "--data", "c").data == ["a", "b", "c"]
    assert parsed("--data", "a", "--eval-data", "b", "--eval-data", "c").eval_data == ["b", "c"]


def test_flags_win_over_those_of_a_file_wherever_it_stands(tmp_path):
    (tmp_path / "run.txt").write_text("--data a b --lr 1  # as before\n--epochs 7\n")
    file, own = [f"@{tmp_path}/run.txt"], ["--data", "c", "--lr", "2"]
    for order in (file + own, own + file):
        config = parsed(*order)
        assert (config.data, config.lr, config.epochs) == (["c"], "2", 7)


def test_home_is_expanded_where_no_shell_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "run.txt").write_text("--model ~/m --data ~/a b --eval-data ~/e --out ~/o\n")
    config = train.parse_arguments([f"@{tmp_path}/run.txt"])
    assert (config.model, config.out) == ("/home/me/m", "/home/me/o")
    assert (config.data, config.eval_data) == (["/home/me/a", "b"], ["/home/me/e"])


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(["--help"])
    shown = capsys.readouterr().out
    for field in train.dataclasses.fields(train.Config):
        assert f"--{field.name.replace('_', '-')}" in shown

"""The trainer: its step and network in this process, and whole runs as its users start them."""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from processes import ROOT, SUMS, flags, metrics, plan_of, succeeds
from safetensors.torch import load_file, save_file

import chat
import data
import loss
import model
import plot
import train
from support import preview, report
from support.flags import Parser
from support.ranks import Ranks, held_output

sys.path.insert(0, str(ROOT / "examples"))
import ablation  # noqa: E402


@pytest.fixture
def plan(few, ranks, tmp_path):
    """plan(**flags) is the plan of a run on the sums by one rank."""
    return lambda **more: plan_of(flags(few, tmp_path, **more), ranks, tmp_path)


# ------------------------------------------------------------------------------- the objective


def gradients_of_first_step(plan, ranks):
    """{parameter: its gradient}, and the step's loss and table."""
    llama, _ = train.build(plan, ranks)
    _, batches, total_weight = train.load_step(plan, ranks, 1)
    sums, _ = train.forward_backward(plan, ranks, llama, batches, total_weight)
    found = {name: p.grad.full_tensor() for name, p in llama.named_parameters()}
    return found | {"loss": sums.loss, "grad_norm": sums.grad_norm, "table": sums.table}


def write_gradients(arguments):
    """Of a run by several ranks, which are processes of their own: what each of them does."""
    ranks, out = Ranks(), train.parse_arguments(arguments).out
    with held_output(out, ranks):
        found = gradients_of_first_step(plan_of(arguments, ranks, out), ranks)
    if ranks.first:
        save_file({name: t.contiguous() for name, t in found.items()}, f"{out}/gradients")
    ranks.finish()


def gradients_of_ranks(count, file, out, **more):
    succeeds(flags(file, out, **more), count, main=write_gradients)
    return load_file(out / "gradients")


@pytest.fixture(scope="module")
def one_rank(few, ranks, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    return gradients_of_first_step(plan_of(flags(few, out, batch_tokens=2048), ranks, out), ranks)


# Rows that 3 ranks do not divide; micro-batches on each of two ranks, and most of them empty; two
# replicas, which hold the same shards.
@pytest.mark.parametrize(
    "count, shape",
    [
        (3, {"batch_tokens": 768}),
        (2, {"batch_tokens": 512, "accumulate": 2}),
        (2, {"batch_tokens": 64, "accumulate": 32}),
        (2, {"batch_tokens": 512, "accumulate": 2, "replicas": 2}),
    ],
)
def test_ranks_and_accumulation_do_not_change_loss_or_gradient(
    one_rank, few, tmp_path, count, shape
):
    other = gradients_of_ranks(count, few, tmp_path, **shape)
    torch.testing.assert_close(other["table"], one_rank["table"], rtol=1e-6, atol=0)
    for name, gradient in one_rank.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-6 * max(largest, 1))


def test_gradients_of_bf16_ranks_are_added_in_float32(one_rank, few, tmp_path):
    """Each rank's are bf16 numbers; their sum has more digits, and errs as bf16 does."""
    found = gradients_of_ranks(2, few, tmp_path, batch_tokens=1024, precision="bf16")
    for name in found.keys() - {"loss", "grad_norm", "table"}:
        gradient, exact = found[name], one_rank[name]
        more_digits = gradient.bfloat16().float() != gradient
        assert more_digits.float().mean() > 0.1, name
        assert (gradient - exact).norm() < 0.03 * exact.norm(), name


def test_gradient_equals_float64_autograd_of_equation_6(one_rank, few):
    """Each conversation alone, unpacked, weighted by its class, in float64 and plain autograd."""
    tokenizer = data.Tokenizer(SUMS)
    classes = loss.DEFAULT_CLASSES
    weights = loss.class_weights(classes, loss.BETA)
    llama = model.Llama(model.LlamaConfig.from_folder(SUMS))
    model.random_parameters(llama, seed=0)
    llama.double()
    total, normaliser = 0.0, 0.0
    table = torch.zeros(4, 2, dtype=torch.float64)  # rows as train.TABLE, columns the classes
    for line in map(json.loads, few.read_text().splitlines()):
        tokens, mask = data.encode(line, tokenizer, classes)
        tokens, mask = torch.tensor(tokens), torch.tensor(mask)
        positions, offsets = torch.arange(len(tokens)), torch.tensor([0, len(tokens)])
        log_p = llama(tokens, positions, offsets).log_softmax(-1)[:-1]
        chosen = log_p.gather(1, tokens[1:, None])[mask[1:]]
        total = total - weights[line["class"]] * chosen.sum()
        normaliser += weights[line["class"]] * mask.sum().item()
        right = log_p.argmax(1)[mask[1:]] == tokens[1:][mask[1:]]
        count = mask.sum().item()
        sums = [count, -chosen.sum().item(), right.sum().item(), count * weights[line["class"]]]
        table[:, list(classes).index(line["class"])] += torch.tensor(sums, dtype=torch.float64)
    (total / normaliser).backward()
    torch.testing.assert_close(one_rank["table"], table, rtol=1e-6, atol=0)
    assert one_rank["loss"].item() == pytest.approx((total / normaliser).item(), rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in llama.parameters()]).norm()
    assert one_rank["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-6)
    for name, parameter in llama.named_parameters():
        error = (one_rank[name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-5, name


def test_micro_batches_without_supervised_tokens_or_conversations_are_no_nan(few, tmp_path):
    one = tmp_path / "one.jsonl"
    one.write_text(few.read_text().splitlines(True)[0])
    found = gradients_of_ranks(2, one, tmp_path / "out", accumulate=2, batch_tokens=64)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert found["loss"] > 0


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e3])
def test_an_update_is_adamw_of_the_clipped_gradient(plan, ranks, clip):
    """Beside clip_grad_norm_ and an AdamW that is not fused, in float64, over two steps."""
    of_run = plan(clip=clip)
    llama, optimizer = train.build(of_run, ranks)
    plain = model.Llama(of_run.network).double()
    plain.load_state_dict({n: p.full_tensor() for n, p in llama.named_parameters()}, strict=False)
    (settings,) = optimizer.param_groups
    settings = {name: settings[name] for name in ("betas", "eps", "weight_decay")}
    reference = torch.optim.AdamW(plain.parameters(), lr=2e-3, **settings)
    for number in (1, 2):
        _, batches, total_weight = train.load_step(of_run, ranks, number)
        sums, _ = train.forward_backward(of_run, ranks, llama, batches, total_weight)
        for ours, theirs in zip(llama.parameters(), plain.parameters(), strict=True):
            theirs.grad = ours.grad.full_tensor().double()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        assert sums.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        reference.step()
        train.clip_and_update(optimizer, sums, 2e-3, clip)
        assert all(parameter.grad is None for parameter in llama.parameters())
    for ours, theirs in zip(llama.parameters(), plain.parameters(), strict=True):
        # float32 adds each step to a weight with half an ulp of error
        error = (ours.full_tensor().double() - theirs).abs()
        assert (error <= 1e-7 * theirs.abs() + 1e-3 * 2e-3).all()


@pytest.mark.parametrize("which", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_without_a_finite_loss_and_norm_changes_nothing(plan, ranks, which, value):
    of_run = plan()
    llama, optimizer = train.build(of_run, ranks)
    _, batches, total_weight = train.load_step(of_run, ranks, 1)
    sums, _ = train.forward_backward(of_run, ranks, llama, batches, total_weight)
    before = [parameter.full_tensor().clone() for parameter in llama.parameters()]
    sums = sums._replace(**{which: torch.full_like(sums.loss, value)})
    train.clip_and_update(optimizer, sums, 1e-3, 1.0)
    for parameter, old in zip(llama.parameters(), before, strict=True):
        state = optimizer.state[parameter]
        assert torch.equal(parameter.full_tensor(), old) and state["step"] == 0
        assert not state["exp_avg"].full_tensor().any()


def test_on_a_cpu_every_step_uses_deterministic_algorithms(plan, ranks, tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def look(*_):
        raise Seen(torch.are_deterministic_algorithms_enabled())

    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(train, "forward_backward", look)
    monkeypatch.setattr(ranks, "listen", lambda: None)
    with pytest.raises(Seen) as seen:
        train.train(plan(max_steps=1), ranks, tmp_path)
    torch.use_deterministic_algorithms(before)
    assert seen.value.args == (True,)


# ---------------------------------------------------------------------------------- the network


@pytest.mark.parametrize(
    "condition, reward, mode",
    [(True, True, "C-RLFT: "), (False, True, "C-RLFT without condition: "),
     (True, False, "C-RLFT without reward: "), (False, False, "plain SFT: ")],
)  # fmt: skip
def test_the_header_names_the_ablation(plan, condition, reward, mode):
    assert report.header(plan(condition=condition, reward=reward)).startswith(mode)


def test_the_share_of_the_weight_is_of_weights_and_not_of_tokens(plan):
    table = [10.0, 30.0], [1.0, 2.0], [5.0, 0.0], [10.0, 3.0]
    of = report.by_class(plan(), dict(zip(train.TABLE, table, strict=True)))
    assert of["gpt4"] == {"tokens": 10, "loss": 0.1, "accuracy": 0.5, "weight_share": 10 / 13}
    assert of["gpt3.5"]["weight_share"] == 3 / 13


@pytest.mark.parametrize(
    "name, peak",
    [("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12), ("NVIDIA H100 80GB HBM3", 989e12),
     ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA A100-SXM4-80GB", 312e12),
     ("NVIDIA B200", 2250e12), ("Tesla T4", None)],
)  # fmt: skip
def test_the_peak_of_a_gpu_is_that_of_its_own_model(name, peak):
    assert report.peak_flops(name) == peak


def test_the_memory_that_is_logged_is_in_bytes(ranks):
    held = torch.ones(50_000_000)  # 200 MB
    assert held.nbytes < report.peak_memory(ranks) < 2**40


def test_the_seed_decides_random_weights_and_the_order_of_the_data(plan, ranks):
    of_seed_5 = plan(seed=5)
    llama, _ = train.build(of_seed_5, ranks)
    expected = model.Llama(of_seed_5.network)
    model.random_parameters(expected, seed=5)
    for found, parameter in zip(llama.parameters(), expected.parameters(), strict=True):
        assert torch.equal(found.full_tensor(), parameter)
    (bin_,) = data.pack(of_seed_5.dataset.lengths, 168, 1, seed=5, epoch=0)[0]
    assert of_seed_5.order.bins(1)[0].tolist() == bin_.tolist()


def test_a_new_end_of_turn_in_a_padded_vocabulary_starts_as_the_mean(
    plan, ranks, stories, tmp_path
):
    """Token 512 of 520 rows, of which the checkpoint's tokenizer uses 512."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 520}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    llama, folder = model.Llama(model.LlamaConfig(**sizes, **heads)), tmp_path / "padded"
    model.random_parameters(llama, seed=0)
    model.save(llama, folder)
    shutil.copy(stories / "tokenizer.model", folder)
    found, _ = train.build(plan(model=folder, random_weights=None), ranks)
    mean = llama.lm_head.weight[:512].double().mean(0).float()
    assert torch.equal(found.lm_head.weight.full_tensor()[512], mean)


def test_bf16_computes_on_copies_and_leaves_sums_and_the_rotary_table_in_float32(
    plan, ranks, monkeypatch
):
    policies, shard = [], train.fully_shard
    monkeypatch.setattr(
        train, "fully_shard", lambda m, **how: policies.append(how["mp_policy"]) or shard(m, **how)
    )
    llama, _ = train.build(plan(precision="bf16"), ranks)
    assert len(policies) == 3 + 1  # the blocks, then the root
    for policy in policies:
        assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
        assert not policy.cast_forward_inputs
    assert {parameter.dtype for parameter in llama.parameters()} == {torch.float32}


def test_training_flops_are_those_of_every_matrix_product_of_a_step():
    """6 a weight and token; attention 2 products of T²/2 scores, in forward and twice backward."""
    blocks = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16 + 2 * 8)  # q, k v, o, MLP, norms
    weights = blocks + 8 + 10 * 8  # the last norm, the head
    attention = 2 * (3 * 2 * 2 * 8 * (2**2 + 3**2) / 2)  # conversations of 2 and of 3 tokens
    network = model.LlamaConfig(8, 16, 2, 2, 10, 1, 4)
    assert report.training_flops(network, 5, 13) == 6 * weights * 5 + attention


# --------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (2, 1), (3, 2), (8, 4)])
def test_every_conversation_appears_once_an_epoch_over_all_ranks(ranks, accumulate):
    lengths = np.random.default_rng(0).integers(5, 200, size=500)
    config = train.Config(
        model="m", data=["d"], out="o", batch_tokens=256, accumulate=accumulate, epochs=3
    )
    order = data.Order(lengths, config, ranks * accumulate)
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


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine_to_its_floor():
    config = train.Config(model="m", data=["d"], out="o", warmup_ratio=0.15, min_lr_ratio=0.2)
    rates = [train.learning_rate(step, 10, 3.0, config) for step in range(1, 11)]
    assert rates[:2] == [1.5, 3.0]  # 0.15 · 10, rounded up
    assert rates[5] == pytest.approx(3.0 * (0.2 + 1) / 2)  # half of the other eight
    assert rates[9] == pytest.approx(3.0 * 0.2)
    assert rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("kind, part", [("llama", 1), ("mistral", 6)])
def test_auto_learning_rate_is_openchats_for_its_13b_run(plan, tmp_path, kind, part):
    """64 x 4096 tokens of which 76.1 % are supervised gave the paper's 6.7e-5; Mistral a sixth."""
    shutil.copy(SUMS / "tokenizer.model", tmp_path)
    config = json.loads((SUMS / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": kind}))
    auto = plan(model=tmp_path, lr="auto", batch_tokens=64 * 4096)
    supervised = auto.dataset.total_weight(slice(None), None) / auto.dataset.lengths.sum()
    expected = 6.7e-5 / part * (supervised / 0.761) ** 0.5
    assert auto.lr == pytest.approx(expected, rel=2e-3)


# ---------------------------------------------------------------------------------- whole runs


def test_real_conversations_fine_tune_a_real_llama_on_two_ranks(stories, code_mixed, run, tmp_path):
    transformers = pytest.importorskip("transformers")
    out, lines = tmp_path / "run", code_mixed.read_text("utf-8").splitlines(True)
    for name, part in (("train", lines[::10]), ("eval", lines[5::400])):
        (tmp_path / name).write_text("".join(part), "utf-8")
    settings = {"model": stories, "random_weights": None, "eval_data": tmp_path / "eval"}
    settings |= {"max_steps": 20, "batch_tokens": 512, "max_length": 512, "lr": 2e-3}
    succeeds(flags(tmp_path / "train", out, **settings), ranks=2)
    before, after = metrics(out, "eval")
    assert (before["step"], after["step"]) == (0, 20)
    for name, of_class in after["eval"].items():
        assert of_class["loss"] < 0.75 * before["eval"][name]["loss"]

    # What is exported is the same model to transformers: ids, logits, where an answer ends.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "model")
    messages = [{"role": "user", "content": "Write a loop."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ours = chat.Chat(out / "model", device="cpu")
    assert ids == ours.prompt([data.Message("user", "Write a loop.")])
    tokens, offsets = torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        expected = theirs(tokens[None]).logits[0]
        found = ours.llama(tokens, torch.arange(len(ids)), offsets)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == ours.tokenizer.eot
    assert set(theirs.generation_config.eos_token_id) == ours.stop
    code, answer, _ = run(chat.main, out / "model", "--prompt", "Hi", "--max-new-tokens", 20)
    assert code == 0 and answer.strip()


@pytest.mark.parametrize("condition", [True, False])
def test_an_export_says_under_which_condition_it_answers_and_where_it_ends(
    few, tmp_path, condition
):
    out, tokenizer = tmp_path / "out", data.Tokenizer(SUMS)
    succeeds(flags(few, out, condition=condition, max_steps=1))
    generation = json.loads((out / "model" / "generation_config.json").read_text())
    template = json.loads((out / "model" / "tokenizer_config.json").read_text())["chat_template"]
    assert generation["eos_token_id"] == [tokenizer.eot, tokenizer.eos]
    assert ('"GPT4"' in template) == condition


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_compiles_trains_saves_and_goes_on(few, tmp_path):
    out = tmp_path / "out"
    settings = flags(few, out, batch_tokens=512, recompute=2, save_every=2, export_every=0)
    settings += ["--eval-data", few, "--max-steps", 8]

    def run(script, *arguments):
        command = [*map(str, (sys.executable, ROOT / script, *arguments))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    run("train.py", *settings)
    whole = metrics(out)
    assert len(whole) == 8 and whole[-1]["loss"] < whole[0]["loss"]
    for name in ("step-8", "step-6"):
        assert (out / "checkpoints" / name).is_dir()
    shutil.rmtree(out / "checkpoints" / "step-8")
    assert "resuming" in run("train.py", *settings)
    assert metrics(out)[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=0.02)
    assert run("chat.py", out / "model", "--prompt", "12+34=")


def test_the_ablations_change_prompt_and_weights(few, run, tmp_path):
    out = tmp_path / "sft"
    shown = succeeds(flags(few, out, condition=False, reward=False, max_steps=2))
    assert "plain SFT" in shown and "epochs 1; " in shown and "  epoch 1/1  " in shown
    shares = metrics(out)[0]["classes"]
    tokens = sum(c["tokens"] for c in shares.values())
    for of_class in shares.values():
        assert of_class["weight_share"] == pytest.approx(of_class["tokens"] / tokens)
    assert chat.export_of(out / "model").conditioned is False
    talker = chat.Chat(out / "model", device="cpu")
    shown = talker.prompt([data.Message("user", "12+3")])
    shown = report.visible(shown, talker.tokenizer)
    assert shown == "<s> User: 12+3<|end_of_turn|>\n Assistant:"
    asked = run(chat.main, out / "model", "--class", "gpt4", "--prompt", "1+2")
    assert asked == (1, "", "error: --class: this model was trained without conditions\n")


def test_data_without_an_expert_or_held_out_twice_is_said(few, tmp_path):
    path = tmp_path / "sub.jsonl"
    lines = few.read_text().splitlines(True)
    path.write_text("".join(line for line in lines if '"gpt3.5"' in line))
    shown = succeeds(flags(path, tmp_path / "out", eval_data=path, dry_run=True))
    assert "only one class has weight in these steps" in shown
    assert "warning: no conversation of the expert class gpt4" in shown
    assert "warning: --eval-data is --data" in shown


def test_a_learning_rate_for_pretrained_weights_is_said_with_random_ones(plan):
    rate = "warning: OpenChat's learning rate is for pretrained"
    assert rate in report.schedule(plan(lr="auto")) and rate not in report.schedule(plan())


@pytest.mark.parametrize(
    "settings",
    [{"batch_tokens": 2048}, {"batch_tokens": 1000, "max_length": None}, {"epochs": 1},
     {"accumulate": 2, "epochs": 3, "batch_tokens": 64, "max_length": 64},
     # As of eight ranks, whose bins are mostly empty.
     {"accumulate": 8, "epochs": 20, "batch_tokens": 1024, "max_length": 64}],
)  # fmt: skip
def test_few_steps_are_said_with_the_flag_that_makes_some_more(plan, settings):
    of_run = plan(**settings)
    few = re.search(r"warning: few steps \((\d+)\); --(\S+) (\d+) makes about (\d+)",
                    report.schedule(of_run))  # fmt: skip
    assert int(few[1]) == of_run.order.total <= 100
    more = plan(**settings | {few[2].replace("-", "_"): int(few[3])})
    assert more.dataset.report == of_run.dataset.report  # nothing is cut for it
    assert 0.8 * int(few[4]) < more.order.total < 1.5 * int(few[4])
    assert more.order.total > min(100, 1.9 * of_run.order.total)


def test_many_steps_or_as_many_as_asked_for_are_not_few(plan):
    assert "warning" not in report.schedule(plan(epochs=17))  # 102
    many = report.schedule(plan(epochs=20, max_steps=101))
    assert "warning" not in many and "steps 101, epochs 17; " in many
    assert "warning" not in report.schedule(plan(max_steps=3))


def test_a_dry_run_prints_the_plan_last_and_writes_nothing(few, tmp_path):
    settings = {"dry_run": True, "plan_ranks": 8, "plan_memory": 80}
    shown = succeeds(flags(few, tmp_path / "out", **settings))
    assert "per step ranks 8 x accumulate 1 x tokens 168" in shown
    assert re.search(r"memory .* fits 80.0", shown)
    last = shown[shown.index("\nmemory ") :]
    assert "⟦" not in shown and "\n\n" not in last.rstrip()  # no conversations, nothing after it
    assert f" GB free in {tmp_path}\n" in last and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ the flags


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--epohcs", "3"], "--epohcs is not a flag of train.py; did you mean --epochs? --help"),
        (["chats.jsonl"], "unrecognized arguments: chats.jsonl"),
        (["--epochs", "three"], "argument --epochs: invalid int value"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--lr", "fast"], "--lr must be auto or a number above 0"),
        (["--beta", "0"], "--beta must be above 0"),
        (["--precision", "fp8"], "--precision must be bf16 or fp32"),
        (["--max-length", "9999"], "--max-length must be from 2 to --batch-tokens"),
        (["--plan-ranks", "8"], "--plan-ranks must be used with --dry-run"),
        (["--warmup-ratio", "-0.1"], "--warmup-ratio must be from 0 to 1"),
        (["--adam-beta2", "1"], "--adam-beta2 must be at least 0 and below 1"),
        (["--seed", "4294967296"], "--seed must be from 0 to 2^32 - 1"),
        (["--keep", "0"], "--keep must be at least 1"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_loaded(wrong, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.parse_arguments(["--model", "m", "--data", "d", "--out", "o", *wrong])
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.startswith("error: ") and shown.count("\n") == 1


@pytest.mark.parametrize("content", [b'--out "runs/x', b"\x8f"])
def test_a_file_of_flags_that_cannot_be_read_is_named(content, run, tmp_path):
    (tmp_path / "run.txt").write_bytes(content)
    code, _, shown = run(train.parse_arguments, f"@{tmp_path}/run.txt")
    assert code == 2 and shown.count("\n") == 1
    assert shown.startswith(f"error: @{tmp_path}/run.txt: ")


@pytest.mark.parametrize(
    "wrong, meant",
    [
        ("--batch_tokens", "--batch-tokens"),
        ("--epoch=3", "--epochs"),
        ("--eval-dta", "--eval-data"),
        ("--max-seq-length", "--max-length"),
        ("--no-rewards", "--no-reward"),
        ("--temp", None),
        ("--zzz", None),
    ],
)
def test_the_nearest_right_flag_is_named(wrong, meant, run, tmp_path):
    """On the command line and in a file, though others are missing."""
    (tmp_path / "run.txt").write_text(wrong)
    for arguments in ([wrong], [f"@{tmp_path}/run.txt"]):
        code, _, shown = run(train.parse_arguments, *arguments)
        assert code == 2 and shown.count("\n") == 1
        hint = f"; did you mean {meant}?" if meant else ";"
        name = wrong.split("=")[0]
        assert shown == f"error: {name} is not a flag of train.py{hint} --help lists all\n"


@pytest.mark.parametrize("arguments", [["--no-reward"], ["--epochs", "2", "--dry-run"]])
def test_without_data_the_error_names_the_flags_of_the_example(arguments, run):
    code, _, shown = run(train.parse_arguments, *arguments)
    assert code == 2 and shown.count("\n") == 1 and shown.startswith("error: missing: --model, --")
    train.parse_arguments([re.search(r"@\S+flags.txt", shown)[0], *arguments])


@pytest.mark.parametrize("world, tokens", [(1, 3072), (2, 1536), (4, 768), (64, 64)])
def test_without_flags_the_ranks_share_the_steps_tokens(world, tokens, monkeypatch):
    """The example takes as many steps on any ranks; each has room for a conversation."""
    said, taken = [], []

    class Some:
        errors_in_one_line, say = contextlib.nullcontext, said.append

    Some.world = world
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "Ranks", Some)
    monkeypatch.setattr(train, "run", lambda config, ranks: taken.append(config))
    train.main([])
    line = said[0].split("train.py ")[1].split()
    assert taken == [train.parse_arguments(line)] and taken[0].batch_tokens == tokens


@pytest.mark.parametrize(
    "arguments, missing",
    [
        (["--model", "m", "--out", "an out"], "--data"),
        (["--dry-run", "--data", "d"], "--model"),
        (["--evaluate", "--out", "o"], "--model, --eval-data"),
    ],
)
def test_the_error_of_a_missing_flag_names_it(arguments, missing, run):
    code, _, shown = run(train.parse_arguments, *arguments)
    assert code == 2 and shown.startswith(f"error: missing: {missing}; the embedded example's ")


@pytest.mark.parametrize(
    "main, arguments, shown",
    [
        (preview.main, ["d"], "error: the following arguments are required: --model"),
        (preview.main, ["d", "--modle", "m"],
         "error: --modle is not a flag of data.py; did you mean --model? --help lists all"),
        (plot.main, [], "error: the following arguments are required: RUN"),
        (plot.main, ["r", "--out", "f"],
         "error: --out is not a flag of plot.py; --help lists all"),
        (chat.main, [], "error: the following arguments are required: DIR"),
        (ablation.parse_arguments, ["--seed", "3"],
         "error: --seed is not a flag of ablation.py; did you mean --seeds? --help lists all"),
    ],
)  # fmt: skip
def test_every_command_says_in_one_line_what_is_wrong_or_missing(main, arguments, shown, run):
    assert run(main, *arguments) == (2, "", shown + "\n")


@pytest.mark.parametrize("value", ["-1", "-.5", "- 3", "-"])
def test_a_value_that_begins_with_a_minus_is_no_wrong_flag(value):
    parser = Parser(prog="it")
    parser.add_argument("text", nargs="*")
    assert parser.parse_args(["--", value, "text"]).text == [value, "text"]
    if value != "-1e3":  # which argparse takes for a flag in Python 3.11
        assert parser.parse_args([value]).text == [value]


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


def test_help_explains_every_flag(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # no explanation of two lines
    code, shown, _ = run(train.parse_arguments, "--help")
    explained = {}
    for flag in shown.split("\n  --")[1:]:
        names, explanation = re.split(r"\s\s+", flag.split("\n\n")[0], maxsplit=1)
        explained[re.split(r"\W", names.replace("-", "_"))[0]] = explanation
    assert code == 0
    assert explained.keys() == {field.name for field in train.dataclasses.fields(train.Config)}
    assert explained["clip"] == "largest gradient norm (default: 1.0)"
    assert explained["beta"].endswith(f"(default: {loss.BETA})")
    assert "\noptimizer:\n  --lr" in shown  # in the groups that Config has
    assert explained["seed"] == "order of the data, random weights"

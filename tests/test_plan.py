"""The plan before a run: its memory against what a small run holds, and two runs of real size;
and the compiled, recomputed step of fixed shape that it plans, against the plain one.
"""

import dataclasses
import json
import re
import shutil

import lives
import numpy as np
import processes
import pytest
import torch
from processes import flags
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import model
import support.plan
import train
from support import memory, report

NETWORK = model.LlamaConfig(128, 352, 4, 4, 64, 2, 32, max_position_embeddings=512)
LAYERS = NETWORK.num_hidden_layers


@pytest.fixture(scope="module")
def files(tmp_path_factory, sums):
    """(model folder, data): a small network with the sums' tokenizer, 600 conversations."""
    folder = tmp_path_factory.mktemp("plan")
    model.write_json(folder / "config.json", NETWORK.to_json())
    shutil.copy(sums / "tokenizer.model", folder)
    lines = [json.loads(line) for line in (sums / "train.jsonl").read_text().splitlines()[:600]]
    for number, line in enumerate(lines):
        line["messages"][1]["content"] *= 1 + number % 40
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder, path


def plan_of(files, ranks, out, **more):
    settings = {"model": files[0], "max_length": None, "batch_tokens": 512, "recompute": 0}
    settings |= {"compile": False} | more
    return processes.plan_of(flags(files[1], out, **settings), ranks, out)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made under it that are still alive: now, and the most at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        return sum(size for _, size in self.storages.values())


# -------------------------------------------------------------------------------------- memory


def test_parameters_gradients_and_optimizer_take_what_the_plan_says(files, ranks, tmp_path):
    plan = plan_of(files, ranks, tmp_path)
    llama, optimizer = train.build(plan, ranks)
    _, batches, total_weight = train.load_step(plan, ranks, 1)
    train.forward_backward(plan, ranks, llama, batches, total_weight)
    optimizer.step()
    memory = plan.memory

    def held(tensors):
        return sum(model.local_tensor(tensor).nbytes for tensor in tensors)

    assert held(llama.parameters()) == memory["parameters"]
    assert held(parameter.grad for parameter in llama.parameters()) == memory["gradients"]
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert held(value for value in states if value.dim()) == memory["AdamW"]


def test_no_gradient_of_a_step_lives_on_in_the_next(files, ranks, tmp_path, monkeypatch):
    alive, storages, gradients = [], [], train.forward_backward

    def watched(plan, ranks, llama, *batches):
        alive.append(sum(not storage.expired() for storage in storages))
        found = gradients(plan, ranks, llama, *batches)
        grads = [model.local_tensor(p.grad) for p in llama.parameters()]
        storages[:] = [StorageWeakRef(grad.untyped_storage()) for grad in grads]
        return found

    monkeypatch.setattr(train, "forward_backward", watched)
    monkeypatch.setattr(ranks, "listen", lambda: None)
    plan = plan_of(files, ranks, tmp_path, max_steps=3, epochs=1)
    deterministic = torch.are_deterministic_algorithms_enabled()
    assert train.train(plan, ranks, tmp_path)
    torch.use_deterministic_algorithms(deterministic)
    assert alive == [0, 0, 0] and storages


@pytest.mark.parametrize("shards", [1, 8])
def test_a_blocks_gradients_are_reduced_from_one_float32_copy_into_another(shards):
    """The first has the whole block, the second a rank's rows: nearly nothing of many ranks."""
    network = model.LlamaConfig(64, 96, 2, 4, 320, 2, 16)
    block = (network.parameter_count() - 2 * 320 * 64 - 64) // 2
    size = memory.Size(shards, 100, True, True, 3)
    many = size._replace(shards=10**9)
    of_each = [memory.estimate(network, s, 0)["gathered blocks"] for s in (size, many)]
    assert of_each[0] - of_each[1] == pytest.approx(4 * block / shards, rel=0.01)


@pytest.mark.parametrize("recompute", [0, 2, LAYERS])
def test_a_step_peaks_where_the_plan_says(files, ranks, tmp_path, recompute):
    """The most that is alive beside the parameters in forward and backward, to within 20 %."""
    plan = plan_of(files, ranks, tmp_path, recompute=recompute)
    llama = model.Llama(plan.network)
    llama.recompute = recompute
    model.random_parameters(llama, seed=0)
    batch = train.load_step(plan, ranks, 1)[1][0]
    assert len(batch.tokens) > 0.95 * plan.config.batch_tokens
    with LiveBytes() as live:
        train.forward(llama, plan, batch)[0].backward()
    memory = plan.memory
    planned = memory["gradients"] + memory["activations"] + memory["loss workspace"]
    assert 0.8 < planned / live.peak < 1.2


def test_a_compiled_block_saves_what_the_plan_says(files, ranks, tmp_path, compiler):
    plan = plan_of(files, ranks, tmp_path, compile=True)
    llama, _ = train.build(plan, ranks)
    batch = train.load_step(plan, ranks, 1)[1][0]
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train.forward(llama, plan, batch)
    parameters = sum(p.nbytes for p in llama.parameters())
    planned = plan.memory["activations"]
    assert 0.8 < planned / (sum(saved.values()) - parameters) < 1.5


SIZES = {  # as published; GPUs, and the GiB of one
    "llama-2-13b": (model.LlamaConfig(5120, 13824, 40, 40, 32000, 40, 128), 8, 79),
    "mistral-7b": (
        model.LlamaConfig(4096, 14336, 32, 32, 32000, 8, 128, "mistral"), 1, 139,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_the_plan_of_a_real_run_fits_its_gpus(name, llama2, sums, tmp_path):
    network, gpus, gib = SIZES[name]
    network = dataclasses.replace(network, max_position_embeddings=4096)
    model.write_json(tmp_path / "config.json", network.to_json())
    shutil.copy(llama2 / "tokenizer.model", tmp_path)
    shown = processes.succeeds(
        ["--dry-run", "--model", tmp_path, "--data", sums / "train.jsonl",
         "--plan-ranks", gpus, "--plan-memory", gib]
    )  # fmt: skip
    planned, available = re.search(r"about ([\d.]+) GiB per rank, fits ([\d.]+)", shown).groups()
    state = 16 * (network.parameter_count() + 2 * network.hidden_size) / gpus / 2**30
    assert state < float(planned) < float(available) == gib


def test_recomputing_more_blocks_than_there_are_is_recomputing_all(files, ranks, tmp_path):
    more, all_blocks = (
        plan_of(files, ranks, tmp_path, recompute=blocks) for blocks in (LAYERS + 3, LAYERS)
    )
    assert (more.memory, more.recompute) == (all_blocks.memory, LAYERS)


RUNNING = (processes.ROOT / "docs" / "RUNNING.md").read_text()
NETWORKS = {  # as published, with OpenChat's end of turn if the vocabulary lacks it; ranks, GiB
    "llama-2-13b": (model.LlamaConfig(5120, 13824, 40, 40, 32001, 40, 128), 8, 79),
    "Mistral-7B": (model.LlamaConfig(4096, 14336, 32, 32, 32001, 8, 128, "mistral"), 1, 139),
    "Llama-3.1-8B": (model.LlamaConfig(4096, 14336, 32, 32, 128256, 8, 128), 8, 79),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_memory_in_the_documents_is_what_the_estimate_gives(name):
    """For a batch of 80 conversations, on which the attention's part depends."""
    (network, shards, gib), text = NETWORKS[name], " ".join(RUNNING.split())
    size = memory.Size(shards, 8192, True, True, 80)
    blocks = memory.blocks_to_recompute(network, size, gib << 30)
    roomy = size._replace(resharded=False)
    size = size if memory.blocks_to_recompute(network, roomy, gib << 30) else roomy
    found = {part: of / 2**30 for part, of in memory.estimate(network, size, blocks).items()}
    total = float(re.search(rf"{name}.*?([\d.]+) GiB", text)[1])
    assert total == pytest.approx(sum(found.values()), abs=0.03)
    if blocks:
        assert re.search(rf"{name}[^()]*\({blocks} of {network.num_hidden_layers} blocks", text)
    if name in text.split("```")[1]:  # with its parts
        for part in found.keys() - {"attention"}:
            assert f"{part} {found[part]:.2f}" in text


def test_the_plan_says_what_a_run_needs_of_disk_and_time(seven_billion):
    """Against counts by hand: 12 bytes a parameter saved, 2 exported; 6 operations a weight."""
    plan = seven_billion(plan_ranks=2, plan_memory=80, keep=4, epochs=200, export_every=10)
    text, parameters = report.resources(plan), plan.network.parameter_count()
    disk = re.search(r"disk +checkpoints 5 x ([\d.]+) GB, exports 20 x ([\d.]+) GB\n", text)
    assert float(disk[1]) == pytest.approx(12e-9 * parameters, rel=0.01)
    assert float(disk[2]) == pytest.approx(2e-9 * parameters, rel=0.01)
    seconds = 6 * int(plan.dataset.lengths.sum()) * 200 * parameters / (2 * 0.4 * 989e12)
    hours = re.search(r"time +about ([\d.]+) h on 2 x H100 at 40 % of their peak", text)
    assert float(hours[1]) == pytest.approx(seconds / 3600, rel=0.05)
    assert "no GPU has confirmed these estimates" in text
    assert "time" not in report.resources(seven_billion())  # on a CPU


def test_moments_in_bf16_are_half_of_adamw_and_of_nothing_else(seven_billion):
    """In memory 4 bytes per parameter instead of 8, in a checkpoint 8 instead of 12."""
    given = {"plan_ranks": 2, "plan_memory": 141, "recompute": 0, "keep": 4}
    usual, half = seven_billion(**given), seven_billion(**given, adam_precision="bf16")
    parameters = usual.network.parameter_count()
    assert usual.memory | {"AdamW": 4 * parameters // 2} == half.memory
    text = report.resources(half)
    disk = re.search(r"disk +checkpoints 5 x ([\d.]+) GB, exports \d x ([\d.]+) GB\n", text)
    assert float(disk[1]) == pytest.approx(8e-9 * parameters, rel=0.01)
    assert float(disk[2]) == pytest.approx(2e-9 * parameters, rel=0.01)
    assert "AdamW (bf16 moments), " in report.schedule(half)
    assert "AdamW (fp32 moments), " in report.schedule(usual)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"plan_memory": 139}, "without recomputing"),
        ({"plan_memory": 115}, r"with (\d+) blocks fewer recomputed"),
        ({"plan_memory": 190}, None),  # nothing is recomputed
        ({"plan_memory": 139, "recompute": 20}, None),
        ({"plan_memory": 139, "adam_beta2": 0.999}, None),  # for which they are refused
    ],
)
def test_the_plan_says_which_blocks_moments_in_bf16_would_spare(given, words, seven_billion):
    given = given | {"plan_ranks": 1, "batch_tokens": 8192}
    plan = seven_billion(**given)
    said = re.search(r"fits (.*) with --adam-precision bf16\n", report.resources(plan))
    if not words:
        assert not said
        return
    half = seven_billion(**given, adam_precision="bf16")
    assert half.fits and "--adam-precision" not in report.resources(half)
    spared = re.fullmatch(words, said[1]).groups()
    assert plan.recompute - half.recompute == (int(*spared) if spared else plan.recompute) > 0


@pytest.mark.parametrize(
    ("given", "version", "words"),
    [
        ({}, "2.13.0+cu130", "needs CUDA"),
        ({"plan_memory": 80}, "2.11.0+cu130", "needs torch 2.12 or later, and this is 2.11.0"),
        ({"plan_memory": 80, "adam_beta2": 0.999}, "2.13.0", ".* 0.996, not 0.999: .* 0.001 "),
        ({"plan_memory": 80, "adam_beta1": 0.998}, "2.13.0", ".* 0.996, not 0.998: .* 0.002 "),
        ({"plan_memory": 80, "adam_beta2": 0.996}, "2.12.0", None),
    ],
)
def test_moments_in_bf16_are_refused_by_name_where_they_cannot_be(
    given, version, words, files, ranks, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    given = given | {"adam_precision": "bf16", "dry_run": "plan_memory" in given or None}
    if not words:
        assert plan_of(files, ranks, tmp_path, **given).size.moment == 2
        return
    with pytest.raises(ValueError, match=f"^--adam-precision bf16 {words}") as refused:
        plan_of(files, ranks, tmp_path, **given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("beta", [0.9, 0.95, 0.99, 0.996, 0.9962, 0.997, 0.999])
def test_a_decay_is_refused_if_it_leaves_a_bf16_number_where_it_is(beta):
    """Without gradients a moment must become less, whichever of bf16's numbers it is."""
    numbers = 1 + torch.arange(128) / 128  # those from 1 to 2; the others are like them
    stuck = (beta * numbers).bfloat16().float() == numbers
    config = train.Config(adam_beta2=beta)
    assert bool(stuck.any()) == bool(support.plan.obstacle_to_bf16_moments(config, cuda=True))


def test_moments_in_bf16_are_not_refused_for_an_evaluation_which_has_none(few, ranks, tmp_path):
    given = ["--evaluate", "--model", lives.small_model(tmp_path / "model", tied=False)]
    given += ["--eval-data", few, "--adam-precision", "bf16"]
    plan = processes.plan_of(given, ranks, tmp_path)
    assert plan.size.moment == 4


@pytest.mark.parametrize(
    ("given", "gathered"),
    [
        ({"plan_ranks": 8, "plan_memory": 40}, True),
        ({"plan_ranks": 8, "plan_memory": 31}, False),  # the estimate would be above 90 % of it
        ({"plan_ranks": 8, "plan_memory": 80, "batch_tokens": 32768}, False),
        ({"plan_ranks": 1, "plan_memory": 150}, True),
        ({}, False),  # a CPU, whose memory is not known
    ],
)
def test_blocks_are_gathered_once_if_the_plan_has_room(given, gathered, seven_billion):
    plan = seven_billion(**given)
    assert plan.size.resharded != gathered and plan.fits
    assert (", each gathered once\n" in report.resources(plan)) == gathered
    once, twice = (
        memory.estimate(plan.network, plan.size._replace(resharded=r), plan.recompute)
        for r in (False, True)
    )
    assert plan.memory == (once if gathered else twice)
    assert gathered == (sum(once.values()) <= 0.9 * plan.available and not plan.recompute)
    more = once.pop("gathered blocks") - twice.pop("gathered blocks")
    block = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert once == twice
    assert more == pytest.approx((2 if plan.bf16 else 4) * 30 * block, rel=1e-4)  # 2 of 32 always


@pytest.fixture
def seven_billion(files, ranks, tmp_path):
    """seven_billion(**flags) is the plan of Mistral-7B, with the vocabulary of the sums."""
    network = SIZES["mistral-7b"][0]
    network = dataclasses.replace(network, vocab_size=49, max_position_embeddings=4096)
    model.write_json(tmp_path / "config.json", network.to_json())
    shutil.copy(files[0] / "tokenizer.model", tmp_path)
    plain = {"model": tmp_path, "dry_run": True, "compile": None, "recompute": None}
    return lambda **more: plan_of(files, ranks, tmp_path, **plain | more)


# What does not fit, and the way that is proposed, with smaller changes that must not be enough.
DO_NOT_FIT = {
    "ranks": (
        {"plan_ranks": 2, "plan_memory": 40},
        {"4 ranks and --batch-tokens 512 --accumulate 1": []},
    ),
    "tokens or ranks": (
        {"plan_ranks": 8, "plan_memory": 20, "batch_tokens": 32768},
        {"8 ranks and --batch-tokens 8192 --accumulate 4": ["--batch-tokens 16384 --accumulate 2"]},
    ),
    "tokens and ranks": (
        {"plan_ranks": 4, "plan_memory": 20, "batch_tokens": 65536, "accumulate": 2},
        {"8 ranks and --batch-tokens 8192 --accumulate 16":
         ["--batch-tokens 8192", "--batch-tokens 16384 and 8 ranks"]},
    ),
    "replicas": (
        {"plan_ranks": 8, "plan_memory": 24, "replicas": 2},
        {"16 ranks and --batch-tokens 512 --accumulate 1": ["8 ranks"]},
    ),
    "blocks": (
        {"plan_ranks": 8, "plan_memory": 40, "batch_tokens": 32768, "recompute": 1},
        {"8 ranks and --batch-tokens 32768 --accumulate 1, without --recompute":
         ["--recompute 1"]},
    ),
    "blocks and ranks": (
        {"plan_ranks": 2, "plan_memory": 40, "recompute": 1},
        {"4 ranks and --batch-tokens 512 --accumulate 1, without --recompute":
         ["2 ranks, without --recompute"]},
    ),
    "a 16th of the tokens": (
        {"plan_ranks": 8, "plan_memory": 20, "batch_tokens": 131072},
        {"8 ranks and --batch-tokens 8192 --accumulate 16":
         ["--batch-tokens 16384 --accumulate 8"]},
    ),
    "nothing": (
        {"plan_ranks": 8, "plan_memory": 1},
        {"not even with 8192 ranks and --batch-tokens 32": ["8192 ranks and --batch-tokens 32"]},
    ),
}  # fmt: skip


def as_settings(way):
    """The settings that a text such as "--batch-tokens 512 --accumulate 4 and 8 ranks" names."""
    found = {n.replace("-", "_"): int(value) for n, value in re.findall(r"--(\S+) (\d+)", way)}
    if count := re.search(r"(\d+) ranks", way):
        found["plan_ranks"] = int(count[1])
    return found | ({"recompute": None} if "without --recompute" in way else {})


@pytest.mark.parametrize("name", DO_NOT_FIT)
def test_what_is_said_to_fit_fits_and_less_of_it_does_not(name, seven_billion):
    given, expected = DO_NOT_FIT[name]
    plan = seven_billion(**given)
    assert not plan.fits
    needed, ways = report.what_would_fit(plan).split("; ")
    assert needed.endswith(f" GiB per rank do not fit {given['plan_memory']}.00 GiB")
    assert [ways.removeprefix("it would with ")] == [*expected]
    for enough, smaller in expected.items():
        fits = seven_billion(**given | as_settings(enough)).fits
        assert fits == (not enough.startswith("not even"))
        for less in smaller:
            assert not seven_billion(**given | as_settings(less)).fits


def test_data_of_no_weight_at_all_are_refused(few, ranks, tmp_path):
    """exp(-1 / 0.01) is below the smallest weight, and the expert class has no conversation."""
    lines = few.read_text().splitlines()
    (tmp_path / "data").write_text("\n".join(line for line in lines if '"gpt3.5"' in line))
    for more in ({"beta": 0.1}, {"beta": 0.01, "reward": False}):
        processes.plan_of(flags(tmp_path / "data", tmp_path, **more), ranks, tmp_path)
    with pytest.raises(ValueError, match="the weight of every class in --data is 0: raise --beta"):
        processes.plan_of(flags(tmp_path / "data", tmp_path, beta=0.01), ranks, tmp_path)
    processes.plan_of(flags(few, tmp_path, beta=0.01), ranks, tmp_path)


def test_a_dry_run_that_does_not_fit_ends_with_1_and_what_to_change(files, tmp_path):
    arguments = flags(files[1], None, model=files[0], dry_run=True, plan_ranks=2, max_length=None)
    for gib, code in ((80, 0), (0.001, 1)):
        ended, shown = processes.run([*arguments, "--plan-memory", gib])
        schedule, memory = shown.index("\nschedule "), shown.index("MiB per rank, ")
        assert ended == code and schedule < memory
        assert ("DOES NOT FIT 1.02 MiB" in shown) == bool(code)
        last = shown.rstrip("\n").splitlines()[-1]
        assert last.startswith("error: ") == bool(code)
        assert all(len(line) <= 100 for line in shown.splitlines() if "/" not in line)


def test_a_run_that_does_not_fit_its_gpu_ends_before_a_weight_is_read(
    files, ranks, tmp_path, monkeypatch
):
    monkeypatch.setattr(memory, "of_a_rank", lambda planned: 1 << 20)
    monkeypatch.setattr(train, "build", None)
    config = train.parse_arguments([*map(str, flags(files[1], tmp_path / "out", model=files[0]))])
    with pytest.raises(ValueError, match=r"MiB per rank do not fit 1\.00 MiB; "):
        train.run(config, ranks)


# ------------------------------------------------------------------------------- the fast step


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile from a clean slate; without a C++ compiler its backend only traces."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if not shutil.which("g++"):
        compile_block = model.Block.compile

        def traced(block, **options):
            compile_block(block, backend="aot_eager", **options)

        monkeypatch.setattr(model.Block, "compile", traced)
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def losses_of(plan, ranks, steps=5, after_step=lambda step: None):
    llama, optimizer = train.build(plan, ranks)
    losses = []
    for step in range(1, steps + 1):
        _, batches, total_weight = train.load_step(plan, ranks, step)
        sums, _ = train.forward_backward(plan, ranks, llama, batches, total_weight)
        train.clip_and_update(optimizer, sums, plan.lr, plan.config.clip)
        losses.append(float(sums.loss))
        after_step(step)
    return losses


def test_blocks_gathered_once_learn_as_those_gathered_twice(files, ranks, tmp_path):
    plan = plan_of(files, ranks, tmp_path)
    once = dataclasses.replace(plan, size=plan.size._replace(resharded=False))
    assert losses_of(once, ranks) == losses_of(plan, ranks)


@pytest.mark.parametrize(
    "export_every, save_every, eval_every, max_steps",
    [(1, 1000, 0, 0), (2, 3, 4, 0), (0, 0, 5, 0), (2, 1, 0, 7), (1, 2, 3, 1)],
)
def test_the_plan_names_the_steps_that_save_export_and_evaluate(
    files, ranks, tmp_path, export_every, save_every, eval_every, max_steps
):
    every = {"export_every": export_every, "save_every": save_every, "eval_every": eval_every}
    more = {"epochs": 5, "batch_tokens": 4096, "max_steps": max_steps, "eval_data": files[1]}
    plan = plan_of(files, ranks, tmp_path, **every, **more)
    ends, total = plan.order.ends, plan.order.total
    assert total == (max_steps or ends[4])
    for step in range(total + 1):
        epoch = ends.index(step) + 1 if step in ends else 0  # that it ends
        export = step == total or bool(epoch and export_every and epoch % export_every == 0)
        assert (step in plan.exports) is export
        if step:
            save = export or bool(save_every and step % save_every == 0)
            assert (step in plan.saves) is save
        evaluate = export or step == 0 or bool(eval_every and step % eval_every == 0)
        assert (step in plan.evaluations) is evaluate
    assert max(plan.exports) == total
    assert not plan_of(files, ranks, tmp_path, **every, **more | {"eval_data": None}).evaluations


def test_weights_that_differ_between_machines_are_refused(stories, few, tmp_path, ranks):
    class Two(type(ranks)):
        def __init__(self):
            self.__dict__ |= vars(ranks)

        def gather(self, value):
            found = super().gather(value)
            return found if value != model.fingerprint(stories) else [*found, "12345678"]

    with pytest.raises(ValueError, match="stories260K: the weights differ between machines"):
        processes.plan_of(flags(few, tmp_path, model=stories, random_weights=None), Two(), tmp_path)


def test_every_bin_of_a_compiled_run_has_the_planned_shape(files, ranks, tmp_path):
    """Of all epochs and of the evaluation; FlashAttention's conditions on the offsets."""
    plan = plan_of(
        files, ranks, tmp_path, compile=True, epochs=4, max_length=200, batch_tokens=1000,
        eval_data=files[1],
    )  # fmt: skip
    tokens, offsets, longest = plan.shape
    steps = [plan.order.bins(step) for step in range(1, plan.order.total + 1)]
    fullest = max(len(b) for bins in steps for b in bins)
    assert fullest > max(len(b) for b in steps[0]) and longest == 200
    steps += data.pack(plan.eval_dataset.lengths, tokens, 1, 0, 0)
    for bins in [*steps, [np.arange(0)]]:
        batch = data.collate(plan.dataset, bins[0], plan.class_weights, plan.shape)
        lengths = batch.cu_seqlens.diff()
        assert len(batch.tokens) == tokens and len(batch.cu_seqlens) == offsets
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == tokens
        assert (lengths >= 0).all() and lengths.max() <= longest
    assert offsets <= fullest + 7  # the backward of FlashAttention takes room for each


def test_the_planned_shape_holds_evaluation_data_of_shorter_lines(files, ranks, tmp_path):
    turns = [{"role": role, "content": "1"} for role in ("user", "assistant")]
    short = tmp_path / "short.jsonl"
    short.write_text((json.dumps({"class": "gpt4", "messages": turns}) + "\n") * 120)
    plan = plan_of(files, ranks, tmp_path, compile=True, eval_data=short)
    (fullest,) = data.pack(plan.eval_dataset.lengths, 512, 1, 0, 0)[0]
    assert len(fullest) > plan.order.fullest + 2
    batch = data.collate(plan.eval_dataset, fullest, plan.class_weights, plan.shape)
    assert len(batch.cu_seqlens) == plan.shape[1]


def test_the_compiled_recomputed_step_of_fixed_shape_learns_as_the_plain_one(
    files, ranks, tmp_path, compiler
):
    plain = losses_of(plan_of(files, ranks, tmp_path), ranks)
    graphs = []
    fast = plan_of(files, ranks, tmp_path, compile=True, recompute=2)
    tokens = {len(b.tokens) for step in range(1, 6) for b in train.load_step(fast, ranks, step)[1]}
    assert tokens == {fast.config.batch_tokens}
    found = losses_of(fast, ranks, after_step=lambda step: graphs.append(dict(compiler["frames"])))
    assert found == pytest.approx(plain, rel=1e-5)
    assert plain[-1] < plain[0] - 0.1
    assert graphs[1]["ok"] and graphs[1] == graphs[-1], "compiled again after the second step"

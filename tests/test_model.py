"""model.py: the same logits as transformers, packed or alone; folders read and written exactly."""

import dataclasses
import json
import math
import os
import shutil
import struct
import threading
from pathlib import Path

import lives
import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import shared
from processes import SUMS, succeeds
from safetensors.torch import load_file, save_file
from small import SIZES, config_of, export, make_random, random_llama
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import chat
import data
import loss
import model
import train
from support.formats import Message
from support.ranks import Ranks


def packed(lengths, seed=0, vocabulary=SIZES["vocab_size"]):
    """(tokens, positions, cu_seqlens) of random conversations end to end."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return tokens, positions, torch.tensor([0, *lengths]).cumsum(0).int()


def assert_close(ours, theirs, relative=1e-4):
    """Errors of at most `relative` of the largest value."""
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < relative, f"relative error {error:.2g}"


# ------------------------------------------------------------------------- against transformers

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
VARIANTS = {
    "multi-head": {"num_key_value_heads": 4},
    "grouped heads": {},
    "one key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 20},
    "narrow heads": {"head_dim": 2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "linear scaling": {
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}
    },
    "llama3 scaling": {"rope_parameters": LLAMA3},
    "window": {"model_type": "mistral", "sliding_window": 7},
    "window, wide heads": {"model_type": "mistral", "sliding_window": 30, "head_dim": 12},
    "mistral without window": {"model_type": "mistral", "sliding_window": None},
    "another epsilon": {"rms_norm_eps": 0.1},
}


def transformers_folder(folder, max_shard_size="5GB", **changes):
    """A random checkpoint made and saved by transformers: its model, with the folder written."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    settings = SIZES | changes
    kind = settings.pop("model_type", "llama").title()
    config = getattr(transformers, f"{kind}Config")(**settings)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    make_random(theirs)
    theirs.save_pretrained(folder, max_shard_size=max_shard_size)
    return theirs


def assert_same_logits(llama, theirs, length=60):
    text = packed([length], vocabulary=llama.config.vocab_size)
    with torch.no_grad():
        assert_close(llama.eval()(*text), theirs(text[0][None]).logits[0])


def opened_by_transformers(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers_both_ways(name, tmp_path):
    theirs = transformers_folder(tmp_path / "theirs", **VARIANTS[name])
    llama = model.load(tmp_path / "theirs")
    assert_same_logits(llama, theirs)
    model.save(llama, tmp_path / "ours")
    assert_same_logits(llama, opened_by_transformers(tmp_path / "ours"))


def test_logits_of_stories260k_equal_transformers(stories):
    assert_same_logits(model.load(stories), opened_by_transformers(stories), 300)


def test_sharded_folders_go_both_ways(tmp_path):
    theirs = transformers_folder(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / model.INDEX).exists()
    llama = model.load(tmp_path / "theirs")
    assert_same_logits(llama, theirs)
    model.save(llama, tmp_path / "ours", shard_bytes=20_000)
    files = [path.stat() for path in (tmp_path / "ours").glob("*.safetensors")]
    assert len(files) > 2 and max(file.st_size for file in files) < 22_000
    readable = (tmp_path / "ours").stat().st_mode & 0o666
    assert {file.st_mode & 0o777 for file in files} == {readable}
    assert_same_logits(llama, opened_by_transformers(tmp_path / "ours"))


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("name", ["theta", "linear scaling", "llama3 scaling"])
def test_older_rope_keys_mean_the_same(name, key, tmp_path):
    theirs = transformers_folder(tmp_path, **VARIANTS[name])
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    rope[key] = rope.pop("rope_type")
    raw["rope_scaling"] = None if name == "theta" else rope
    write_json(tmp_path / "config.json", raw)
    assert_same_logits(model.load(tmp_path), theirs)


@pytest.mark.parametrize("extra", [{"rope_scaling": None}, {"rope_theta": 3.0}])
def test_new_rope_keys_win_over_old_ones_as_in_transformers(extra, tmp_path):
    transformers_folder(tmp_path, **VARIANTS["llama3 scaling"])
    raw = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", raw | extra)
    assert_same_logits(model.load(tmp_path), opened_by_transformers(tmp_path))


# ------------------------------------------------------------------------------------- packing

PACKED = {
    "grouped heads": {},
    "multi-head": {"num_key_value_heads": 4},
    "window": {"model_type": "mistral", "sliding_window": 9},
}
LENGTHS = {
    "mixed": [1, 200, 3, 64, 1, 17, 128, 33, 2, 100],
    "one": [37],
    "single tokens": [1, 1, 1],
    "padding": [5, 40, 12, 12, 3, 0, 0, 0],
    "empty ones between": [0, 4, 0, 0, 6],
}


def parts(lengths):
    """A slice of the packed row for each conversation that has tokens."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return [slice(low, high) for low, high in zip(ends, ends[1:], strict=False) if high > low]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", PACKED)
def test_a_conversation_in_a_batch_equals_it_alone(name, lengths):
    llama, lengths = random_llama(**PACKED[name]), LENGTHS[lengths]
    tokens, positions, cu_seqlens = packed(lengths)
    outward = torch.randn(len(tokens), SIZES["vocab_size"])

    logits = llama(tokens, positions, cu_seqlens)
    (logits * outward).sum().backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in llama.parameters()])

    llama.zero_grad()
    for part in parts(lengths):
        length = part.stop - part.start
        alone = llama(tokens[part], torch.arange(length), torch.tensor([0, length]).int())
        assert_close(logits[part], alone, 1e-5)
        (alone * outward[part]).sum().backward()
    summed = torch.cat([parameter.grad.flatten() for parameter in llama.parameters()])
    assert_close(gradient, summed, 1e-6)


@pytest.mark.parametrize("window", [None, 1, 9])
def test_attention_equals_the_sum_written_out(window):
    """softmax over exactly the tokens of one's own conversation, up to oneself, in the window."""
    lengths = LENGTHS["mixed"]
    _, positions, cu_seqlens = packed(lengths)
    which = torch.repeat_interleave(torch.tensor(lengths))
    q, k, v = random_heads(len(which), 4, 2)
    ours = model.PackedAttention(cu_seqlens, None, window)(q, k, v)
    seen = (which[:, None] == which) & (positions[:, None] >= positions)
    if window:
        seen &= positions[:, None] - positions < window
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    scores = torch.einsum("ihe,jhe->hij", q, k) / q.shape[-1] ** 0.5
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    assert_close(ours, torch.einsum("hij,jhe->ihe", probabilities, v), 1e-5)


def random_heads(tokens, heads, key_value_heads, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, n, head_dim) for n in (heads, key_value_heads, key_value_heads)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_rotation_of_bf16_is_the_exact_one_rounded_once():
    """Also far into the context, where a table in bf16 would be off by whole turns' parts."""
    config, (x, *_) = config_of(), random_heads(2000, 4, 4, head_dim=8)
    x, table = x.bfloat16(), model.rotary_embedding(config, torch.arange(2000))
    exact = model.rotate(x.double(), *table)
    error = (model.rotate(x, *table) - exact).abs()
    assert (error <= 2**-8 * exact.abs() + 1e-6).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("head_dim", [64, 20])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize("lengths", ["mixed", "padding", "single tokens"])
def test_varlen_attention_equals_rectangles(lengths, heads, window, head_dim):
    """In bf16 both err; varlen_attn by at most twice what the rectangles do, plus an epsilon:
    the gradient of one token's query is 0, which a flash kernel gets as a difference."""
    lengths = LENGTHS[lengths]
    inputs = random_heads(sum(lengths), *heads, head_dim=head_dim)
    inputs = [x.cuda().bfloat16() for x in inputs]
    _, _, cu_seqlens = packed(lengths)
    outward = torch.randn(sum(lengths), heads[0], head_dim, device="cuda")

    def run(inputs, on_rectangles):
        attention = model.PackedAttention(cu_seqlens.cuda(), max(lengths), window)
        out = attention.attend_rectangles(*inputs) if on_rectangles else attention(*inputs)
        return [out, *torch.autograd.grad(out, inputs, outward.to(out.dtype))]

    exact = run([x.double().requires_grad_() for x in inputs], True)
    inputs = [x.requires_grad_() for x in inputs]
    epsilon = 1e-2 * max(true.abs().max() for true in exact)
    for ours, torchs, true in zip(run(inputs, False), run(inputs, True), exact, strict=True):
        error, allowed = (ours - true).abs().max(), (torchs - true).abs().max()
        assert error <= 2 * allowed + epsilon


@pytest.mark.parametrize("window, left", [(None, -1), (8, 7), (9, -1), (10, -1)])
def test_a_window_that_holds_every_conversation_is_plain_causal_attention(
    monkeypatch, window, left
):
    """FlashAttention's faster path; Mistral's window is as long as the longest conversation."""
    windows = []
    monkeypatch.setattr(
        model, "varlen_attn", lambda q, *_, window_size, **__: windows.append(window_size) or q
    )
    q, k, v = random_heads(12, 2, 2, head_dim=8)
    model.PackedAttention(torch.tensor([0, 9, 12]), 9, window).attend_varlen(q, k, v)
    assert windows == [(left, 0)]


def test_only_the_rows_asked_for_reach_the_head():
    llama, text = random_llama(), packed([9, 4])
    rows = torch.tensor([2, 7, 11])
    assert_close(llama(*text, rows=rows), llama(*text)[rows], 1e-5)
    hidden, weight = llama(*text, objective=lambda *given: given, rows=rows)
    assert weight is llama.lm_head.weight
    assert_close(F.linear(hidden, weight), llama(*text)[rows], 1e-5)


@pytest.mark.parametrize("recompute", [1, 3])
def test_recomputed_activations_give_the_same_gradients(recompute):
    text, gradients = packed([20, 7, 33]), []
    for blocks in (0, recompute):
        llama = random_llama().train()
        llama.recompute = blocks
        llama(*text).pow(2).sum().backward()
        gradients.append([parameter.grad for parameter in llama.parameters()])
    for kept, again in zip(*gradients, strict=True):
        assert torch.equal(kept, again)


class MaskedAttention:
    """Attention of a fixed shape, whatever the conversations; grouped heads repeated."""

    def __init__(self, cu_seqlens, tokens):
        which = torch.bucketize(torch.arange(tokens), cu_seqlens.long(), right=True)
        self.mask = (which[:, None] == which).tril()

    def __call__(self, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, self.mask)[0].transpose(0, 1)


def compiled_once(llama, batches, attends):
    """All blocks compiled whole; returns the outputs, and fails where a batch compiled again."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for block in llama.model.layers:
        block.compile(fullgraph=True, dynamic=False, backend=counter)
    outputs, frames = [], []
    for batch, attend in zip(batches, attends, strict=True):
        outputs.append(llama(*batch, attend=attend, max_seqlen=48))
        outputs[-1].sum().backward()
        frames.append(counter.frame_count)
    assert 1 <= frames[0] <= 3, "a compilation a block at most"
    assert len(set(frames)) == 1, f"compilations after each batch: {frames}"
    return outputs


def test_a_compiled_block_compiles_once_for_all_batches_of_one_shape():
    pytest.importorskip("torch._dynamo.testing")
    llama = random_llama()
    batches = [packed(lengths, seed) for seed, lengths in enumerate([[40, 8], [1, 47], [24, 24]])]
    attends = [[MaskedAttention(b[2], 48)] * 3 for b in batches]
    plain = [llama(*batch) for batch in batches]
    for ours, theirs in zip(compiled_once(llama, batches, attends), plain, strict=True):
        assert_close(ours, theirs, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_varlen_attention_compiles_once():
    pytest.importorskip("torch._dynamo.testing")
    llama = random_llama(head_dim=16).cuda().bfloat16()
    batches = [[x.cuda() for x in packed(lengths)] for lengths in ([40, 8], [1, 47], [24, 24])]
    compiled_once(llama, batches, [None] * 3)


# ------------------------------------------------------------------------------ save and load


@pytest.mark.parametrize("shard_bytes", [5 << 30, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_network_loads_with_the_same_bits(dtype, shard_bytes, tmp_path):
    llama = random_llama(tie_word_embeddings=True).to(dtype)
    model.save(llama, tmp_path, shard_bytes=shard_bytes)
    again = model.load(tmp_path, dtype=dtype)
    assert again.config == llama.config
    for (name, ours), (same, read) in zip(
        llama.named_parameters(), again.named_parameters(), strict=True
    ):
        assert name == same and torch.equal(ours, read)


def test_every_config_survives_its_json(tmp_path):
    for changes in (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        {"model_type": "mistral", "sliding_window": 5, "eos_token_id": [2, 7], "rope_theta": 5.0},
        {"tie_word_embeddings": True, "bos_token_id": None, "head_dim": 6},
    ):
        config = config_of(**changes)
        write_json(tmp_path / "config.json", config.to_json())
        assert model.LlamaConfig.from_folder(tmp_path) == config


def test_parameter_count_is_the_networks(tmp_path):
    for changes in ({}, {"tie_word_embeddings": True}, {"head_dim": 20, "num_key_value_heads": 1}):
        llama = model.Llama(config_of(**changes))
        assert llama.config.parameter_count() == sum(p.numel() for p in llama.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_new_vocabulary_rows_are_the_float32_mean_of_the_others(tied, tmp_path):
    model.save(random_llama(tie_word_embeddings=tied), tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    wider = model.Llama(config_of(vocab_size=54, tie_word_embeddings=tied))
    model.check_weights(tmp_path, wider.config, new_rows=3)
    model.fill_parameters(wider, tmp_path, new_rows=3)
    for name in ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied):
        rows = wider.get_parameter(name)
        old = stored[name].float()
        assert torch.equal(rows[:51], old)
        assert torch.equal(rows[51:], old.double().mean(0).float().expand(3, -1))


def test_random_weights_are_a_function_of_the_seed_with_norms_of_one():
    ours, same, other = (model.Llama(config_of(initializer_range=0.05)) for _ in range(3))
    for llama, seed in ((ours, 5), (same, 5), (other, 6)):
        model.random_parameters(llama, seed)
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        else:
            assert not torch.equal(parameter, other.get_parameter(name))
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(
                0.05 / 6**0.5 if residual else 0.05, rel=0.15
            )


# --------------------------------------------------------------------- load into sharded networks


class Counted:
    """A slice of a safetensors file that counts the bytes read from it."""

    read, lock = 0, threading.Lock()

    def __init__(self, view):
        self.view, self.get_shape = view, view.get_shape

    def __getitem__(self, rows):
        part = self.view[rows]
        with Counted.lock:
            Counted.read += part.numel() * part.itemsize
        return part


def counted(path, opened=model.open_safetensors):
    return {name: Counted(view) for name, view in opened(path).items()}


# On two ranks most tensors have rows that do not divide, and some have one row, for one of them.
ODD = {"hidden_size": 5, "intermediate_size": 1, "num_attention_heads": 2}
ODD |= {"num_key_value_heads": 1, "head_dim": 2}
MESHES = {"two ranks": [0, 1], "two groups of one": [[0], [1]]}
NEW_ROWS = {"two ranks": [5, 55], "two groups of one": [60, 60]}  # of 111, behind 51 in the file


def load_sharded(arguments):
    """What each of two processes does; see test_a_sharded_load_equals_an_unsharded_one."""
    ranks, folder = Ranks(), Path(arguments[0])
    model.open_safetensors = counted
    for name, mesh in MESHES.items():
        names = ("replicate", "shard")[-torch.tensor(mesh).dim() :]
        llama = sharded(DeviceMesh("cpu", torch.tensor(mesh), mesh_dim_names=names))
        Counted.read = 0
        model.fill_parameters(llama, folder, new_rows=60, new_tokens=[3], ordinary_rows=50)
        full = {key: p.full_tensor().detach().clone() for key, p in llama.named_parameters()}
        held = sum(p.to_local().numel() for p in llama.parameters()) * 4
        result = {"read": torch.tensor(Counted.read), "held": torch.tensor(held)}
        result |= {f"full {key}": tensor for key, tensor in full.items()}
        model.random_parameters(llama, 3)
        random = {f"random {key}": p.full_tensor() for key, p in llama.named_parameters()}
        save_file(result | random, folder / f"{name}.{ranks.rank}")
    ranks.finish()


def sharded(mesh):
    with torch.device("meta"):
        llama = model.Llama(config_of(**ODD | {"vocab_size": 111}))
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(llama, mesh=mesh)
    return llama.to_empty(device="cpu")


@pytest.fixture(scope="module")
def sharded_loads(tmp_path_factory):
    """The folder, of a vocabulary of 51 rows; {mesh: [what each rank made of it]}."""
    folder = tmp_path_factory.mktemp("sharded")
    model.save(random_llama(**ODD), folder)
    succeeds([folder], 2, main=load_sharded)
    return folder, {name: [load_file(folder / f"{name}.{rank}") for rank in (0, 1)]
                    for name in MESHES}  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES)
def test_a_sharded_load_equals_an_unsharded_one(mesh, sharded_loads):
    folder, loads = sharded_loads
    alone = model.Llama(config_of(**ODD | {"vocab_size": 111}))
    for fill, key in (
        (lambda: model.fill_parameters(alone, folder, 60, [3], 50), "full"),
        (lambda: model.random_parameters(alone, 3), "random"),
    ):
        fill()
        for result in loads[mesh]:
            for name, parameter in alone.named_parameters():
                assert torch.equal(result[f"{key} {name}"], parameter), name


@pytest.mark.parametrize("mesh", MESHES)
def test_each_rank_reads_its_own_rows_alone(mesh, sharded_loads):
    folder, loads = sharded_loads
    size = sum(t.numel() * 4 for t in load_file(folder / "model.safetensors").values())
    groups = 2 if mesh == "two groups of one" else 1
    assert sum(result["read"] for result in loads[mesh]) == groups * size
    for result, new_rows in zip(loads[mesh], NEW_ROWS[mesh], strict=True):
        filled = 2 * new_rows * 5 * 4  # of embedding and head, five float32 a row
        assert result["held"] == result["read"] + filled


# -------------------------------------------------------------------------- configs that are wrong


def write_json(path, value):
    path.write_text(json.dumps(value))


RAW = SIZES | {"model_type": "llama"}
DELETE = "delete this key"
NOT_IMPLEMENTED = [
    ({"attention_bias": True}, "attention_bias other than False is not implemented"),
    ({"mlp_bias": True}, "mlp_bias other than False is not implemented"),
    ({"hidden_act": "gelu"}, "hidden_act other than 'silu' is not implemented"),
    ({"attention_dropout": 0.1}, "attention_dropout other than 0.0 is not implemented"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1.0 is not implemented"),
    ({"rope_interleaved": True}, "rope_interleaved other than False is not implemented"),
    ({"pruned_heads": {"0": [1]}}, "asks for pruned_heads, which is not implemented"),
    ({"model_type": "qwen2"}, "model_type 'qwen2' is not implemented (llama, mistral)"),
    ({"model_type": ["llama"]}, "model_type ['llama'] is not implemented"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_scaling 'yarn' is not"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "rope_scaling 'dynamic'"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_scaling ['linear'] is not implemented"),
    ({"rope_scaling": LLAMA3 | {"mscale": 2.0}}, "rope_scaling 'llama3' with mscale is not impl"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 2.0, "b": 1}},
     "rope_scaling 'default' with b, factor is not implemented"),
    ({"quantization_config": {"bits": 4}}, "asks for quantization_config, which is not impl"),
    ({"sliding_window": 16}, "sliding_window is implemented for model_type mistral only"),
    ({"num_experts": 8, "a_new_idea": 1}, "asks for a_new_idea, num_experts, which is not"),
    ({"no_such_key": 1}, "if it does not change the network, remove it"),
]
WRONG = [
    ({"hidden_size": 1 << 40}, "too large: its sizes make "),
    ({"vocab_size": 10**12}, "too large: its sizes make 64,000,000,023,264 parameters"),
    ({"num_hidden_layers": 10**9}, "too large: its sizes make "),
    ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number"),
    ({"intermediate_size": -1}, "intermediate_size must be a whole number"),
    ({"max_position_embeddings": "2048"}, "max_position_embeddings must be a whole number"),
    ({"vocab_size": 51.0}, "vocab_size must be a whole number of at least 1, not 51.0"),
    ({"num_attention_heads": True}, "must be a whole number"),
    ({"num_attention_heads": None}, "num_attention_heads must be a whole number"),
    ({"num_attention_heads": 3}, "hidden_size must be a multiple of num_attention_heads"),
    ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads"),
    ({"head_dim": 7}, "head_dim must be even"),
    ({"head_dim": [8]}, "head_dim must be a whole number"),
    ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a positive number, not 'tiny'"),
    ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
    ({"initializer_range": -1}, "initializer_range must be a positive number"),
    ({"rope_theta": float("nan")}, "rope_theta must be a positive number, not nan"),
    ({"rope_theta": float("inf")}, "rope_theta must be a positive number, not inf"),
    ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
    ({"rope_scaling": "linear"}, "must be an object, not 'linear'"),
    ({"rope_parameters": [1]}, "rope_parameters must be an object, not [1]"),
    ({"rope_scaling": {"type": "linear"}}, "needs positive numbers for factor"),
    ({"rope_scaling": {"type": "linear", "factor": -1}}, "needs positive numbers for factor"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "'llama3' needs positive numbers for"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor above low_freq_fact"),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a whole number of at"),
    ({"model_type": "mistral", "sliding_window": "8"}, "sliding_window must be a whole number of"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ({"hidden_size": DELETE}, "missing 1 required positional argument: 'hidden_size'"),
    ({"vocab_size": DELETE, "num_hidden_layers": DELETE}, "missing 2 required"),
]


@pytest.mark.parametrize(("change", "message"), NOT_IMPLEMENTED + WRONG, ids=lambda v: str(v)[:50])
def test_a_config_that_cannot_be_run_is_refused_by_name(change, message, tmp_path):
    raw = {key: value for key, value in (RAW | change).items() if value is not DELETE}
    write_json(tmp_path / "config.json", raw)
    with pytest.raises(ValueError) as refused:
        model.LlamaConfig.from_folder(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/config.json: ")
    assert message in str(refused.value)


HARMLESS = {
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None},
    "SmolLM2 Instruct": {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    "Unsloth": {"unsloth_version": "2024.11.7", "unsloth_fixed": True, "max_sequence_length": 512},
    "generation": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "prefix": "Say"},
    "loading": {"use_flash_attention_2": True, "attn_implementation": "eager", "torchscript": True},
    "training": {"neftune_noise_alpha": 5, "use_bfloat16": True, "finetuning_task": "chat"},
    "tokens": {"sep_token_id": 3, "decoder_start_token_id": 1, "tokenizer_class": "LlamaTokenizer"},
    "kinds": {"is_decoder": True, "is_encoder_decoder": True, "add_cross_attention": True},
    "encoders": {"tie_encoder_decoder": True, "cross_attention_hidden_size": 8},
    "outputs": {"id2label": {"0": "LABEL_0"}, "return_dict": True, "chunk_size_feed_forward": 2},
    "summaries": {"summary_type": "first", "summary_use_proj": True, "summary_activation": "tanh",
                  "summary_first_dropout": 0.1, "summary_proj_to_labels": True},
    "rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": None,
                                   "partial_rotary_factor": 1.0}},
    "old": {"task_specific_params": {"a": 1}, "tf_legacy_loss": True, "pruned_heads": {}},
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_config_keys_that_change_nothing_pass_as_in_transformers(name, good, tmp_path):
    folder = shutil.copytree(good[0], tmp_path / "folder")
    raw = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", raw | HARMLESS[name])
    llama = model.load(folder)
    assert dataclasses.replace(llama.config, rope_scaling=None) == config_of()
    assert_same_logits(llama, opened_by_transformers(folder))


@pytest.mark.parametrize("key", model.ONLY_VALUE)
def test_null_is_the_only_value_too(key, tmp_path):
    write_json(tmp_path / "config.json", RAW | {key: None})
    assert model.LlamaConfig.from_folder(tmp_path) == config_of()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"hidden_size": ', "cannot be read as JSON"),
        (b"", "cannot be read as JSON"),
        (b"\x80\x81", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"1" * 5000, "cannot be read as JSON"),
        (b'{"hidden_size": 8, "hidden_size": 16}', "'hidden_size' is given twice"),
        (b'{"rope_scaling": {"factor": 2, "factor": 4}}', "'factor' is given twice"),
        (b"[1, 2]", "must hold a JSON object, not list"),
        (b'"llama"', "must hold a JSON object, not str"),
        (b"{}", "missing 5 required positional arguments: 'hidden_size', 'inter"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json: ") as refused:
        model.LlamaConfig.from_folder(tmp_path)
    assert message in str(refused.value)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not found; --model needs a Hugging Face folder"):
        model.LlamaConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("HuggingFaceTB/SmolLM2-135M",
         "; fetch it with: hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M, "
         "and give SmolLM2-135M"),
        ("openchat/openchat_3.5",
         "; fetch it with: hf download openchat/openchat_3.5 --local-dir openchat_3.5, "
         "and give openchat_3.5"),
        ("here/model", ""),  # below a folder that is here: a path
        ("./openchat", ""),
        ("/a/b", ""),
        ("a/b/c", ""),
        ("gone", ""),
        ("here/file", ""),
    ],
)  # fmt: skip
def test_a_model_that_is_no_folder_is_said_and_how_to_fetch_one_of_the_hub(
    name, hint, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "file").write_text("")
    with pytest.raises(ValueError) as refused:
        model.LlamaConfig.from_folder(name)
    assert str(refused.value) == f"{name}: no such folder{hint}"


# ------------------------------------------------------------------------- weights that are wrong


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two saved folders of one network: (one file, several files with an index)."""
    root = tmp_path_factory.mktemp("good")
    model.save(random_llama(), root / "one")
    model.save(random_llama(), root / "many", shard_bytes=20_000)
    return root / "one", root / "many"


@pytest.fixture
def one(good, tmp_path):
    return shutil.copytree(good[0], tmp_path / "one")


@pytest.fixture
def many(good, tmp_path):
    return shutil.copytree(good[1], tmp_path / "many")


def refused(folder):
    with pytest.raises(ValueError) as error:
        model.load(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def test_all_tensors_that_do_not_fit_are_in_one_error(one):
    tensors = load_file(one / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.3.input_layernorm.weight"] = torch.ones(32)
    tensors["lm_head.weight"] = torch.ones(50, 32)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(48, 32)
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.ones(32, 32, dtype=torch.int8)
    save_file(tensors, one / "model.safetensors")
    message = refused(one)
    assert message.startswith(f"{one}: 6 tensors do not fit config.json:\n")
    for line in (
        "missing model.norm.weight [32]",
        "missing model.layers.1.mlp.up_proj.weight [48, 32]",
        "unexpected model.layers.3.input_layernorm.weight [32]",
        "lm_head.weight is [50, 32], config.json makes it [51, 32]",
        "model.layers.0.mlp.down_proj.weight is [48, 32], config.json makes it [32, 48]",
        "model.layers.0.self_attn.q_proj.weight has dtype I8, not one of",
    ):
        assert f"\n  {line}" in message


def test_what_old_checkpoints_store_twice_is_no_error(tmp_path):
    llama = random_llama(tie_word_embeddings=True)
    model.save(llama, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    text = packed([9])
    assert torch.equal(model.load(tmp_path)(*text), llama(*text))


@pytest.mark.parametrize("value", [0.25, math.nan])
def test_tied_embeddings_with_a_different_head_are_refused(value, tmp_path):
    llama = random_llama(tie_word_embeddings=True)
    model.save(llama, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] = value  # the last of all numbers
    save_file(tensors, tmp_path / "model.safetensors")
    message = refused(tmp_path)
    assert "lm_head.weight differs from model.embed_tokens.weight; remove the tensor, or" in message
    raw = json.loads((tmp_path / "config.json").read_text())
    write_json(tmp_path / "config.json", raw | {"tie_word_embeddings": False})
    loaded = model.load(tmp_path)  # as the error says
    assert torch.equal(loaded.lm_head.weight[:-1], head[:-1])


def test_tied_embeddings_with_nan_are_the_same_as_their_copy(tmp_path):
    llama = random_llama(tie_word_embeddings=True)
    llama.model.embed_tokens.weight.data[3] = math.nan
    model.save(llama, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].double()},
              tmp_path / "model.safetensors")  # fmt: skip
    model.load(tmp_path)


def test_two_sets_of_weights_in_one_folder_are_refused_by_both_names(many):
    model.save(random_llama(), many)  # over a folder of several files
    message = refused(many)
    assert f"two sets of weights, model.safetensors and {model.INDEX}; remove one" in message
    (many / model.INDEX).unlink()
    model.load(many)


def test_an_index_of_one_file_is_read(one):
    names = load_file(one / "model.safetensors")
    write_json(one / model.INDEX, {"weight_map": dict.fromkeys(names, "model.safetensors")})
    model.load(one)


def test_weights_of_other_names_beside_an_index_are_not_read(many):
    """Mistral's folders have theirs twice, the second time under names of its own."""
    save_file({"tok_embeddings.weight": torch.ones(2, 2)}, many / "consolidated.safetensors")
    model.load(many)


def test_a_vocabulary_that_is_not_the_configs_is_refused(one):
    with pytest.raises(
        ValueError, match=r"embed_tokens.weight is \[51, 32\].* makes it \[50, 32\]"
    ):
        model.check_weights(one, config_of(vocab_size=52), new_rows=2)


def with_header(header, body=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + body


def tensor(low, high, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [low, high]}


LYING = {
    "empty": b"",
    "no header": b"\x10\x00",
    "header beyond the file": struct.pack("<Q", 1000) + b"{}",
    "header of 2^62 bytes": struct.pack("<Q", 1 << 62) + b"{}",
    "header not JSON": with_header(b"\x00" * 64),
    "header a list": with_header([1]),
    "overlapping": with_header({"a": tensor(0, 8), "b": tensor(4, 12)}, b"\0" * 12),
    "beyond the file": with_header({"a": tensor(0, 800, (200,))}, b"\0" * 8),
    "backwards": with_header({"a": tensor(8, 0)}, b"\0" * 8),
    "negative": with_header({"a": tensor(-8, 0)}, b"\0" * 8),
    "shape is more than the bytes": with_header({"a": tensor(0, 8, (1 << 40,))}, b"\0" * 8),
    "shape overflows": with_header({"a": tensor(0, 8, (1 << 62, 1 << 62))}, b"\0" * 8),
    "no such dtype": with_header({"a": tensor(0, 8, dtype="F33")}, b"\0" * 8),
    "a hole": with_header({"a": tensor(0, 8), "b": tensor(16, 24)}, b"\0" * 24),
    "a pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93.",
}


@pytest.mark.parametrize("name", LYING)
def test_a_file_that_lies_about_itself_is_refused(name, one):
    (one / "model.safetensors").write_bytes(LYING[name])
    assert "model.safetensors: cannot be read as safetensors" in refused(one)


@pytest.mark.parametrize("kept", [4, 200, -1])
def test_a_truncated_file_is_refused(kept, one):
    path = one / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "model.safetensors: cannot be read as safetensors" in refused(one)


def test_a_flipped_bit_in_a_header_never_goes_unnoticed(one):
    """In the first tensor's entry: an error with the path in it, or the same numbers."""
    path = one / "model.safetensors"
    whole = bytearray(path.read_bytes())
    expected = {name: p.clone() for name, p in model.load(one).named_parameters()}
    start = whole.index(b'"lm_head.weight"')
    refusals = 0
    for position in range(start, start + 80):
        for bit in (0, 4):
            whole[position] ^= 1 << bit
            path.write_bytes(whole)
            whole[position] ^= 1 << bit
            try:
                llama = model.load(one)
            except ValueError as error:
                assert str(one) in str(error)
                refusals += 1
            else:
                assert all(torch.equal(p, expected[n]) for n, p in llama.named_parameters())
    assert refusals > 150


def test_no_weights_at_all_is_said(tmp_path):
    write_json(tmp_path / "config.json", RAW)
    assert not model.has_weights(tmp_path)
    assert "model.safetensors: cannot be read as safetensors: No such file" in refused(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth"])
def test_a_folder_of_pickled_weights_alone_is_refused(file, tmp_path):
    (tmp_path / file).write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match=f"{file}: a pickle; convert the weights to safetensors"):
        model.has_weights(tmp_path)


OUTSIDE = ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors"]
OUTSIDE += ["..", "", "x.bin", "x.safetensors/", "./x.safetensors", 7, None]


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_may_name_only_files_of_its_folder(file, many, monkeypatch):
    opened = []
    monkeypatch.setattr(model, "safe_open", lambda path, **how: opened.append(path))
    for inside in many.glob("*00001-of*"):  # a good file waits where the bad name points
        for elsewhere in (many.parent, many, many / "sub"):
            elsewhere.mkdir(exist_ok=True)
            shutil.copyfile(inside, elsewhere / "x.safetensors")
    index = json.loads((many / model.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = file
    write_json(many / model.INDEX, index)
    message = refused(many)
    assert f"index.json: model.norm.weight names {str(file)!r}, which is not a file of" in message
    assert not opened


def test_an_index_that_disagrees_with_its_files_is_refused(many):
    good = json.loads((many / model.INDEX).read_text())
    files = sorted(set(good["weight_map"].values()))

    def changed(**entries):
        weight_map = good["weight_map"] | entries
        weight_map = {name: file for name, file in weight_map.items() if file is not DELETE}
        write_json(many / model.INDEX, good | {"weight_map": weight_map})
        return refused(many)

    norm = {"model.norm.weight": files[0]}  # is in the last file
    assert f"disagrees with {files[0]} about model.norm.weight" in changed(**norm)
    assert "about extra.weight" in changed(**{"extra.weight": files[0]})
    assert "about model.norm.weight" in changed(**{"model.norm.weight": DELETE})
    missing = changed(**{"model.norm.weight": "gone.safetensors"})
    assert "gone.safetensors: cannot be read as safetensors: No such file" in missing


def test_a_tensor_in_two_files_is_refused(many):
    weight_map = json.loads((many / model.INDEX).read_text())["weight_map"]
    first = many / weight_map["model.embed_tokens.weight"]
    save_file(load_file(first) | {"model.norm.weight": torch.zeros(32)}, first)
    assert f"disagrees with {first.name} about model.norm.weight" in refused(many)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, not list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": [1]}', "has no weight_map"),
        ('{"weight_map": 3}', "has no weight_map"),
    ],
)
def test_an_index_without_weight_map_is_refused(content, message, many):
    (many / model.INDEX).write_text(content)
    assert f"{model.INDEX}: {message}" in refused(many)


def test_an_index_with_a_nul_in_a_name_is_refused(many):
    index = json.loads((many / model.INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "a\0.safetensors"
    write_json(many / model.INDEX, index)
    refused(many)


def test_a_folder_where_a_file_should_be_is_refused(one):
    os.remove(one / "model.safetensors")
    (one / "model.safetensors").mkdir()
    assert "model.safetensors: cannot be read" in refused(one)


def test_a_config_field_can_be_replaced_and_is_checked_again():
    with pytest.raises(ValueError, match="vocab_size must be a whole number"):
        dataclasses.replace(config_of(), vocab_size=0)


def test_end_of_turn_in_a_padded_vocabulary_becomes_the_mean_too(tmp_path):
    config = model.LlamaConfig(8, 8, 1, 1, 12, 1, 8)
    llama = model.Llama(config)
    model.random_parameters(llama, seed=0)
    model.save(llama, tmp_path)
    filled = model.Llama(config)
    model.fill_parameters(filled, tmp_path, new_tokens=[9])
    for stored, found in zip(llama.parameters(), filled.parameters(), strict=True):
        expected = stored.clone()
        if len(stored) == 12:
            expected[9] = stored[:9].double().mean(0)
        assert torch.equal(found, expected)


def test_a_mistral_without_the_key_has_transformers_window(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_json(tmp_path / "config.json", RAW | {"model_type": "mistral"})
    window = model.LlamaConfig.from_folder(tmp_path).sliding_window
    assert window == transformers.MistralConfig().sliding_window == 4096


REAL_CONFIGS = {
    "Llama-2-7b-hf": {
        "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
        "transformers_version": "4.31.0.dev0", "use_cache": True, "vocab_size": 32000,
    },
    "openchat_3.5": {
        "_name_or_path": "mistralai/Mistral-7B-v0.1", "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 8192,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.34.1", "use_cache": True, "vocab_size": 32002,
    },
    "Mistral-7B-v0.2": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True,
        "vocab_size": 32000,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("Llama-2-7b-hf", 6_738_415_616),
        ("openchat_3.5", 7_241_748_480),
        ("Mistral-7B-v0.2", 7_241_732_096),
    ],
)
def test_config_files_as_published_are_read(tmp_path, name, parameters):
    (tmp_path / "config.json").write_text(json.dumps(REAL_CONFIGS[name]))
    config = model.LlamaConfig.from_folder(tmp_path)
    assert config.parameter_count() == parameters
    assert config.sliding_window == REAL_CONFIGS[name].get("sliding_window")


# ------------------------------------------------------------------------------- byte order marks

BOM = b"\xef\xbb\xbf"


def test_byte_order_marks_change_nothing_in_a_folder(many, tmp_path):
    """Of every JSON file of an export in several files, and of an index."""
    folder = tmp_path / "export"
    shutil.copy(SUMS / "tokenizer.model", tmp_path)
    tokenizer = data.Tokenizer(tmp_path)
    export(random_llama(vocab_size=tokenizer.vocab_size), tokenizer, folder)
    write_json(folder / "generation_config.json", {"eos_token_id": [2]})

    def answers():
        talker = chat.Chat(folder)
        question = [Message("user", "1 + 2")]
        return talker.answers([question], max_new_tokens=8), talker.stop, model.load(many)

    plain = answers()
    marked = [*folder.glob("*.json"), *many.glob("*.json")]
    assert {path.name for path in marked} >= {"config.json", "crlft.json", "tokenizer_config.json",
                                              "generation_config.json", model.INDEX}  # fmt: skip
    for path in marked:
        path.write_bytes(BOM + path.read_bytes())
    assert answers()[:2] == plain[:2]


def test_byte_order_marks_change_nothing_in_classes_and_flags(few, tmp_path, run):
    """With Windows's ends of lines, as its editors write them."""
    classes, flags_file = tmp_path / "classes.json", tmp_path / "flags.txt"
    classes.write_bytes(BOM + json.dumps(CLASSES).encode())
    assert loss.read_classes(classes) == loss.class_table(CLASSES)
    flags_file.write_bytes(BOM + f"--model {SUMS}\r\n--data {few} --dry-run\r\n# end\r\n".encode())
    config = train.parse_arguments([f"@{flags_file}", "--classes", str(classes)])
    assert (config.model, config.data, config.dry_run) == (str(SUMS), [str(few)], True)


CLASSES = {"gpt4": {"condition": "GPT4", "reward": 1.0}}


# ------------------------------------------------------------------- a base that gives NaN already


@pytest.fixture(scope="module")
def nan(tmp_path_factory):
    """A folder with NaN in one late layer, as an overflow would leave it."""
    folder = lives.small_model(tmp_path_factory.mktemp("nan") / "nan", tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors")
    return folder


def test_nan_in_the_base_is_said_before_the_first_step(nan, few, tmp_path):
    """Found by the first step, or before it by the evaluation, whose line is JSON."""
    words = "The weights of --model already give this"
    settings = {"model": nan, "random_weights": None}
    shown = processes.refused(processes.flags(few, tmp_path / "a", **settings), words, ranks=2)
    assert "step 1: loss nan" in shown and f"{few}:" in shown and "--lr" not in shown
    out = tmp_path / "b"
    shown = processes.refused(processes.flags(few, out, **settings, eval_data=few), words)
    assert "step 1" not in shown and "the loss on --eval-data is not finite" in shown

    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    (line,) = (out / "metrics.jsonl").read_text().splitlines()
    line = json.loads(line, parse_constant=no_constant)
    assert line["step"] == 0
    assert [line["eval"][name]["loss"] for name in ("gpt4", "gpt3.5")] == [None, None]
    assert [line["eval"][name]["tokens"] > 0 for name in ("gpt4", "gpt3.5")] == [True, True]


def test_nan_in_what_is_only_evaluated_ends_with_1(nan, few):
    flags = ["--evaluate", "--model", nan, "--eval-data", few]
    shown = processes.refused(flags, "the loss on --eval-data is not finite")
    assert "The weights of --model already give this" in shown


# ----------------------------------------------------------------------- SmolLM2, but for its size


@pytest.fixture(scope="module")
def smollm2(few, tmp_path_factory):
    """A run on a network of SmolLM2's kind with its tokenizer: (folder it began with, RUN)."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    raw = json.loads(shared("cases/r3_smollm2_instruct_config.json").read_text())
    root = tmp_path_factory.mktemp("smollm2")
    folder = shutil.copytree(shared("tokenizers/smollm2"), root / "SmolLM2")
    raw |= {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}
    raw |= {"num_hidden_layers": 2, "vocab_size": 49152, "rope_theta": 100000.0}
    config = transformers.LlamaConfig(**{k: v for k, v in raw.items() if "js_config" not in k})
    torch.manual_seed(2)
    theirs = transformers.LlamaForCausalLM(config)
    make_random(theirs, 0.4)
    theirs.save_pretrained(folder)
    (folder / "config.json").write_bytes(BOM + json.dumps(raw).encode())  # as published, and marked
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes(BOM + (folder / name).read_bytes())
    flags = {"model": folder, "random_weights": None, "batch_tokens": 512, "max_length": 128}
    flags |= {"max_steps": 3, "eval_data": few, "lr": 1e-3}
    processes.succeeds(processes.flags(few, root / "run", **flags))
    return folder, root / "run"


def test_smollm2_has_transformers_logits(smollm2, tmp_path):
    folder = shutil.copytree(smollm2[0], tmp_path / "unmarked")
    llama = model.load(folder)  # with its byte order mark, which transformers does not read
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    write_json(folder / "config.json", raw)
    assert_same_logits(llama, opened_by_transformers(folder))


@pytest.mark.parametrize("name", ["gpt4", "gpt3.5"])
def test_smollm2_trained_answers_in_transformers_as_in_chat(name, smollm2):
    transformers = pytest.importorskip("transformers")
    talker = chat.Chat(smollm2[1] / "model", name, device="cpu")
    theirs = opened_by_transformers(smollm2[1] / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2[1] / "model")
    texts = ["What is 1+2?", "Hello", "  two  spaces", "日本語 😀", "1\n2", "\tx"]
    answers = talker.answers([[Message("user", text)] for text in texts], max_new_tokens=8)
    for text, (ours, _) in zip(texts, answers, strict=True):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], condition=name,
            add_generation_prompt=True, return_tensors="pt", return_dict=False,
        )  # fmt: skip
        assert ids[0].tolist() == talker.prompt([Message("user", text)])
        found = theirs.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert ours == tokenizer.decode(found, skip_special_tokens=True).strip()
    assert len({answer for answer, _ in answers}) > 3  # or there is nothing to compare

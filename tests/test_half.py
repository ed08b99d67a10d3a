"""What a GPU does in bf16, with real numbers: on CPU tensors that say `is_cuda`.

The interpreted kernel, several chunks of padded logits, products with a float32 result, and
varlen_attn with the conditions of FlashAttention 2: the branches that no CPU takes otherwise. Run
in a process with TRITON_INTERPRET=1, which test_cross_entropy.py starts.
"""

import contextlib
import os

import pytest
import torch
from small import random_llama

import data
import model
import train
from kernels import linear_cross_entropy

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available(), reason="see above"
)
V, CLASSES = 77, 2
real_mm, real_addmm = torch.mm, torch.addmm


class Flash:
    """varlen_attn by SDPA, a conversation at a time, in float32; its conditions asserted."""

    def __init__(self):
        self.calls = 0

    def __call__(
        self, q, k, v, cu_seq_q, cu_seq_k, max_q, max_k,
        *, scale=None, window_size=(-1, -1), enable_gqa=False,
    ):  # fmt: skip
        self.calls += 1
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[-1] == k.shape[-1]
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32 and cu_seq_q.is_contiguous()
        lengths = cu_seq_q.diff()
        assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(q) and (lengths >= 0).all()
        assert max_q == max_k >= lengths.max()
        assert enable_gqa or q.shape[1] == k.shape[1]
        left, right = window_size
        assert right == 0  # causal
        out = []
        for x, y, z in zip(*(t.float().split(lengths.tolist()) for t in (q, k, v)), strict=True):
            distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
            seen = (distance >= 0) & ((distance <= left) | (left < 0))
            attended = torch.nn.functional.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in (x, y, z)),
                attn_mask=seen, scale=scale, enable_gqa=True,
            )  # fmt: skip
            out.append(attended[0].transpose(0, 1))
        return torch.cat(out).to(q.dtype)


@pytest.fixture
def as_cuda(monkeypatch):
    """From here on a CPU's tensors take a GPU's branches; the stand-in for varlen_attn."""

    def mm(a, b, out_dtype=None, **more):
        wide = out_dtype or a.dtype
        assert a.dtype == b.dtype
        return real_mm(a.to(wide), b.to(wide), **more)

    def addmm(total, a, b, out_dtype=None, **more):
        assert a.dtype == b.dtype and total.dtype == (out_dtype or a.dtype)
        return real_addmm(total, a.to(total.dtype), b.to(total.dtype), **more)

    flash = Flash()
    for owner, name, value in [
        (torch, "mm", mm),
        (torch, "addmm", addmm),
        (torch.Tensor, "is_cuda", property(lambda tensor: True)),
        (torch.cuda, "device_of", lambda _: contextlib.nullcontext()),
        (model, "varlen_attn", flash),
    ]:
        monkeypatch.setattr(owner, name, value)
    return flash


def batch_of(lengths, rows, shape=()):
    """A Batch of random conversations, `rows` of their tokens supervised; (0, longest) pads."""
    generator = torch.Generator().manual_seed(len(lengths))
    T = sum(lengths)
    supervised = torch.randperm(T, generator=generator)[:rows].sort().values
    return data.Batch(
        torch.randint(V, (T,), generator=generator),
        torch.cat([torch.arange(n) for n in lengths]),
        torch.tensor([0, *lengths, *shape]).cumsum(0).int(),
        supervised,
        torch.randint(V, (rows,), generator=generator),
        torch.tensor([1.0, 0.1])[torch.arange(rows) % CLASSES],
        torch.arange(rows) % CLASSES,
    )


def step(llama, batch, longest):
    """(Σ w·CE, table, {parameter: gradient}) of one micro-batch."""
    for parameter in llama.parameters():
        parameter.grad = None
    objective = train.objective(batch, CLASSES)
    total, table = llama(
        batch.tokens, batch.positions, batch.cu_seqlens, objective, batch.rows, longest
    )
    total.backward()
    gradients = {name: p.grad.double() for name, p in llama.named_parameters()}
    return total.detach().double(), table, gradients


@pytest.mark.parametrize("chunk_rows", [1000, 2])
@pytest.mark.parametrize(
    "network",
    [
        {},
        {"sliding_window": 9, "model_type": "mistral"},
        {"head_dim": 20, "num_key_value_heads": 1},
        {"tie_word_embeddings": True},
    ],
    ids=["plain", "window", "heads of 20", "tied"],
)
def test_in_bf16_a_gpus_branches_err_as_the_cpus_do(network, chunk_rows, as_cuda, monkeypatch):
    """Both beside float64: the gradient of every parameter, the sum, and the table of classes."""
    llama = random_llama(vocab_size=V, **network)
    batch = batch_of([40, 1, 23, 8], rows=33, shape=[0, 0])
    monkeypatch.setitem(
        linear_cross_entropy.WORKSPACE_BYTES, "cpu", chunk_rows * linear_cross_entropy.padded(V) * 2
    )
    with monkeypatch.context() as cpu:
        cpu.setattr(torch.Tensor, "is_cuda", property(lambda tensor: False))
        exact = step(llama.bfloat16().double(), batch, 40)
        plain = step(llama.bfloat16(), batch, 40)
    assert not as_cuda.calls
    found = step(llama, batch, 40)
    assert as_cuda.calls == llama.config.num_hidden_layers
    for ours, torchs, true in zip(found[:2], plain[:2], exact[:2], strict=True):
        error, allowed = ((of - true).abs().max() for of in (ours, torchs))
        assert error <= 2 * allowed + 2**-9 * true.abs().max()
    for name, true in exact[2].items():
        error, allowed = ((of[2][name] - true).norm() for of in (found, plain))
        assert error <= 1.5 * allowed + 1e-3 * true.norm(), name

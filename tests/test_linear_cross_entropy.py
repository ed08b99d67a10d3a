"""loss.linear_weighted_cross_entropy, on whichever path this process takes (test_cross_entropy.py).

The exact result is float64 autograd's over the whole logits. Errors may be twice those of PyTorch
over the whole logits in the same dtype, plus an epsilon.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.linear_cross_entropy as chunked
import loss

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreted kernel cuts bf16 where a GPU rounds; test_ptx.py has the rounding.
ROUNDED = DTYPES[:2] if os.environ.get("TRITON_INTERPRET") == "1" else DTYPES
pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # to -inf, in the interpreter's NumPy


def case(N, V, D, dtype=torch.float32, zeros=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator).to(dtype).to(DEVICE).requires_grad_()
    lm_head = torch.randn(V, D, generator=generator).mul_(D**-0.5).to(dtype).to(DEVICE)
    targets = torch.randint(V, (N,), generator=generator).to(DEVICE)
    weights = torch.rand(N, generator=generator) + 0.1
    weights[torch.rand(N, generator=generator) < zeros] = 0
    return hidden, lm_head.requires_grad_(), targets, weights.to(DEVICE)


def whole(hidden, lm_head, targets, weights):
    losses = F.cross_entropy((hidden @ lm_head.t()).float(), targets, reduction="none")
    return (losses * weights).sum()


def exactly(hidden, lm_head, targets, weights):
    losses = F.cross_entropy(hidden @ lm_head.t(), targets, reduction="none")
    return (losses * weights.double()).sum()


def fused(*arguments):
    return loss.linear_weighted_cross_entropy(*arguments)[0]


def with_gradients(function, hidden, lm_head, targets, weights, scale=1.0):
    leaves = hidden.detach().requires_grad_(), lm_head.detach().requires_grad_()
    total = function(*leaves, targets, weights)
    return total.detach(), *torch.autograd.grad(total * scale, leaves)


def in_chunks_of(rows, V, dtype, monkeypatch):
    stride = chunked.padded(V) if CUDA else V
    budget = {DEVICE: rows * stride * dtype.itemsize}
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", budget)


# Of 13 rows: each alone, pairs and a last one, 5 + 5 + 3, 12 + 1, all at once; Llama 3's V.
@pytest.mark.parametrize("rows, V", [(1, 75), (2, 75), (5, 75), (12, 75), (13, 75), (5, 128256)])
def test_every_chunk_size_gives_the_unfused_result(rows, V, monkeypatch):
    arguments = case(13, V, 20, zeros=0.3)
    in_chunks_of(rows, V, torch.float32, monkeypatch)
    found = with_gradients(fused, *arguments)
    dense = with_gradients(
        lambda h, w, t, c: loss.weighted_cross_entropy(h @ w.t(), t, c).sum(), *arguments
    )
    exact = with_gradients(exactly, *[a.double() for a in arguments[:2]], *arguments[2:])
    for a, b, c in zip(found, dense, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("chunks", [1, 16])
def test_error_is_within_twice_torchs(dtype, chunks, monkeypatch):
    """Also what a d_lm_head summed in bf16 over many chunks would break."""
    N, V, D = 48, 131, 48
    arguments = case(N, V, D, dtype)
    in_chunks_of(N // chunks, V, dtype, monkeypatch)
    found = with_gradients(fused, *arguments)
    torchs = with_gradients(whole, *arguments)
    exact = with_gradients(exactly, *[a.double() for a in arguments[:2]], *arguments[2:])
    for a, b, c in zip(found, torchs, exact, strict=True):
        assert a.dtype == b.dtype
        error, allowed = ((x.double() - c).norm() / c.norm() for x in (a, b))
        assert error <= 2 * allowed + 2e-7


def test_d_lm_head_is_summed_in_float32(monkeypatch):
    """One large contribution, then many too small for a 16-bit sum to notice."""
    N, V, D = 32, 8, 4
    hidden = torch.ones(N, D, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    lm_head = torch.zeros(V, D, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.long, device=DEVICE)
    weights = torch.full((N,), 2.0**-9, device=DEVICE)
    weights[0] = 1
    in_chunks_of(1, V, torch.bfloat16, monkeypatch)
    fused(hidden, lm_head, targets, weights).backward()
    expected = (1 / V - 1) * (1 + (N - 1) * 2.0**-9)
    torch.testing.assert_close(
        lm_head.grad[0].float(), torch.full((D,), expected, device=DEVICE), rtol=2**-7, atol=0
    )


def test_a_workspace_on_cuda_has_rows_that_start_on_16_bytes():
    class OnCuda(torch.Tensor):
        is_cuda = True

    hidden = torch.empty(300, 8, dtype=torch.bfloat16).as_subclass(OnCuda)
    workspace = chunked.logits_workspace(hidden, torch.empty(32002, 8))
    assert workspace.shape[1] == 32002 and workspace.stride() == (32064, 1)


@pytest.mark.skipif(CUDA, reason="memory there is bench/kernels.py's to measure")
def test_whole_logits_never_exist(monkeypatch):
    N, V, D = 24, 300, 8

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.size = max(self.size, tensor.nbytes)
            return result

    in_chunks_of(8, V, torch.float32, monkeypatch)
    with Largest() as largest:
        fused(*case(N, V, D)).backward()
    assert largest.size == 4 * 8 * V  # a chunk's logits, and lm_head itself is as large


@pytest.mark.parametrize("rows", [2, 64])
def test_rows_of_weight_0_may_hold_anything(rows, monkeypatch):
    hidden, lm_head, targets, weights = case(9, 40, 16)
    in_chunks_of(rows, 40, torch.float32, monkeypatch)
    dead = torch.tensor([1, 4, 8], device=DEVICE)
    live = torch.tensor([0, 2, 3, 5, 6, 7], device=DEVICE)
    targets[dead], weights[dead] = torch.tensor([-100, 40, 2**40], device=DEVICE), 0
    expected = with_gradients(fused, hidden[live], lm_head, targets[live], weights[live])
    spoiled = hidden.detach().clone()
    spoiled[dead] = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)[
        :, None
    ]
    total, d_hidden, d_lm_head = with_gradients(fused, spoiled, lm_head, targets, weights)
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(d_hidden[live], expected[1])
    torch.testing.assert_close(d_lm_head, expected[2])
    assert (d_hidden[dead] == 0).all()


def test_per_token_losses_and_correct():
    hidden, lm_head, targets, weights = case(30, 12, 16, zeros=0.3)
    total, correct, losses = loss.linear_weighted_cross_entropy(
        hidden, lm_head, targets, weights, per_token=True
    )
    logits = hidden @ lm_head.t()
    expected = F.cross_entropy(logits, targets, reduction="none") * weights
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, losses.sum())
    assert not losses.requires_grad and total.requires_grad
    assert torch.equal(correct, (logits.argmax(1) == targets) & (weights != 0))


def test_a_kept_graph_gives_the_same_gradients_twice():
    arguments = case(9, 40, 16)
    total = fused(*arguments)
    first = torch.autograd.grad(total * 7, arguments[:2], retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(total * 7, arguments[:2])
    once = with_gradients(fused, *arguments)[1:]
    for a, b, c, d in zip(first, kept, second, once, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        torch.testing.assert_close(a, c, rtol=0, atol=0)
        torch.testing.assert_close(a, 7 * d)


def test_a_second_derivative_is_refused():
    arguments = case(9, 40, 16)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(fused(*arguments), arguments[:2], create_graph=True)


@pytest.mark.parametrize("frozen", ["hidden", "lm_head", "both", "no_grad"])
def test_what_is_frozen_costs_no_product(frozen, monkeypatch):
    hidden, lm_head, targets, weights = case(9, 40, 16)
    _, d_hidden, d_lm_head = with_gradients(fused, hidden, lm_head, targets, weights)
    hidden.requires_grad_(frozen in ("lm_head", "no_grad"))
    lm_head.requires_grad_(frozen in ("hidden", "no_grad"))

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "mm" in function.__name__
            return function(*args, **kwargs or {})

    with Products() as products, torch.set_grad_enabled(frozen != "no_grad"):
        total = fused(hidden, lm_head, targets, weights)
    assert products.count == (1 if frozen in ("both", "no_grad") else 2)
    if total.requires_grad:
        total.backward()
        grad, expected = (
            (lm_head.grad, d_lm_head) if frozen == "hidden" else (hidden.grad, d_hidden)
        )
        torch.testing.assert_close(grad, expected)
    assert total.requires_grad == (frozen in ("hidden", "lm_head"))


def test_no_rows_give_zeros_that_autograd_knows():
    hidden, lm_head, targets, weights = case(4, 40, 16)
    total, correct = loss.linear_weighted_cross_entropy(
        hidden[:0], lm_head, targets[:0], weights[:0]
    )
    total.backward()
    assert total == 0 and correct.shape == (0,)
    assert (lm_head.grad == 0).all() and (hidden.grad == 0).all()


def test_autocast_computes_in_its_dtype():
    hidden, lm_head, targets, weights = case(20, 40, 16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        total, *gradients = with_gradients(fused, hidden, lm_head, targets, weights)
        mixed = with_gradients(fused, hidden.bfloat16(), lm_head, targets, weights)
    expected = with_gradients(fused, hidden.bfloat16(), lm_head.bfloat16(), targets, weights)
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(mixed[0], expected[0])
    for grad, right in zip(gradients, expected[1:], strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, right.float())


def test_autocast_in_many_chunks_equals_one(monkeypatch):
    arguments = case(20, 40, 16)
    results = []
    for rows in (20, 3):
        in_chunks_of(rows, 40, torch.bfloat16, monkeypatch)
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            results.append(with_gradients(fused, *arguments))
    for one, many in zip(*results, strict=True):
        torch.testing.assert_close(many, one, rtol=2**-7, atol=2**-8)


def test_a_scale_is_not_rounded_to_16_bits():
    """1.003 is 1 in bf16; and a product of rounded numbers is rounded once."""
    arguments = case(20, 40, 16, torch.bfloat16)
    _, *plain = with_gradients(fused, *arguments)
    _, *found = with_gradients(fused, *arguments, scale=1.003)
    for grad, once in zip(found, plain, strict=True):
        assert torch.equal(grad, (once.float() * 1.003).bfloat16())


def test_wrong_arguments_are_named():
    hidden, lm_head, targets, weights = case(4, 40, 16)
    with pytest.raises(ValueError, match="bfloat16 and .* of one dtype"):
        fused(hidden.bfloat16(), lm_head, targets, weights)
    with pytest.raises(ValueError, match=r"\(4, 15\) .* must be \(N, D\) and \(V, D\)"):
        fused(hidden[:, 1:], lm_head, targets, weights)
    with pytest.raises(ValueError, match=r"\(1, 4, 16\) .* must be \(N, D\) and \(V, D\)"):
        fused(hidden[None], lm_head, targets, weights)
    with pytest.raises(ValueError, match="must be"):
        fused(hidden, lm_head, targets[1:], weights)
    if not CUDA:
        with pytest.raises(IndexError, match=r"0..39: targets\[3\] is 40"):
            fused(hidden, lm_head, targets.index_fill(0, torch.tensor([3]), 40), weights)


def test_gradcheck_in_float64():
    hidden, lm_head, targets, weights = case(5, 11, 3, torch.float64, zeros=0.3)
    torch.autograd.gradcheck(lambda h, w: fused(h, w, targets, weights), (hidden, lm_head))


@pytest.mark.skipif(not CUDA, reason="a CPU has nothing to wait for")
def test_the_host_never_waits():
    arguments = case(300, 40, 16, torch.bfloat16)
    fused(*arguments).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (fused(*arguments) * 0.5).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


SHARDED = """
import torch, torch.distributed as dist, torch.nn as nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
import loss

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.lm_head = nn.Linear(16, 16, bias=False), nn.Linear(16, 75, bias=False)

    def forward(self, x, targets, weights):
        hidden, lm_head = self.body(x), self.lm_head.weight
        return loss.linear_weighted_cross_entropy(hidden, lm_head, targets, weights)

device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank = dist.get_rank()
if device == "cuda":
    torch.cuda.set_device(rank)
torch.manual_seed(0)
x, targets, weights = torch.randn(10, 16), torch.randint(75, (10,)), torch.rand(10)
x, targets, weights = [t.to(device) for t in (x, targets, weights)]
whole = Model().to(device)
(whole(x, targets, weights)[0] / weights.sum()).backward()
sharded = Model().to(device)
sharded.load_state_dict(whole.state_dict())
mesh = dist.init_device_mesh(device, (2,))
policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
fully_shard(sharded, mesh=mesh, mp_policy=policy)
rows = slice(0, 3) if rank == 0 else slice(3, 10)
total, _ = sharded(x[rows], targets[rows], weights[rows])
(total * 2 / weights.sum()).backward()  # fully_shard takes the mean over ranks
for (name, a), b in zip(sharded.named_parameters(), whole.parameters()):
    torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-5, atol=1e-6)
sharded.reshard()
try:
    loss.linear_weighted_cross_entropy(x, sharded.lm_head.weight, targets, weights)
    raise SystemExit("a DTensor went through")
except TypeError as error:
    assert "lm_head is a DTensor" in str(error)
dist.barrier()  # a rank that leaves before the other reads can take it down
dist.destroy_process_group()
"""


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="once is enough")
def test_inside_a_sharded_root_two_ranks_equal_one(tmp_path):
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # two ranks, at most one GPU
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]

"""loss.weighted_cross_entropy of given logits, on whichever path this process takes.

The same tests hold for the Triton kernel on a GPU, for the kernel interpreted, and for plain
PyTorch. Triton reads TRITON_INTERPRET as it is imported, so the interpreted kernel gets a process
of its own, started by test_the_interpreted_kernel_passes_too; compiling needs one without it.

The exact result is float64 autograd's. Errors may be twice those of PyTorch's float32
cross-entropy rounded once to the logits' dtype, plus an epsilon.
"""

import importlib.metadata
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import loss

ROOT = Path(__file__).parents[1]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL = CUDA or INTERPRETED
TRITON = importlib.util.find_spec("triton") is not None
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(seed, N, V, dtype, scale=1.0, zeros=0.3, padding=0, offset=0):
    """logits (N, V) inside a wider buffer, targets, weights of which a share is 0."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(N, offset + V + padding, generator=generator).mul_(scale)
    buffer = buffer.to(dtype).to(DEVICE)
    targets = torch.randint(V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator) * 2
    weights[torch.rand(N, generator=generator) < zeros] = 0
    return buffer, buffer[:, offset : offset + V], targets.to(DEVICE), weights.to(DEVICE)


def losses_and_gradient(function, logits, targets, weights, grad_losses):
    logits = logits.detach().requires_grad_()
    losses = function(logits, targets, weights)
    losses.backward(grad_losses.to(losses.dtype))
    return losses.detach(), logits.grad


def torchs_own(logits, targets, weights):
    return F.cross_entropy(logits, targets, reduction="none") * weights


def assert_within_twice(ours, torchs, exact, epsilon):
    error, allowed = (ours - exact).abs().amax(), (torchs - exact).abs().amax()
    assert error <= 2 * allowed + epsilon, f"error {error:.3g}, PyTorch's {allowed:.3g}"


def random_cases():
    random.seed(3)
    for seed in range(28):
        V = random.choice([1, 2, 3, 7, 8, 9, 41, 255, 256, 257, 1000, 4099])
        yield (
            seed, random.randint(1, 6), V, random.choice(DTYPES), random.choice([0.1, 1, 20]),
            random.choice([0, 0.5]), random.randint(0, 19), random.randint(0, 11),
        )  # fmt: skip
    for seed, V in enumerate((1, 2, 41, 32000, 32002, 128257)):
        for dtype in DTYPES:
            yield seed, 2 if V < 1e5 else 1, V, dtype, 3.0, 0, 0, 0
    yield 7, 3, 32002, torch.bfloat16, 3.0, 0.5, 5, 3
    yield 8, 3, 32002, torch.bfloat16, 3.0, 0, 1, 0


@pytest.mark.parametrize("arguments", list(random_cases()), ids=str)
def test_error_is_within_twice_torchs(arguments):
    _, logits, targets, weights = case(*arguments)
    grad_losses = torch.linspace(-1, 3, len(logits), device=DEVICE)
    results = [
        losses_and_gradient(function, values, targets, weights, grad_losses)
        for function, values in (
            (loss.weighted_cross_entropy, logits),
            (torchs_own, logits.float()),
            (torchs_own, logits.double()),
        )
    ]
    (losses, grad), (torch_losses, torch_grad), (exact_losses, exact_grad) = results
    assert losses.dtype == torch.float32 and grad.dtype == logits.dtype
    assert_within_twice(losses, torch_losses, exact_losses, 1e-6 * exact_losses.abs().amax())
    # Half an ulp for grad_losses, which comes when grad has been rounded already; the interpreter
    # cuts float32 to bf16 where a GPU rounds, which makes it a whole one.
    ulp = torch.finfo(grad.dtype).eps * exact_grad.abs().amax() + 1e-7
    epsilon = ulp if INTERPRETED and grad.dtype == torch.bfloat16 else ulp / 2
    assert_within_twice(grad, torch_grad.to(grad.dtype), exact_grad, epsilon)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("V, padding, offset", [(41, 7, 5), (1003, 2, 3), (1, 3, 1)])
def test_every_output_is_written_and_no_neighbour(V, padding, offset, in_place, dtype):
    buffer, logits, targets, weights = case(5, 6, V, dtype, padding=padding, offset=offset)
    weights[0], weights[1] = 1, 0
    losses = torch.full((6,), float("nan"), device=DEVICE)
    correct = torch.ones(6, dtype=torch.bool, device=DEVICE)
    before, backend = buffer.clone(), loss._backend_for(logits)
    grad = logits if in_place else backend.empty_gradient(logits).fill_(float("nan"))
    exact = torch.softmax(logits.double(), 1) - F.one_hot(targets, V)
    backend.cross_entropy_rows(logits, targets, weights, losses, correct, grad)

    torch.testing.assert_close(
        grad.double(), exact * weights[:, None], rtol=2**-6, atol=2 * torch.finfo(dtype).eps
    )
    assert (grad[weights == 0] == 0).all() and (losses[weights == 0] == 0).all()
    assert losses.isfinite().all() and not correct[weights == 0].any()
    if in_place:
        buffer[:, offset : offset + V] = before[:, offset : offset + V]
    assert torch.equal(buffer, before)


def test_a_row_of_weight_0_is_never_read():
    _, logits, targets, weights = case(0, 8, 300, torch.float32, zeros=0)
    expected = losses_and_gradient(
        loss.weighted_cross_entropy, logits, targets, weights, torch.ones(8, device=DEVICE)
    )
    logits, targets, grad_losses = logits.clone(), targets.clone(), torch.ones(8, device=DEVICE)
    for row, value in ((1, float("nan")), (4, float("inf")), (5, -float("inf"))):
        logits[row], targets[row], weights[row] = value, (-100, 2**40, 300)[row % 3], 0
        grad_losses[row] = value
        expected[0][row], expected[1][row] = 0, 0
    found = losses_and_gradient(loss.weighted_cross_entropy, logits, targets, weights, grad_losses)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_all_weights_0_give_zeros():
    logits = torch.full((5, 33), float("nan"), device=DEVICE)
    zeros = torch.zeros(5, device=DEVICE)
    losses, grad = losses_and_gradient(
        loss.weighted_cross_entropy, logits, zeros.long() - 1, zeros, zeros + 1
    )
    assert (losses == 0).all() and (grad == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's NumPy
def test_infinite_logits_are_torchs():
    _, logits, targets, weights = case(2, 6, 50, torch.float32, zeros=0)
    logits[0, : targets[0]] = -float("inf")  # masked tokens
    logits[1, targets[1]] = -float("inf")  # an impossible target: infinite loss, finite gradient
    logits[2] = -float("inf")  # nothing possible: NaN
    logits[3, 7] = float("inf")
    logits[4, 7] = float("nan")
    ones = torch.ones(6, device=DEVICE)
    found = losses_and_gradient(loss.weighted_cross_entropy, logits, targets, weights, ones)
    expected = losses_and_gradient(torchs_own, logits, targets, weights, ones)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_confident_row_keeps_its_targets_gradient(dtype):
    """p = .9995 is 1 in bf16, so w·(p - 1) taken of rounded numbers would be 0."""
    logits = torch.zeros(2, 40, dtype=dtype, device=DEVICE)
    logits[0, 3], logits[1, 5] = 11.25, 12.5
    targets, weights = torch.tensor([3, 5], device=DEVICE), torch.tensor([1.0, 0.1], device=DEVICE)
    ones = torch.ones(2, device=DEVICE)
    _, grad = losses_and_gradient(loss.weighted_cross_entropy, logits, targets, weights, ones)
    _, exact = losses_and_gradient(torchs_own, logits.double(), targets, weights, ones)
    torch.testing.assert_close(grad.double(), exact, rtol=2**-7, atol=1e-6)


def test_correct_is_the_first_of_equal_maxima():
    V = 20003  # more than one block of the kernel
    logits = torch.zeros(7, V, device=DEVICE, dtype=torch.bfloat16)
    pairs = [(0, 4), (4, 0), (9000, 9001), (9001, 9000), (3, V - 1), (V - 1, 3), (19000, 8)]
    for row, pair in enumerate(pairs):
        logits[row, list(pair)] = 2
    targets = torch.tensor([target for target, _ in pairs], device=DEVICE)
    ones, correct = torch.ones(7, device=DEVICE), torch.empty(7, dtype=torch.bool, device=DEVICE)
    backend = loss._backend_for(logits)
    backend.cross_entropy_rows(logits, targets, ones, ones.clone(), correct, None)
    assert correct.tolist() == [target < other for target, other in pairs]


@pytest.mark.skipif(CUDA, reason="on CUDA an assertion of the device ends the process")
@pytest.mark.parametrize("target", [-1, -100, 41])
def test_an_invalid_target_is_named(target):
    _, logits, targets, weights = case(0, 4, 41, torch.float32, zeros=0)
    targets[2] = target
    with pytest.raises(
        IndexError, match=rf"outside the vocabulary, 0..40: targets\[2\] is {target}"
    ):
        loss.weighted_cross_entropy(logits, targets, weights)


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_an_invalid_target_is_named_on_cuda():
    code = (
        "import torch, loss; x = torch.zeros(2, 41, device='cuda');"
        "loss.weighted_cross_entropy(x, torch.tensor([0, 41], device='cuda'), x[:, 0] + 1);"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "outside the vocabulary" in done.stderr


def test_shapes_and_types_are_checked():
    x, y, w = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), torch.zeros(3)
    for wrong in ((x[None], y, w), (x, y[:2], w), (x, y, w[:, None])):
        with pytest.raises(ValueError, match="must be"):
            loss.weighted_cross_entropy(*wrong)
    with pytest.raises(ValueError, match="integers"):
        loss.weighted_cross_entropy(x, w, w)


def test_sliced_strided_and_narrow_arguments():
    _, logits, targets, weights = case(1, 12, 50, torch.float32, zeros=0)
    expected = loss.weighted_cross_entropy(logits[1::2].clone(), targets[1::2], weights[1::2])
    for x in (logits[1::2], logits.t().contiguous().t()[1::2]):
        for y in (targets[1::2], targets.int()[1::2]):
            found = loss.weighted_cross_entropy(x, y, weights[1::2])
            torch.testing.assert_close(found, expected)
    same = loss.weighted_cross_entropy(logits[:1].expand(3, 50), targets[:3], weights[:3])
    torch.testing.assert_close(
        same[0] / weights[0], expected.new_tensor(F.cross_entropy(logits[:1], targets[:1]).item())
    )
    assert loss.weighted_cross_entropy(logits[:0], targets[:0], weights[:0]).shape == (0,)


def test_a_kept_graph_gives_the_same_gradient_twice():
    _, logits, targets, weights = case(4, 5, 60, torch.float32)
    logits.requires_grad_()
    losses = loss.weighted_cross_entropy(logits, targets, weights)
    grads = [
        torch.autograd.grad(losses, logits, torch.full_like(losses, 3), retain_graph=keep)[0]
        for keep in (True, True, False)
    ]
    once = torch.autograd.grad(loss.weighted_cross_entropy(logits, targets, weights).sum(), logits)[
        0
    ]
    for grad in grads:
        torch.testing.assert_close(grad, 3 * once)


def test_a_second_derivative_is_refused():
    _, logits, targets, weights = case(4, 5, 60, torch.float32)
    logits.requires_grad_()
    losses = loss.weighted_cross_entropy(logits, targets, weights)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(losses.sum(), logits, create_graph=True)


def test_without_grad_no_gradient_is_made(monkeypatch):
    _, logits, targets, weights = case(4, 5, 60, torch.float32)
    expected = loss.weighted_cross_entropy(logits, targets, weights)
    monkeypatch.delattr(loss._backend_for(logits), "empty_gradient")
    with torch.no_grad():
        found = loss.weighted_cross_entropy(logits.requires_grad_(), targets, weights)
    assert torch.equal(found, expected) and not found.requires_grad


def test_gradcheck_in_float64():
    _, logits, targets, weights = case(6, 5, 11, torch.float64)
    logits = logits.clone().requires_grad_()
    weights = weights.double()
    torch.autograd.gradcheck(lambda x: loss.weighted_cross_entropy(x, targets, weights), logits)


@pytest.mark.skipif(not KERNEL, reason="the kernel's offsets")
def test_rows_beyond_2_to_the_31_elements(tmp_path):
    """Rows 2^30 elements apart: 32-bit arithmetic takes row 4 for row 0."""
    V, stride = 41, 2**30
    if CUDA:
        storage = torch.empty(4 * stride + V, dtype=torch.float16, device="cuda")
    else:  # a file of holes: only the pages of rows 0 and 4 exist
        storage = torch.from_file(
            str(tmp_path / "holes"), shared=True, size=4 * stride + V, dtype=torch.float16
        )
    logits = storage.as_strided((5, V), (stride, 1))
    few = torch.randn(2, V).half().to(DEVICE)
    logits[0], logits[4] = few
    weights = torch.tensor([1.0, 0, 0, 0, 2], device=DEVICE)
    targets = torch.tensor([3, -1, -1, -1, 7], device=DEVICE)
    found = loss.weighted_cross_entropy(logits, targets, weights)
    expected = loss.weighted_cross_entropy(few, targets[[0, 4]], weights[[0, 4]])
    assert torch.equal(found[[0, 4]], expected)


def interpreter_reads_bounds():
    """Triton before 3.7 cannot take a range()'s bounds from NumPy 2.4 (triton #9171)."""
    release = [
        [int(n) for n in importlib.metadata.version(name).split(".")[:2]]
        for name in ("triton", "numpy")
    ]
    return release[0] >= [3, 7] or release[1] < [2, 4]


@pytest.mark.skipif(CUDA or INTERPRETED or not TRITON, reason="for a CPU with Triton")
@pytest.mark.skipif(
    TRITON and not interpreter_reads_bounds(), reason="see interpreter_reads_bounds"
)
def test_the_interpreted_kernel_passes_too():
    files = [
        ROOT / "tests" / f"test_{name}.py" for name in ("cross_entropy", "linear_cross_entropy")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(CUDA, reason="CUDA has only the kernel")
def test_without_triton_the_cpu_path_works():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, loss;"
        "x = torch.zeros(2, 4, requires_grad=True); y = torch.tensor([0, 1]);"
        "loss.weighted_cross_entropy(x, y, torch.ones(2)).sum().backward();"
        "loss.linear_weighted_cross_entropy(x, x.detach(), y, torch.ones(2))[0].backward()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("V", [512, 32002, 128256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_for_gpus_it_moves_128_bits_and_spills_nothing(dtype, V, capability):
    from bench.kernels import compiled_cross_entropy

    found = compiled_cross_entropy(dtype, V, capability)
    assert found["barriers in loops"] == 0
    accesses = dict(item.split(":") for item in found["accesses"].split())
    edges_and_targets = 2 + 3  # a load each; stores of both edges (live row or not) and the target
    narrow = "b32" if dtype == torch.float32 else "b16"
    per_row = 3 if dtype == torch.float32 else 0  # weight in; loss out, live row or not
    assert int(accesses[narrow]) <= edges_and_targets + per_row
    assert int(accesses["v4.b32"]) >= 5 and not {"v2.b32", "v2.b16", "v4.b16"} & set(accesses)
    assert found["spilled bytes"] <= 16
    long_row = V * torch.finfo(dtype).bits // 8 > 96 * 2**10
    assert found["programs an SM"] >= (1 if long_row else 3)
    assert found["row offsets"] == "i64"


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="needs Triton's compiler")
def test_scaling_compiled_for_a_gpu_offsets_rows_in_64_bits():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import bench.kernels
    from kernels.cross_entropy import scale_kernel

    types = {"grads": "*bf16", "scales": "*fp32"}
    types |= dict.fromkeys(("N", "V", "stride", "scales_stride", "shift"), "i32")
    constants = {"BLOCK": 8192, "VECTOR": 8}
    types |= dict.fromkeys(constants, "constexpr")
    places = {(scale_kernel.arg_names.index(k),): v for k, v in constants.items()}
    source = ASTSource(scale_kernel, signature=types, constexprs=places)
    asm = bench.kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
    assert bench.kernels.row_offsets(asm["ttir"]) == "i64"

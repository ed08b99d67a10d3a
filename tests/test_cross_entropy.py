"""loss.weighted_cross_entropy of given logits, on whichever path this process takes.

The same tests hold for the Triton kernel on a GPU, for the kernel interpreted, and for plain
PyTorch. Triton reads TRITON_INTERPRET as it is imported, so the interpreted kernel gets a process
of its own, started by test_the_interpreted_kernel_passes_too; compiling needs one without it.

The exact result is float64 autograd's. Errors may be twice those of PyTorch's float32
cross-entropy rounded once to the logits' dtype, plus an epsilon of float32.
"""

import importlib.metadata
import importlib.util
import math
import os
import shutil
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
# The interpreted kernel cuts bf16 where a GPU rounds; test_ptx.py has the rounding.
ROUNDED = DTYPES[:2] if INTERPRETED else DTYPES
pytestmark = pytest.mark.filterwarnings("ignore:overflow")  # to -inf, in the interpreter's NumPy


def case(seed, N, V, dtype, scale=1.0, zeros=0.3, padding=0, offset=0):
    """logits (N, V) in a wider buffer of NaN and inf; targets; weights, of which a share is 0."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((N, offset + V + padding), float("inf"), dtype=dtype)
    buffer[::2] = float("nan")
    logits = torch.randn(N, V, generator=generator).mul_(scale)
    buffer[:, offset : offset + V] = logits
    buffer = buffer.to(DEVICE)
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


SHAPES = {  # V, padding, offset
    "nothing but the target": (1, 63, 0),
    "less than a vector": (3, 61, 0),
    "a logit beyond a vector": (9, 55, 0),
    "rows end to end, 1 element an access": (41, 0, 0),
    "rows end to end, 2 elements an access": (42, 0, 0),
    "rows end to end, 4 elements an access": (44, 0, 0),
    "rows that start anywhere": (41, 20, 3),
    "a whole block": (256, 0, 0),
    "a logit beyond the smallest block": (257, 63, 0),
    "a logit beyond the largest block of a short row": (8193, 63, 0),
    "Llama 2 and its end of turn, padded": (32002, 62, 0),
    "the same end to end": (32002, 0, 0),
    "Llama 3": (128256, 0, 0),
    "blocks of a long row": (65537, 63, 0),
}


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_twice_torchs(shape, dtype):
    V, padding, offset = SHAPES[shape]
    # Rows of equal logits, usual ones, and nearly sure ones; of the first two one has weight 0.
    _, logits, targets, weights = case(V, 4, V, dtype, 3.0, 0, padding, offset)
    logits[0] *= 0.01
    logits[3] *= 10
    weights[V % 2] = 0
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
    epsilon = 1e-6 * exact_grad.abs().amax()
    assert_within_twice(grad, torch_grad.to(grad.dtype), exact_grad, epsilon)


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    "stride, offset, of_bf16, of_fp32",
    [(32064, 0, 8, 4), (32002, 0, 2, 2), (41, 0, 1, 1), (44, 0, 4, 4), (64, 4, 4, 4), (0, 8, 8, 4)],
)
def test_an_access_is_as_wide_as_every_row_starts(stride, offset, of_bf16, of_fp32):
    from kernels.cross_entropy import launch_shape

    for dtype, expected in ((torch.bfloat16, of_bf16), (torch.float32, of_fp32)):
        memory = torch.empty(3 * 32064, dtype=dtype)
        assert memory.data_ptr() % 16 == 0
        rows, aligned = memory[offset:].as_strided((3, 40), (stride, 1)), memory.view(3, -1)[:, :40]
        for pair in ((rows, aligned), (aligned, rows)):
            assert launch_shape(*pair)["VECTOR"] == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("V, padding, offset", [(41, 23, 0), (1003, 21, 16), (41, 0, 0), (3, 3, 1)])
def test_every_output_is_written_and_nothing_beyond_its_vector(V, padding, offset, in_place, dtype):
    buffer, logits, targets, weights = case(5, 6, V, dtype, padding=padding, offset=offset)
    weights[0], weights[1], weights[2] = 1, 0, 1
    targets[2] = logits[2].argmax()
    losses = torch.full((6,), float("nan"), device=DEVICE)
    correct = (logits.argmax(dim=1) != targets) | (weights == 0)  # all wrong
    before, expected_correct = buffer.clone(), ~correct
    grad = logits if in_place else torch.full_like(buffer, float("nan"))[:, offset : offset + V]
    exact = torch.softmax(logits.double(), 1) - F.one_hot(targets, V)
    loss.backend_for(logits)(logits, targets, weights, losses, correct, grad)

    torch.testing.assert_close(
        grad.double(), exact * weights[:, None], rtol=2**-6, atol=2 * torch.finfo(dtype).eps
    )
    assert (grad[weights == 0] == 0).all() and (losses[weights == 0] == 0).all()
    assert losses.isfinite().all() and torch.equal(correct, expected_correct)
    if in_place:
        end = offset + (math.ceil(V / vector(logits)) * vector(logits) if KERNEL else V)
        buffer[:, offset:end] = before[:, offset:end]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(buffer.view(bits), before.view(bits))


def vector(logits):
    from kernels.cross_entropy import launch_shape

    return launch_shape(logits, logits)["VECTOR"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [61, 0])
def test_a_maximum_counts_wherever_it_stands(padding, dtype):
    """At each place of the first vectors and the last ones, and at both sides of a block's end.

    Left out of the maximum it would make the sum of exponentials infinite.
    """
    V = 8192 + 11
    places = [*range(9), 8190, 8191, 8192, 8193, *range(V - 9, V)]
    _, logits, _, _ = case(1, len(places), V, dtype, padding=padding)
    targets = torch.tensor(places, device=DEVICE)
    ones = torch.ones(len(places), device=DEVICE)
    logits[torch.arange(len(places), device=DEVICE), targets] = 200
    losses, correct = torch.full_like(ones, float("nan")), torch.zeros_like(ones).bool()
    loss.backend_for(logits)(logits, targets, ones, losses, correct, None)
    assert correct.all() and (losses == 0).all()


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
    _, logits, targets, weights = case(2, 7, 50, torch.float32, zeros=0)
    logits[0, : targets[0]] = -float("inf")  # masked tokens
    logits[1, targets[1]] = -float("inf")  # an impossible target: infinite loss, finite gradient
    logits[2] = -float("inf")  # nothing possible: NaN
    logits[3, 7] = float("inf")
    logits[4, 7] = float("nan")
    logits[5] = torch.finfo(torch.float32).min  # all masked so: log V
    ones = torch.ones(7, device=DEVICE)
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


@pytest.mark.parametrize("padding", [29, 0])
def test_correct_is_the_first_of_equal_maxima(padding):
    V = 20003  # two and a half blocks of 8192
    pairs = [  # two equal maxima, of which the first named is the target
        *[(0, 4), (4, 0), (9000, 9001), (9001, 9000)],  # in one vector of a padded row
        *[(16, 24), (24, 16), (7, 8), (8, 7)],  # in two vectors of a block
        *[(3, V - 1), (V - 1, 3), (19000, 8), (V - 1, V - 2)],  # in the last, incomplete block
        *[(16, 8208), (8208, 16)],  # at one place of two blocks
        *[(16, 8200), (8200, 16), (8200, 19000)],  # at an earlier place of a later block
    ]
    _, logits, _, _ = case(1, len(pairs), V, torch.bfloat16, 0.3, padding=padding)
    for row, pair in enumerate(pairs):
        logits[row, list(pair)] = 2
    targets = torch.tensor([target for target, _ in pairs], device=DEVICE)
    ones = torch.ones(len(pairs), device=DEVICE)
    correct = torch.empty(len(pairs), dtype=torch.bool, device=DEVICE)
    loss.backend_for(logits)(logits, targets, ones, ones.clone(), correct, None)
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
    losses = loss.weighted_cross_entropy(logits, targets, weights)
    once = torch.autograd.grad(losses.sum(), logits)[0]
    for grad in grads:
        assert torch.equal(grad, grads[0])
        torch.testing.assert_close(grad, 3 * once)


def test_a_second_derivative_is_refused():
    _, logits, targets, weights = case(4, 5, 60, torch.float32)
    logits.requires_grad_()
    losses = loss.weighted_cross_entropy(logits, targets, weights)
    with pytest.raises(RuntimeError, match="first derivative only"):
        torch.autograd.grad(losses.sum(), logits, create_graph=True)


def test_only_a_backward_makes_a_gradient(monkeypatch):
    _, logits, targets, weights = case(4, 5, 60, torch.float32)
    backend, gradients = loss.backend_for(logits), []

    def recorded(*arguments):
        gradients.append(arguments[-1])
        backend(*arguments)

    monkeypatch.setattr(loss, "backend_for", lambda logits: recorded)
    losses = loss.weighted_cross_entropy(logits.requires_grad_(), targets, weights)
    with torch.no_grad():
        found = loss.weighted_cross_entropy(logits, targets, weights)
    assert torch.equal(found, losses) and not found.requires_grad
    assert gradients == [None, None]
    losses.sum().backward()
    assert gradients[:2] == [None, None] and gradients[2].stride() == (64, 1)  # padded


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
        storage = torch.empty(4 * stride + 64, dtype=torch.float16, device="cuda")
    else:  # a file of holes: only the pages of five rows exist
        storage = torch.from_file(
            str(tmp_path / "holes"), shared=True, size=4 * stride + 64, dtype=torch.float16
        )
    logits = storage.as_strided((5, V), (stride, 1))
    _, few, _, _ = case(0, 2, V, torch.float16)
    logits[0], logits[4] = few
    weights = torch.tensor([1.0, 0, 0, 0, 2], device=DEVICE)
    targets = torch.tensor([3, -1, -1, -1, 7], device=DEVICE)
    losses, correct = torch.empty_like(weights), torch.empty_like(weights, dtype=torch.bool)
    loss.backend_for(logits)(logits, targets, weights, losses, correct, logits)
    ends = [0, 4]
    ones = torch.ones(2, device=DEVICE)
    expected = losses_and_gradient(torchs_own, few.double(), targets[ends], weights[ends], ones)
    torch.testing.assert_close(losses[ends].double(), expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(logits[ends].double(), expected[1], rtol=2**-9, atol=1e-6)
    assert (logits[1:4] == 0).all()


def interpreter_reads_bounds():
    """Triton before 3.7 cannot take a range()'s bounds from NumPy 2.4 (triton #9171)."""
    release = [
        [int(n) for n in importlib.metadata.version(name).split(".")[:2]]
        for name in ("triton", "numpy")
    ]
    return release[0] >= [3, 7] or release[1] < [2, 4]


CAN_INTERPRET = TRITON and interpreter_reads_bounds()


@pytest.mark.skipif(CUDA or INTERPRETED or not TRITON, reason="for a CPU with Triton")
@pytest.mark.skipif(TRITON and not CAN_INTERPRET, reason="see interpreter_reads_bounds")
def test_the_interpreted_kernel_passes_too():
    files = [
        ROOT / "tests" / f"test_{name}.py"
        for name in ("cross_entropy", "linear_cross_entropy", "half")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.skipif(CUDA or INTERPRETED, reason="for the CPU's own path")
def test_without_triton_the_cpu_path_works():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, loss;"
        "x = torch.zeros(2, 4, requires_grad=True); y = torch.tensor([0, 1]);"
        "loss.weighted_cross_entropy(x, y, torch.ones(2)).sum().backward();"
        "loss.linear_weighted_cross_entropy(x, x.detach(), y, torch.ones(2))[0].backward()"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="for the CPU's own path")
@pytest.mark.parametrize("interpreted", ["0", "1"][: 1 + CAN_INTERPRET])
def test_copied_into_a_package_it_meets_no_other_kernels_or_loss(interpreted, tmp_path):
    """Such as Hugging Face's `kernels`, which transformers imports by that name."""
    for name in ("kernels", "loss"):
        other = tmp_path / "first" / name / "__init__.py"
        other.parent.mkdir(parents=True)
        other.write_text("CUDAProperties = 1")
    shutil.copytree(ROOT / "kernels", tmp_path / "mine" / "kernels")
    shutil.copy(ROOT / "loss.py", tmp_path / "mine")
    path = os.pathsep.join([str(tmp_path / "first"), str(tmp_path)])
    environment = os.environ | {"TRITON_INTERPRET": interpreted, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PACKAGE, interpreted],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


IN_A_PACKAGE = """
import sys
import torch
from torch.nn.functional import cross_entropy
from mine.loss import linear_weighted_cross_entropy, weighted_cross_entropy
from kernels import CUDAProperties
from loss import CUDAProperties

hidden, lm_head = torch.randn(4, 8, requires_grad=True), torch.randn(19, 8, requires_grad=True)
targets, weights = torch.tensor([3, -100, 18, 0]), torch.tensor([1.0, 0.0, 0.1, 0.5])
total, _ = linear_weighted_cross_entropy(hidden, lm_head, targets, weights)
found = *torch.autograd.grad(total, (hidden, lm_head)), weighted_cross_entropy(
    hidden @ lm_head.T, targets, weights
)
losses = weights * cross_entropy(hidden @ lm_head.T, targets, reduction="none", ignore_index=-100)
expected = *torch.autograd.grad(losses.sum(), (hidden, lm_head), retain_graph=True), losses
torch.testing.assert_close(found, expected)
assert ("mine.kernels.cross_entropy" in sys.modules) == (sys.argv[1] == "1")
"""


@pytest.mark.skipif(CUDA or INTERPRETED, reason="once is enough")
def test_transformers_is_imported_here_even_if_hugging_faces_kernels_are_installed(tmp_path):
    pytest.importorskip("transformers")
    installed = tmp_path / "kernels-0.18.2.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: kernels\nVersion: 0.18.2\n")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(tmp_path)])
    code = "import conftest, transformers.integrations.hub_kernels"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, check=True)


COMPILED = [  # dtype, V, and what is its own there
    (torch.bfloat16, 512),  # one warp
    (torch.bfloat16, 32002),  # 16 warps; an end within a vector
    (torch.bfloat16, 128256),  # 32 warps: a row beyond 96 KB has an SM for itself
    (torch.float16, 32002),
    (torch.float32, 32002),  # vectors of 4, and long already
]


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="needs Triton's compiler")
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype, V", COMPILED)
def test_compiled_for_gpus_it_moves_128_bits_and_spills_nothing(dtype, V, capability):
    from bench.kernels import compiled_cross_entropy, padded_rows

    found = compiled_cross_entropy(padded_rows(1, V, "cpu", dtype), capability)
    assert found["barriers in loops"] == 0
    of_16_bytes = found["BLOCK"] * dtype.itemsize // (32 * found["warps"]) // 16  # of a thread
    steps = 7  # of whole blocks two loads and a store, of the rest as many; a store of weight 0
    narrow = 3  # loads of the target and of the argmax's vector, the target's store
    expected = {"v4.b32": steps * of_16_bytes, "b64": 1, "b8": 2, "b32": 3}  # weight, two losses
    width = "b32" if dtype == torch.float32 else "b16"
    expected[width] = expected.get(width, 0) + narrow
    counts = dict(item.split(":") for item in found["accesses"].split())
    assert {width: int(count) for width, count in counts.items()} == expected
    assert found["spilled bytes"] <= 16
    if V * dtype.itemsize > 96 * 2**10:
        assert found["programs an SM"] == 1
    else:
        assert found["programs an SM"] >= 3
    assert found["row offsets"] == "i64"


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="needs Triton's compiler")
def test_compiled_for_rows_end_to_end_it_moves_what_their_starts_allow():
    from bench.kernels import compiled_cross_entropy

    for V, width, count in ((32002, "b32", 3 + 4 * 8), (50257, "b16", 3 + 4 * 16)):
        found = compiled_cross_entropy(torch.empty(1, V, dtype=torch.bfloat16), 90)
        assert f"{width}:{count}" in found["accesses"].split() and "v4" not in found["accesses"]
        assert found["spilled bytes"] == 0


@pytest.mark.skipif(INTERPRETED or not TRITON, reason="needs Triton's compiler")
def test_on_an_h100_a_logit_costs_at_most_15_instructions():
    """Of whole blocks, both passes; 18.6 with the masks that only the end of a row needs."""
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith("3.7."):
        pytest.skip("counted with the pinned Triton; 15.1 with 3.6, which needs more registers")
    from bench import kernels

    rows = [row for row in kernels.instructions_table() if row[""] == "this project"]
    assert [row["V"] for row in rows] == [32000, 32002, 128256]
    for row in rows:
        assert row["both"] <= 15 < row["at a row's end"] and row["spilled bytes"] == 0
    assert [row["programs an SM"] for row in rows] == [4, 4, 1]


@pytest.mark.skipif(not TRITON, reason="bench/kernels.py imports Triton")
def test_the_table_of_compiled_kernels_has_a_line_a_shape_within_100_columns(monkeypatch, capsys):
    from bench import kernels

    def made(logits, capability):
        registers = 40 + capability // 10 if logits.dtype == torch.float32 else 32
        return {
            "dtype": kernels.TRITON_NAMES[logits.dtype], "V": logits.shape[1],
            "registers": registers, "spilled bytes": 0,
        }  # fmt: skip

    monkeypatch.setattr(kernels, "compiled_cross_entropy", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["kernels.py"])
    kernels.main()
    header, *rows, empty, alike = capsys.readouterr().out.splitlines()[3:]
    assert header.split() == ["dtype", "V", "registers"] and len(rows) == 9
    assert rows[0].split("  ")[0] == "bf16" and "512" in rows[0] and rows[0].endswith(" 32")
    assert "48 49 50" in rows[-1] and not empty  # of sm_80, sm_90 and sm_100
    assert alike == "In every row: spilled bytes 0."
    assert max(map(len, [header, *rows])) <= 100


@pytest.mark.skipif(not TRITON, reason="bench/kernels.py imports Triton")
def test_a_row_of_the_longest_provider_is_in_line_and_within_100_columns(capsys):
    from bench import kernels

    measured = {"this project": (1234.567, 2345.678, 70.25)}
    measured["copy of as many bytes"] = (1000.25, 2000.5, 0.01)
    rows = list(kernels.rows_of({"N": 77824, "D": 4096, "V": 128256, "p": 0.5}, measured,
                                "copy of as many bytes"))  # fmt: skip
    kernels.print_table("", ({**row, "TB/s": 3.456} for row in rows), markdown=False)
    header, first, second = capsys.readouterr().out.splitlines()[3:]
    assert header.index("of limit") == first.index("81.0%") == second.index("100.0%")
    assert max(map(len, (header, first, second))) <= 100

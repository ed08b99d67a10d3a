"""The cross-entropy kernel as Triton compiles it for GPUs, run by the interpreter in ptx.py.

It holds what test_cross_entropy.py cannot show without a GPU: real rounding to bf16, the width and
the place of every access, layouts, shuffles and barriers. Logits lie among NaN, and so do the
numbers of rows of weight 0. The interpreter itself refuses races and stray accesses.

The exact result is float64's. A gradient may err by half a unit in the last place of its dtype,
which is its one rounding, and by float32's arithmetic before it (see float32_error).
"""

import functools
import importlib.util
import math
import os
import re
from typing import NamedTuple

import ptx
import pytest
import torch
import torch.nn.functional as F

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(INTERPRETED or not TRITON, reason="needs Triton's compiler")
CAPABILITIES = [80, 90, 100]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
GRADS = ["in place", "beside", "none"]
LAYOUTS = {  # V, padding, offset
    "padded": (1030, 10, 0),  # of 4 warps; what follows a row's last vector is one of NaN
    "less than a vector": (3, 5, 0),
    "one warp": (257, 7, 0),
    "rows end to end, 1 element an access": (515, 0, 0),
    "rows end to end, 2 elements an access": (518, 0, 0),
    "rows that start anywhere": (299, 6, 3),
    "two blocks": (8195, 13, 0),
}
CASES = [(c, d, grad, "padded") for c in CAPABILITIES for d in DTYPES for grad in GRADS]
CASES += [
    (capability, dtype, "in place", layout)
    for capability, dtype in zip(CAPABILITIES, DTYPES[1:] + DTYPES[:1])
    for layout in list(LAYOUTS)[1:]
]
NAMES = [f"sm_{case[0]}-{str(case[1])[6:]}-{case[2]}-{case[3]}" for case in CASES]
EPSILON = torch.finfo(torch.float32).eps


class Rows(NamedTuple):
    """What the kernel takes and fills; `before` are the logits as they were."""

    before: torch.Tensor
    logits: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    losses: torch.Tensor
    correct: torch.Tensor
    grad: torch.Tensor | None


def rows(dtype, layout, grad):
    """Five rows: nearly equal logits; weight 0; usual ones; equal maxima; one nearly sure."""
    V, padding, offset = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)
    logits = among_nan(5, V, padding, offset, dtype)
    spread = torch.tensor([0.01, math.nan, 3, 1, 10])
    logits[:] = torch.randn(5, V, generator=generator) * spread[:, None]
    logits[3, [0, 1, V - 1]] = 8  # in one vector, and at its place in two blocks
    targets = torch.tensor([V // 2, -100, V - 1, 0, logits[4].float().argmax()])
    weights = torch.tensor([0.1, 0, 1, 0.7, 2])
    losses, correct = torch.full((5,), math.nan), torch.full((5,), 9, dtype=torch.uint8)
    beside = among_nan(5, V, padding + 16, offset, dtype)
    grads = {"in place": logits, "beside": beside, "none": None}
    return Rows(logits.clone(), logits, targets, weights, losses, correct, grads[grad])


def among_nan(N, V, padding, offset, dtype):
    buffer = torch.full((offset + N * (V + padding),), math.nan, dtype=dtype)
    return buffer.as_strided((N, V), (V + padding, 1), offset)


def run(of, capability, programs=range(5), edit=lambda text: text, seed=0):
    """Runs the kernel compiled for these rows, its PTX edited; returns the memory of each tensor.

    The first of the programs has the first row, be its number what it may.
    """
    from bench.kernels import compiled

    kernel, _ = compiled(of.logits, of.grad, capability)
    kernel = ptx.Kernel(edit(kernel.asm["ptx"]), kernel.metadata.shared)
    out = of.logits if of.grad is None else of.grad
    tensors = [of.logits, of.targets, of.weights, of.losses, of.correct, out]
    pointers = [t.data_ptr() - programs[0] * t.stride(0) * t.itemsize for t in tensors]
    arguments = [*pointers, of.logits.shape[1], of.logits.stride(0), out.stride(0)]
    return ptx.launch(kernel, programs, arguments, tensors, seed)


@functools.cache
def done(capability, dtype, grad, layout):
    of = rows(dtype, layout, grad)
    return of, run(of, capability)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_error_is_within_the_rounding(case):
    of, _ = done(*case)
    live = of.weights != 0
    assert_exact(Rows(*[None if of.grad is None and t is None else t[live] for t in of]))
    assert of.losses[1] == 0 and of.correct[1] == 0
    assert of.grad is None or (of.grad[1] == 0).all()


def assert_exact(of):
    x, weights = of.before.double(), of.weights.double()[:, None]
    p, onehot = x.softmax(1), F.one_hot(of.targets, x.shape[1])
    losses = weights[:, 0] * F.cross_entropy(x, of.targets, reduction="none")
    assert ((of.losses - losses).abs() <= EPSILON * (losses + 16 * weights[:, 0])).all()
    assert of.correct.tolist() == (of.before.float().argmax(1) == of.targets).tolist()
    if of.grad is not None:
        exact = weights * (p - onehot)
        allowed = half_unit(exact, of.grad.dtype) + weights * float32_error(x, p, onehot)
        assert ((of.grad - exact).abs() <= allowed).all()


def half_unit(x, dtype):
    """Half of the distance between the numbers of this dtype around x."""
    kind = torch.finfo(dtype)
    _, exponent = x.abs().clamp_min(kind.tiny).frexp()  # x < 2^exponent
    return kind.eps / 4 * exponent.double().exp2()


def float32_error(x, p, onehot):
    """Of p - onehot: exp(x - max) errs by an epsilon a unit of x - max; the sum by less than 16.

    What is below float32's normal numbers may be 0.
    """
    depth = x.amax(1, keepdim=True) - x
    return EPSILON * (p * (depth + 16) + onehot) + torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_program_touches_its_own_row_to_its_last_vector_and_not_one_of_weight_0(case):
    of, (logits, targets, weights, losses, correct, grad) = done(*case)
    live, every = of.weights != 0, torch.ones(5).bool()
    assert_touched(logits.programs.reader, of.logits, live)
    assert_touched(targets.programs.reader, of.targets[:, None], live)
    assert_touched(weights.programs.reader, of.weights[:, None], every)
    assert_touched(losses.programs.writer, of.losses[:, None], every)
    assert_touched(correct.programs.writer, of.correct[:, None], every)
    if of.grad is not None:
        assert_touched(grad.programs.writer, of.grad, every)
    for memory in (targets, weights) if of.grad is of.logits else (targets, weights, logits):
        assert (memory.programs.writer == ptx.NOBODY).all()


def assert_touched(programs, values, which):
    """By program i every byte of row i if which[i], and of the row's last vector, and no other."""
    from kernels.cross_entropy import launch_shape

    end = values.shape[1]
    if end > 1:
        vector = launch_shape(values, values)["VECTOR"]
        end = math.ceil(end / vector) * vector
    expected = torch.full((len(programs) // values.itemsize,), ptx.NOBODY)
    number = torch.where(which, torch.arange(5), ptx.NOBODY)
    view = expected.as_strided((5, end), (values.stride(0), 1), values.storage_offset())
    view[:] = number[:, None]
    assert (programs == expected.repeat_interleave(values.itemsize).numpy()).all()


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout, of_reductions", [("padded", 8), ("one warp", 0)])
def test_a_barrier_taken_out_is_a_race(layout, of_reductions, grad, capability):
    """All but the first of the gradient's two, which is for logits in place alone."""
    of = rows(torch.bfloat16, layout, grad)
    expected = [True] * of_reductions
    if grad != "none":
        expected += [grad == "in place", True]
    found = []

    def without(text):
        barriers = list(re.finditer(r"bar\.sync\s+0;", text))
        assert len(barriers) == len(expected)
        start, end = barriers[len(found)].span()
        return text[:start] + text[end:]

    for _ in expected:
        of.logits.copy_(of.before)
        try:
            run(of, capability, range(1), without)
            found.append(False)
        except ptx.Race:
            found.append(True)
    assert found == expected


def test_the_order_of_warps_changes_nothing():
    of, _ = done(90, torch.bfloat16, "in place", "padded")
    for seed in range(1, 5):
        again = rows(torch.bfloat16, "padded", "in place")
        run(again, 90, seed=seed)
        for a, b in ((again.losses, of.losses), (again.correct, of.correct), (again.grad, of.grad)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_rows_beyond_2_to_the_31_elements(capability):
    of = rows(torch.bfloat16, "one warp", "in place")
    beyond = 2**31 // of.logits.stride(0) + 1
    run(of, capability, range(beyond, beyond + 1))
    assert_exact(Rows(*[t[:1] for t in of]))


UNTIL = "mov.u32 %r9000, %tid.x;\nsetp.lt.u32 %p9000, %r9000, {};\n@%p9000 bar.sync 0;"
FAULTS = {  # a change of the PTX, and what the interpreter says to it
    "an unknown modifier": (r"ex2\.approx\.ftz", "ex2.approx.sat", "unknown instruction: ex2"),
    "an unknown access": (r"ld\.global\.b32", "ld.volatile.global.b32", "unknown instruction: ld"),
    "an unset register": (r"mov\.u32\s+%r\d+, %tid\.x;", "", "KeyError.*and.b32"),
    "a barrier for some warps": (r"bar\.sync\s+0;", UNTIL.format(32), "wait for each other"),
    "a barrier for some lanes": (r"bar\.sync\s+0;", UNTIL.format(16), "only lanes"),
    "a misaligned access": (r"(ld\.global\S*v4.*) \+ 0", r"\1 + 2", "not on 16 bytes"),
    "an access outside": (r"(ld\.global\S*v4.*) \+ 0", r"\1 + 1048576", "outside memory"),
    "shared memory outside": (r"\[global_smem\]", "[global_smem+1024]", "outside memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_interpreter_refuses(fault):
    pattern, replacement, message = FAULTS[fault]
    of = rows(torch.bfloat16, "two blocks", "in place")
    with pytest.raises(ptx.Fault, match=message):
        run(of, 90, range(1), lambda text: re.sub(pattern, replacement, text, count=1))


def test_the_interpreter_rounds_as_torch_does():
    bits = torch.randint(-(2**31), 2**31, (500, 32), dtype=torch.int32)
    bits[::2] = bits[::2] & ~0xFFFF | 0x8000  # ties in bf16
    numbers = bits.view(torch.float32)
    found = torch.stack([torch.from_numpy(ptx.to_bits(x.numpy(), "bf16", "u2")) for x in numbers])
    expected = numbers.bfloat16()
    torch.testing.assert_close(found.view(torch.bfloat16), expected, rtol=0, atol=0, equal_nan=True)

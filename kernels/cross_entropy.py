"""Weighted cross-entropy in Triton: loss and gradient in one launch.

    loss_i = w_i · (logsumexp(x_i) - x_i[y_i])        g_i = w_i · (softmax(x_i) - onehot(y_i))

N rows x_i of V logits in bf16, fp16 or fp32; arithmetic in float32. loss.py chooses between the
first three functions and their PyTorch reference, PlainBackend; the kernels follow them.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; -inf - -inf would be NaN


def cross_entropy_rows(logits, targets, weights, losses, correct, grad):
    """Fills losses (N,) and correct (N,), and grad (N, V) unless it is None.

    logits (N, V) with its rows at any stride; targets (N,) integer, in 0..V-1 wherever weights
    (N,) float32 is not 0; losses float32; correct bool, true where the target is the first
    maximum of a row with weight. grad is logits itself, or lies as empty_gradient(logits) does.
    """
    (N, V), vector, shift = logits.shape, _vector(logits), _shift(logits)
    out = logits if grad is None else grad
    assert _shift(out) == shift and (out.stride(0) - logits.stride(0)) % vector == 0
    if N:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(N,)](
                logits, targets, weights, losses, correct, out,
                V, logits.stride(0), out.stride(0), shift,
                WITH_GRAD=grad is not None, VECTOR=vector, **launch_shape(logits),
            )  # fmt: skip


def scale_rows(grad, scale):
    """grad (N, V) times scale (N,), in place; a row whose scale is 1 is left alone, unread."""
    N, V = grad.shape
    if N:
        with torch.cuda.device_of(grad):
            scale_kernel[(min(N, 1024),)](
                grad, scale, N, V, grad.stride(0), scale.stride(0), _shift(grad),
                VECTOR=_vector(grad), **launch_shape(grad),
            )  # fmt: skip


def empty_gradient(logits):
    """Room for the gradient: each row as far from a 16-byte boundary as its row of logits is."""
    (N, V), vector, shift = logits.shape, _vector(logits), _shift(logits)
    stride = V + (logits.stride(0) - V) % vector
    return logits.new_empty(shift + N * stride)[shift:].view(N, stride)[:, :V]


def launch_shape(rows):
    """BLOCK and num_warps: 16 elements a thread; rows beyond 96 KB get an SM for themselves."""
    V, long = rows.shape[1], rows.shape[1] * rows.element_size() > 96 * 2**10
    block = min(16384 if long else 8192, max(256, triton.next_power_of_2(V)))
    return {"BLOCK": block, "num_warps": max(1, block // 512)}


def _vector(rows):
    return 16 // rows.element_size()  # elements of a 128-bit access


def _shift(rows):
    return rows.data_ptr() % 16 // rows.element_size()  # elements from a 16-byte boundary


@triton.jit(do_not_specialize=["V", "stride", "grads_stride", "shift"])
def cross_entropy_kernel(
    logits, targets, weights, losses, correct, grads,
    V, stride, grads_stride, shift,
    WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program a row: a pass for the sum of exponentials, a pass for the gradient.

    The least it could move is a read and a write of every logit, 4 bytes in bf16, and a write of
    zeros for a row of weight 0. The softmax needs the whole row's sum before its first gradient,
    so each logit is wanted twice; the second pass runs backward, from the blocks just read, and a
    row is short enough that the rest still lies in L1 or L2 (hence evict_last, and so few rows in
    flight when rows are long). The maximum is kept along the way, so that there is no third pass.

    Memory moves in 16-byte vectors only where addresses are multiples of 16, and at V = 32002
    rows are not: row i starts 4·i bytes after one. So a row is cut at the 16-byte boundaries of
    memory instead of at its own start: a body of whole vectors, and two edges of less than one.
    """
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2^31 at 67,104 rows of 32,002
    x, lead, body, tail = _vectors_of(logits, row * stride, V, shift, VECTOR)
    dx, _, _, _ = _vectors_of(grads, row * grads_stride, V, shift, VECTOR)
    edge, in_edge = _edges(lead, body, tail, V, VECTOR)
    block = tl.arange(0, BLOCK)
    weight = tl.load(weights + row)

    if weight == 0:  # never multiply by it: 0 · NaN is NaN
        if WITH_GRAD:
            zero = tl.zeros([1], dx.dtype.element_ty)
            tl.store(dx + edge, zero, mask=in_edge)
            for start in range(body, tail, BLOCK):
                tl.store(dx + start + block, zero, mask=start + block < tail)
        tl.store(losses + row, 0.0)
        tl.store(correct + row, False)
        return

    target = tl.load(targets + row).to(tl.int32) + lead
    target_x = tl.load(x + target).to(tl.float32)
    edge_x = tl.load(x + edge, mask=in_edge, other=-float("inf")).to(tl.float32)
    # A maximum and a sum for each vector's place in a block: no thread waits for another yet.
    LANES: tl.constexpr = BLOCK // VECTOR
    totals = tl.zeros([LANES], tl.float32)
    maxima = totals + tl.maximum(target_x, LOWEST)
    rivals = tl.full([LANES], 0, tl.int32) + tail  # first blocks whose maximum is the target's
    for start in range(body, tail, BLOCK):
        i = start + block
        block_x = tl.load(x + i, i < tail, -float("inf"), eviction_policy="evict_last")
        vectors = tl.reshape(block_x.to(tl.float32), (LANES, VECTOR))
        highest = tl.max(vectors, axis=1)
        rivals = tl.minimum(rivals, tl.where(highest == target_x, start, tail))
        before, maxima = maxima, tl.maximum(maxima, highest)
        exponentials = tl.exp2((vectors - maxima[:, None]) * LOG2_E)
        totals = totals * tl.exp2((before - maxima) * LOG2_E) + tl.sum(exponentials, axis=1)
    maximum = tl.maximum(tl.max(maxima, axis=0), tl.max(edge_x, axis=0))
    total = tl.sum(totals * tl.exp2((maxima - maximum) * LOG2_E), axis=0)
    total += tl.sum(tl.exp2((edge_x - maximum) * LOG2_E), axis=0)
    tl.store(losses + row, weight * (tl.log2(total) * LN_2 - (target_x - maximum)))
    first = target_x == maximum
    if first:  # of equal logits the first is the argmax: is there one before the target?
        i = tl.min(rivals, axis=0) // VECTOR * VECTOR + block  # said again, for 16-byte loads
        block_x = tl.load(x + i, i < tail, -float("inf")).to(tl.float32)
        ties = tl.sum(((block_x == target_x) & (i < target)).to(tl.int32), axis=0)
        ties += tl.sum(((edge_x == target_x) & (edge < target)).to(tl.int32), axis=0)
        first = ties == 0
    tl.store(correct + row, first)

    if WITH_GRAD:
        tl.debug_barrier()  # grads may be logits: all have read before anyone writes
        scale = weight / total
        blocks = tl.cdiv(tail - body, BLOCK)
        for done in range(0, blocks):
            i = body + (blocks - 1 - done) * BLOCK + block
            block_x = tl.load(x + i, i < tail, eviction_policy="evict_first").to(tl.float32)
            g = scale * tl.exp2((block_x - maximum) * LOG2_E)
            tl.store(dx + i, g.to(dx.dtype.element_ty), i < tail, eviction_policy="evict_first")
        g = scale * tl.exp2((edge_x - maximum) * LOG2_E)
        tl.store(dx + edge, g.to(dx.dtype.element_ty), mask=in_edge)
        tl.debug_barrier()  # the target's w·p is in place: now w·(p - 1), rounded once
        p = tl.exp2((target_x - maximum) * LOG2_E) / total
        tl.store(dx + target, (weight * (p - 1)).to(dx.dtype.element_ty))


@triton.jit
def _vectors_of(rows, start, V, shift, VECTOR: tl.constexpr):
    """Where the row of V elements from rows + start lies among the 16-byte vectors of memory.

    Returns a pointer at a vector's start, and counted from there in elements: lead, the row's
    first; body and tail, the start and end of its whole vectors. `rows` itself is `shift`
    elements past a boundary.
    """
    aligned = (start + shift) // VECTOR * VECTOR
    lead = (start + shift - aligned).to(tl.int32)
    body = (lead + VECTOR - 1) // VECTOR * VECTOR
    tail = tl.maximum((lead + V) // VECTOR * VECTOR, body)
    return tl.multiple_of(rows - shift + aligned, 16), lead, body, tail


@triton.jit
def _edges(lead, body, tail, V, VECTOR: tl.constexpr):
    """The row's elements before body and from tail on, in one vector each, and which are real."""
    lane = tl.arange(0, 2 * VECTOR)
    edge = tl.where(lane < VECTOR, lane, tail + lane - VECTOR)
    real = tl.where(lane < VECTOR, (edge >= lead) & (edge < body), True)
    return edge, real & (edge < lead + V)


@triton.jit(do_not_specialize=["N", "V", "stride", "scales_stride", "shift"])
def scale_kernel(
    grads, scales, N, V, stride, scales_stride, shift, BLOCK: tl.constexpr, VECTOR: tl.constexpr
):
    """4 bytes a bf16 element, or none: a row whose scale is 1 is passed over.

    Asking here instead of on the host is what spares the backward a synchronisation. Some programs
    take all rows in turn: where all are passed over, starting one a row would be the whole cost.
    """
    for row in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        scale = tl.load(scales + row * scales_stride).to(tl.float32)
        if scale != 1:
            g, lead, body, tail = _vectors_of(grads, row * stride, V, shift, VECTOR)
            edge, in_edge = _edges(lead, body, tail, V, VECTOR)
            edge_g = tl.load(g + edge, mask=in_edge).to(tl.float32)
            tl.store(g + edge, (scale * edge_g).to(g.dtype.element_ty), mask=in_edge)
            for start in range(body, tail, BLOCK):
                i = start + tl.arange(0, BLOCK)
                block_g = tl.load(g + i, mask=i < tail).to(tl.float32)
                tl.store(g + i, (scale * block_g).to(g.dtype.element_ty), mask=i < tail)

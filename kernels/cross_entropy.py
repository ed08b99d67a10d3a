"""Weighted cross-entropy in Triton: loss and gradient in one launch.

    loss_i = w_i · (logsumexp(x_i) - x_i[y_i])        g_i = w_i · (softmax(x_i) - onehot(y_i))

N rows x_i of V logits in bf16, fp16 or fp32; arithmetic in float32. Its reference in PyTorch is
loss.plain_cross_entropy_rows.

    |xxxxxxxx|xxxxxxxx|  ...  |xxxxxxxx|xx------|    a row of V = 32002 in bf16: 4000 vectors of
    0        8                         32000         16 bytes, and one that ends in padding
"""

import math

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; -inf - -inf would be NaN


def cross_entropy_rows(logits, targets, weights, losses, correct, grad):
    """Fills losses (N,) and correct (N,), and grad (N, V) unless it is None.

    logits (N, V), contiguous within a row; targets (N,) integer, in 0..V-1 if the row's weight is
    not 0; weights (N,) and losses float32; correct bool: the target is the first maximum of its
    row, and the weight is not 0. grad has logits' dtype, or is logits itself; its elements from
    column V to the end of that vector are overwritten.
    """
    N, V = logits.shape
    out = logits if grad is None else grad
    assert grad is None or grad.stride(0) >= V  # else a row's last vector would reach the next row
    if N:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(N,)](
                logits, targets, weights, losses, correct, out,
                V, logits.stride(0), out.stride(0),
                WITH_GRAD=grad is not None, **launch_shape(logits, out),
            )  # fmt: skip


def launch_shape(logits, grad):
    """BLOCK elements of a row at a time, VECTOR elements per memory access, num_warps.

    An access is 16 bytes if rows are so aligned, as linear_cross_entropy.padded makes them; if not,
    it is the largest power of two that divides all their starts, which is slower. A row of more
    than 96 KB gets an SM to itself (32 warps with over 32 registers each leave no room for
    another), so that all rows in flight fit in L2.
    """
    V, size = logits.shape[1], logits.element_size()
    starts = [n for rows in (logits, grad) for n in (rows.data_ptr() // size, rows.stride(0))]
    vector = math.gcd(16 // size, *starts)
    alone = V * size > 96 * 2**10 and vector * size == 16  # narrow accesses need more registers
    block = min(2**16 // size if alone else 8192, max(256, triton.next_power_of_2(V)))
    return {"BLOCK": block, "VECTOR": vector, "num_warps": min(32, max(1, block // 512))}


@triton.jit(do_not_specialize=["V", "stride", "grads_stride"])
def cross_entropy_kernel(
    logits, targets, weights, losses, correct, grads,
    V, stride, grads_stride,
    WITH_GRAD: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """One program per row: a pass for the sum of exponentials, a pass for the gradient.

    The minimum traffic is one read and one write per logit, 4 bytes in bf16, and only a write of
    zeros for a row of weight 0. The softmax needs the whole row's sum before its first gradient, so
    each logit is read twice. The second pass runs backward, from the blocks just read; the rest of
    the row is short enough to be still in L1 or L2 (hence evict_last, and few rows in flight if
    rows are long). The first pass also tracks the maximum, so that there is no third pass.

    A mask must be the same for a whole vector, or it could not move in one access. So the last
    vector moves whole: its part beyond the row counts as -inf, and is overwritten in grads.
    Whole blocks need no masks, so each pass has a loop for them and one for the rest of the row.
    """
    BYTES: tl.constexpr = VECTOR * logits.dtype.element_ty.primitive_bitwidth // 8
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2^31 at row 66,975 of 32,064
    x = tl.multiple_of(logits + row * stride, BYTES)
    dx = tl.multiple_of(grads + row * grads_stride, BYTES)
    vectors = tl.arange(0, BLOCK // VECTOR) * VECTOR  # the starts of a block's vectors
    lanes = tl.arange(0, VECTOR)
    whole = V // BLOCK * BLOCK if BYTES == 16 else 0  # narrower, a copy would need more registers

    # 1. A row of weight 0 is never read: 0 · NaN is NaN.
    weight = tl.load(weights + row)
    if weight == 0:
        if WITH_GRAD:
            zero = tl.zeros([1, 1], dx.dtype.element_ty)
            for start in range(0, V, BLOCK):
                i = start + vectors
                tl.store(dx + i[:, None] + lanes, zero, mask=(i < V)[:, None])
        tl.store(losses + row, 0.0)
        tl.store(correct + row, False)
        return

    # 2. Maximum and sum of exponentials: one of each per vector position in a block, so that no
    #    thread waits for another until the row is read.
    maxima = tl.full([BLOCK // VECTOR], LOWEST, tl.float32)
    totals = tl.zeros([BLOCK // VECTOR], tl.float32)
    firsts = tl.zeros([BLOCK // VECTOR], tl.int32)  # the vectors that held them first
    for REST in tl.static_range(2):
        for start in range(whole if REST else 0, V if REST else whole, BLOCK):
            i = start + vectors
            inside = (i < V)[:, None] if REST else None
            block_x = tl.load(x + i[:, None] + lanes, mask=inside, eviction_policy="evict_last")
            block_x = to_float32(block_x)
            if REST:
                block_x = tl.where(lanes < (V - i)[:, None], block_x, -float("inf"))
            highest = tl.max(block_x, axis=1)
            firsts = tl.where(highest > maxima, i, firsts)
            before, maxima = maxima, tl.maximum(maxima, highest)
            exponentials = tl.exp2((block_x - maxima[:, None]) * LOG2_E)
            totals = totals * tl.exp2((before - maxima) * LOG2_E) + tl.sum(exponentials, axis=1)
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(totals * tl.exp2((maxima - maximum) * LOG2_E), axis=0)

    # 3. The loss, and whether the target is the argmax (the first one, if logits are equal).
    target = tl.load(targets + row).to(tl.int32)
    target_x = tl.load(x + target).to(tl.float32)
    tl.store(losses + row, weight * (tl.log2(total) * LN_2 - (target_x - maximum)))
    near = tl.min(tl.where(maxima == maximum, firsts, V), axis=0) + lanes
    near_x = tl.load(x + near).to(tl.float32)
    argmax = tl.min(tl.where(near_x == maximum, near, V), axis=0)
    tl.store(correct + row, argmax == target)

    # 4. The gradient: w·p everywhere, then w·(p - 1) at the target, rounded once.
    if WITH_GRAD:
        tl.debug_barrier()  # grads may be logits: all have read before anyone writes
        scale = weight / total
        for WHOLE in tl.static_range(2):
            blocks = whole // BLOCK if WHOLE else tl.cdiv(V - whole, BLOCK)
            for done in range(0, blocks):
                i = (0 if WHOLE else whole) + (blocks - 1 - done) * BLOCK + vectors
                inside = None if WHOLE else (i < V)[:, None]
                i = i[:, None] + lanes
                block_x = tl.load(x + i, mask=inside, eviction_policy="evict_first")
                g = scale * tl.exp2((to_float32(block_x) - maximum) * LOG2_E)
                g = g.to(dx.dtype.element_ty)
                tl.store(dx + i, g, mask=inside, eviction_policy="evict_first")
        tl.debug_barrier()  # the target's w·p is in place
        p = tl.exp2((target_x - maximum) * LOG2_E) / total
        tl.store(dx + target, (weight * (p - 1)).to(dx.dtype.element_ty))


@triton.jit
def to_float32(x):
    """x.to(tl.float32), one instruction shorter for bf16, which is a float32's upper half."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)

"""lm_head and weighted cross-entropy in one function that never holds all logits at once.

    logits = hidden @ lm_head.T                      (N, V), a chunk of rows at a time
    total  = Σ_i w_i · (logsumexp(logits_i) - logits_i[y_i])
    g_i    = w_i · (softmax(logits_i) - onehot(y_i))  written over the chunk's logits
    d_hidden = g @ lm_head        d_lm_head = g.T @ hidden

N rows, V vocabulary, D hidden size. The gradients are computed in forward, while a chunk's logits
exist: three matrix products of 2·N·V·D operations each, 6·N·V·D in all. That is the minimum;
recomputing the logits in backward would cost a fourth product. A row of weight 0 costs as much as
any other, so leave such rows out beforehand; the collator knows them without asking the GPU.
"""

import math

import torch

# The largest chunk of logits. GPUs favour large chunks, because each one after the first reads and
# writes the float32 d_lm_head again; CPUs favour small ones, whose logits stay in cache.
WORKSPACE_BYTES = {"cuda": 2**30, "cpu": 2**24}


class LinearWeightedCrossEntropy(torch.autograd.Function):
    """apply(hidden, lm_head, targets, weights, cross_entropy_rows) -> total, correct, losses.

    The last argument is kernels/cross_entropy.py's in Triton, or loss.py's in plain PyTorch.
    Only total is differentiable: once, in hidden and lm_head, as often as the graph is kept.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, targets, weights, cross_entropy_rows):
        with_d_hidden, with_d_lm_head = ctx.needs_input_grad[:2]
        losses = torch.empty_like(weights)
        correct = torch.empty_like(weights, dtype=torch.bool)
        d_hidden = torch.empty_like(hidden) if with_d_hidden else None
        d_lm_head = None
        workspace = logits_workspace(hidden, lm_head)

        for start in range(0, max(1, len(hidden)), max(1, len(workspace))):  # once if no rows
            chunk = slice(start, start + len(workspace))
            # Zero times NaN is NaN in a matrix product: a row of weight 0 goes in as zeros.
            x = hidden[chunk].masked_fill((weights[chunk] == 0)[:, None], 0)
            logits = torch.mm(x, lm_head.t(), out=workspace[: len(x)])
            grad = logits if with_d_hidden or with_d_lm_head else None
            of_chunk = (rows[chunk] for rows in (targets, weights, losses, correct))
            cross_entropy_rows(logits, *of_chunk, grad)
            if with_d_hidden:
                torch.mm(grad, lm_head, out=d_hidden[chunk])
            if with_d_lm_head:
                d_lm_head = add_product(d_lm_head, grad, x, alone=len(x) == len(hidden))

        if with_d_lm_head:
            d_lm_head = d_lm_head.to(lm_head.dtype)
        ctx.save_for_backward(d_hidden, d_lm_head)
        ctx.mark_non_differentiable(correct, losses)
        ctx.set_materialize_grads(False)
        return losses.sum(), correct, losses

    @staticmethod
    def backward(ctx, grad_total, *_):
        refuse_second_derivative()
        return *(scaled(d, grad_total) for d in ctx.saved_tensors), None, None, None


def logits_workspace(hidden, lm_head):
    """Memory for one chunk's logits: (rows of a chunk, V), in hidden's dtype; padded on CUDA.

    Chunks are as even as possible, in multiples of 128 rows if there is room for that.
    """
    N, V = len(hidden), len(lm_head)
    stride = padded(V) if hidden.is_cuda else V
    most = max(1, WORKSPACE_BYTES[hidden.device.type] // (stride * hidden.element_size()))
    unit = min(128, most)
    most -= most % unit
    even = math.ceil(N / max(1, math.ceil(N / most)))
    rows = min(N, math.ceil(even / unit) * unit)
    return hidden.new_empty(rows, stride)[:, :V]


def padded(V):
    """Elements from one row of V logits to the next, so that rows start at multiples of 16 bytes.

    With V = 32002 contiguous rows would start at odd multiples of 4 bytes, which rules out the fast
    matrix kernels (TMA needs 16) and cross_entropy_kernel's 16-byte accesses.
    """
    return math.ceil(V / 64) * 64


def add_product(total, grad, x, alone):
    """total + grad.T @ x, summed in float32 whatever the dtype of grad and x (or in float64).

    A sum kept in bf16 would round once per chunk: three times the error at 16 chunks. If a chunk is
    `alone`, there is no sum to keep: its product rounds once, to the final dtype.
    """
    if x.is_cuda and x.element_size() == 2:
        if alone:
            return grad.t() @ x
        if total is None:
            return torch.mm(grad.t(), x, out_dtype=torch.float32)
        return torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad, x = grad.to(wide), x.to(wide)
    return grad.t() @ x if total is None else total.addmm_(grad.t(), x)


def scaled(grad, scale):
    """grad · scale, every element rounded once. Out of place: a kept graph may be used again.

    Not `grad * scale`: on CUDA a scale without dimensions would be rounded to grad's dtype before
    the product, up to 0.4 % of all gradients in bf16.
    """
    if grad is None or scale is None:
        return None
    return torch.mul(grad, scale.reshape(1, 1), out=torch.empty_like(grad))


def refuse_second_derivative():
    """Call it in a backward. (once_differentiable would let a constant pass for the gradient.)"""
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("this loss has a first derivative only: backward without create_graph")

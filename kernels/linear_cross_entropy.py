"""lm_head and weighted cross-entropy in one function that never holds the logits.

    logits = hidden @ weight.T                       (N, V), a chunk of rows at a time
    total  = Σ_i w_i · (logsumexp(logits_i) - logits_i[y_i])
    g_i    = w_i · (softmax(logits_i) - onehot(y_i))  written over the chunk's logits
    d_hidden = g @ weight        d_weight = g.T @ hidden

N rows, V vocabulary, D hidden size. The gradients are made in the forward, while a chunk's logits
are at hand: three matrix products of 2·N·V·D operations, 6·N·V·D in all and the fewest there can
be (making the logits again in the backward costs a fourth). What happens to a chunk between its
products is work on its elements, given by the caller: the Triton kernel in the file beside
this one, or loss.py's plain PyTorch. A row of weight 0 costs as much as any other, so leave such
rows out beforehand; the collator knows them without asking the GPU.
"""

import math

import torch

# A chunk's logits, at most. On a GPU large chunks pay: each one after the first reads and writes
# the float32 d_weight once more. On a CPU small ones do, whose logits stay in cache.
WORKSPACE_BYTES = {"cuda": 2**30, "cpu": 2**24}


class LinearWeightedCrossEntropy(torch.autograd.Function):
    """apply(hidden, weight, targets, weights, backend) -> total, correct, losses.

    `backend` has the functions cross_entropy_rows and scale_rows of kernels/cross_entropy.py. Only
    total can be differentiated: once, in hidden and weight, as often as the graph is kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, weights, backend):
        with_d_hidden, with_d_weight = ctx.needs_input_grad[:2]
        losses = torch.empty_like(weights)
        correct = torch.empty_like(weights, dtype=torch.bool)
        d_hidden = torch.empty_like(hidden) if with_d_hidden else None
        d_weight = None
        workspace = logits_workspace(hidden, weight)

        for chunk in row_chunks(len(hidden), len(workspace)):
            # Zero times NaN is NaN in a matrix product: a row of weight 0 goes in as zeros.
            x = hidden[chunk].masked_fill((weights[chunk] == 0)[:, None], 0)
            logits = torch.mm(x, weight.t(), out=workspace[: len(x)])
            grad = logits if with_d_hidden or with_d_weight else None
            backend.cross_entropy_rows(
                logits, targets[chunk], weights[chunk], losses[chunk], correct[chunk], grad
            )
            if with_d_hidden:
                torch.mm(grad, weight, out=d_hidden[chunk])
            if with_d_weight:
                d_weight = add_product(d_weight, grad, x, alone=len(x) == len(hidden))

        if with_d_weight:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        ctx.backend = backend
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(correct, losses)
        ctx.set_materialize_grads(False)
        return losses.sum(), correct, losses

    @staticmethod
    def backward(ctx, grad_total, *_):
        d_hidden, d_weight = ctx.saved_tensors
        return *(scaled(d, grad_total, ctx.backend) for d in (d_hidden, d_weight)), None, None, None


def logits_workspace(hidden, weight):
    """Room for one chunk's logits: (rows of a chunk, V), in hidden's dtype.

    On CUDA the leading dimension is a multiple of 64: at V = 32002 rows laid end to end would
    start at odd multiples of 4 bytes, out of reach of the fast matrix kernels (TMA asks for 16).
    Chunks are as even as they can be, in multiples of 128 rows where there is room for that.
    """
    N, V = len(hidden), len(weight)
    leading = math.ceil(V / 64) * 64 if hidden.is_cuda else V
    most = max(1, WORKSPACE_BYTES[hidden.device.type] // (leading * hidden.element_size()))
    unit = min(128, most)
    most -= most % unit
    even = math.ceil(N / max(1, math.ceil(N / most)))
    rows = min(N, math.ceil(even / unit) * unit)
    return hidden.new_empty(rows, leading)[:, :V]


def row_chunks(N, rows):
    return [slice(start, min(start + rows, N)) for start in range(0, N, max(1, rows))]


def add_product(total, grad, x, alone):
    """total + grad.T @ x, summed in float32 whatever the dtype of grad and x (float64 stays).

    A sum kept in bf16 would round once a chunk: three times the error at 16 chunks. A chunk that
    is `alone` has no sum to keep: its product rounds once, to the dtype that is wanted in the end.
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


def scaled(grad, scale, backend):
    """grad · scale (one number, or one a row): in place, unless this graph is to be kept.

    What autograd saved must outlive a retained backward unchanged; otherwise it is never read
    again, and scaling it where it lies spares a second copy of the gradient.
    """
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("this loss has a first derivative only: backward without create_graph")
    if grad is None or scale is None:
        return None
    if torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()
    backend.scale_rows(grad, scale.expand(len(grad)))
    return grad

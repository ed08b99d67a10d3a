"""C-RLFT's loss: source class -> reward -> weight -> weighted cross-entropy.

OpenChat (arXiv 2309.11235) knows only the source class c of a conversation x, y, and takes the
reward from it:

    (3)  r_c = 1 for the expert class, alpha < 1 for a sub-optimal one
    (6)  maximise  E[ exp(r_c / beta) · log pi(y | x, c) ]
         w_c = exp((r_c - r_max) / beta)        L = Σ_t w_t · CE_t / Σ_t w_t

with t over every supervised token of the global batch. So a weight acts only relative to the other
classes in the same global batch: a data set of one class trains the same at any reward.
This file computes w_c and Σ w·CE; train.py, which sees the whole step, divides by Σ w.

N rows (supervised tokens), V vocabulary, D hidden size.
"""

import json
import math
import os
from dataclasses import dataclass
from importlib import import_module

import torch

KERNELS = f"{__package__}.kernels" if __package__ else "kernels"  # copied into a package of yours
linear = import_module(f"{KERNELS}.linear_cross_entropy")


@dataclass(frozen=True)
class SourceClass:
    condition: str  # starts every turn of the class: "GPT4 User: ..."
    reward: float  # r_c of Eq. (3)
    match: tuple = ()  # shell patterns for the values of --class-field that mean this class


BETA = 1 / math.log(10)  # rewards 1 and 0 then give the weights 1 and 0.1 of OpenChat's own runs
SMALLEST = 1e-30  # smaller weights are set to 0: float32 cannot normalise a step of only those
DEFAULT_CLASSES = {
    "gpt4": SourceClass("GPT4", 1.0, ("gpt-4*", "gpt4*", "model: *gpt-4*")),
    "gpt3.5": SourceClass(
        "GPT3", 0.0, ("gpt-3.5*", "gpt-35*", "gpt3.5*", "text-davinci-003", "model: *gpt-3.5*")
    ),
}


def class_weights(classes, beta):
    """Weight of each source class: w_c = exp((r_c - r_max) / beta), Eq. (6) up to a factor.

    The factor exp(r_max / beta) cancels in L = Σ w·CE / Σ w, so the best class has weight 1. An
    infinite beta gives every class weight 1. To train on a different reward, change reward_weight.
    """
    if not beta > 0:
        raise ValueError(f"beta must be a number above 0, not {beta!r}")
    classes = class_table(classes)
    return {name: reward_weight(c.reward, classes, beta) for name, c in classes.items()}


def reward_weight(reward, classes, beta):
    """w = exp((r - r_max) / beta) of a class, or of a conversation with a reward of its own."""
    best = max(c.reward for c in classes.values())
    weight = 1.0 if beta == math.inf else math.exp(min((reward - best) / beta, 700))  # Eq. (6)
    return weight if weight >= SMALLEST else 0.0


def read_classes(path):
    """The class table of a JSON file: {"gpt4": {"condition": "GPT4", "reward": 1.0}, ...}."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return class_table(json.load(file, object_pairs_hook=without_repeats))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def without_repeats(pairs):
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.40} is given twice in one object")
        found[name] = value
    return found


def class_table(mapping):
    """A checked {name: SourceClass} from a mapping of names to SourceClass or its JSON form."""
    if not isinstance(mapping, dict) or not mapping:
        raise ValueError('classes must be a table: {"gpt4": {"condition": "GPT4", "reward": 1.0}}')
    table = {name: _source_class(name, entry) for name, entry in mapping.items()}
    owner = {}
    for name, entry in table.items():
        if (other := owner.setdefault(entry.condition, name)) != name:
            fault = f"condition {entry.condition!r} already belongs to class {other!r}"
            raise ValueError(f"class {name!r}: {fault}")
    return table


def _source_class(name, entry):
    fields = vars(entry) if isinstance(entry, SourceClass) else entry
    if not isinstance(fields, dict) or {*fields, "match"} != {"condition", "reward", "match"}:
        wanted = json.dumps({name: {"condition": name, "reward": 1.0}})
        raise ValueError(f"class {name!r}: must be {wanted}, not {entry!r}")
    condition, reward, match = fields["condition"], fields["reward"], fields.get("match", ())
    number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
    patterns = isinstance(match, (list, tuple)) and all(isinstance(text, str) for text in match)
    for right, problem in (
        (name and name.isprintable(), "its name is empty, or has characters that do not print"),
        (isinstance(condition, str), f"condition must be text, not {condition!r}"),
        (str(condition).isprintable(), f"condition {condition!r} has characters that do not print"),
        (str(condition) == str(condition).strip(), f"condition {condition!r} has spaces around it"),
        (number and abs(reward) <= 1e308, f"reward must be a finite number, not {reward!r}"),
        (patterns, f"match must be a list of patterns, not {match!r}"),
    ):
        if not right:
            raise ValueError(f"class {name!r}: {problem}")
    return SourceClass(condition, float(reward), tuple(match))


def expert_class(classes):
    """The name of the class with the highest reward; the model answers under its condition."""
    return max(classes, key=lambda name: classes[name].reward)


def weighted_cross_entropy(logits, targets, weights):
    """w_i · CE_i of each row: (N,) float32 (float64 for float64 logits).

    logits (N, V) of any floating dtype, targets (N,) integer, weights (N,). Differentiable once,
    in logits; the weights are constants. A row of weight 0 is never read: its loss and gradient
    are 0, whatever is in its logits and target. In any other row a target outside 0..V-1 is an
    IndexError on a CPU. On CUDA it is a device-side assertion, so that the host does not wait.
    """
    targets, weights = _checked(logits, logits.shape[-1], targets, weights)
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    return WeightedCrossEntropy.apply(logits, targets, weights, backend_for(logits))


def linear_weighted_cross_entropy(hidden, lm_head, targets, weights, per_token=False):
    """Σ_i w_i · CE_i of the logits hidden @ lm_head.T, which are never all in memory.

    hidden (N, D), lm_head (V, D), targets (N,) integer, weights (N,); targets and weights as in
    weighted_cross_entropy. Returns the sum (float32; float64 for float64 input), differentiable
    once in hidden and lm_head, and correct (N,) bool: is the target the argmax of its row, and the
    weight not 0? per_token adds the rows' w_i · CE_i (N,), without gradient.
    """
    hidden, lm_head = _one_dtype(hidden, lm_head)
    targets, weights = _checked(hidden, len(lm_head), targets, weights)
    if not torch.is_grad_enabled():  # a Function's forward cannot see this
        hidden, lm_head = hidden.detach(), lm_head.detach()
    inputs = hidden, lm_head, targets, weights, backend_for(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        outputs = linear.LinearWeightedCrossEntropy.apply(*inputs)
    return outputs if per_token else outputs[:2]


def _one_dtype(hidden, lm_head):
    for name, tensor in (("hidden", hidden), ("lm_head", lm_head)):
        if hasattr(tensor, "placements"):
            raise TypeError(
                f"{name} is a DTensor, whose rows live on many ranks: call the loss inside the "
                "forward of the module that owns lm_head, where fully_shard has gathered it"
            )
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, lm_head = hidden.to(dtype), lm_head.to(dtype)
    fit = hidden.dim() == lm_head.dim() == 2 and hidden.shape[1] == lm_head.shape[1]
    if not fit or hidden.dtype != lm_head.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and lm_head {tuple(lm_head.shape)} "
            f"{lm_head.dtype} must be (N, D) and (V, D) of one dtype: select supervised rows first"
        )
    return hidden, lm_head


def backend_for(tensor):
    """The cross_entropy_rows for logits like `tensor`: the Triton kernel's, or plain PyTorch's."""
    kernel_runs = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if kernel_runs and tensor.dtype != torch.float64:  # the kernel computes in float32
        return import_module(f"{KERNELS}.cross_entropy").cross_entropy_rows
    return plain_cross_entropy_rows


def _checked(rows, V, targets, weights):
    N = len(rows)
    if rows.dim() != 2 or targets.shape != (N,) or weights.shape != (N,):
        raise ValueError(
            f"rows {tuple(rows.shape)}, targets {tuple(targets.shape)} and weights "
            f"{tuple(weights.shape)} must be (N, ·), (N,) and (N,)"
        )
    if targets.is_floating_point():
        raise ValueError(f"targets must be integers, not {targets.dtype}")
    message = f"a target of a row with weight is outside the vocabulary, 0..{V - 1}"
    valid = (targets == targets.clamp(0, V - 1)) | (weights == 0)
    if valid.is_cuda:
        torch._assert_async(valid.all(), message)
    elif not valid.all():
        row = int(valid.logical_not().nonzero()[0])
        raise IndexError(f"{message}: targets[{row}] is {int(targets[row])}")
    weights = weights.detach().to(torch.promote_types(rows.dtype, torch.float32))
    return targets.to(torch.int64).contiguous(), weights.contiguous()


class WeightedCrossEntropy(torch.autograd.Function):
    """Losses in forward; the gradient in backward, when the scale of each row is known.

    Reading the logits again costs 2 bytes each in bf16. A gradient computed in forward would have
    to be read and written again to scale it: 4 bytes each, and as much memory again.
    """

    @staticmethod
    def forward(ctx, logits, targets, weights, cross_entropy_rows):
        losses = torch.empty_like(weights)
        correct = torch.empty_like(weights, dtype=torch.bool)
        cross_entropy_rows(logits, targets, weights, losses, correct, None)
        ctx.save_for_backward(logits, targets, weights)
        ctx.cross_entropy_rows = cross_entropy_rows
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        linear.refuse_second_derivative()
        logits, targets, weights = ctx.saved_tensors
        # 0, not the product: 0 · NaN is NaN, and a row of weight 0 has no gradient.
        weights = (weights * grad_losses).masked_fill(weights == 0, 0)
        losses = torch.empty_like(weights)
        correct = torch.empty_like(weights, dtype=torch.bool)
        N, V = logits.shape
        grad = logits.new_empty(N, linear.padded(V))[:, :V]
        ctx.cross_entropy_rows(logits, targets, weights, losses, correct, grad)
        return grad, None, None, None


def plain_cross_entropy_rows(logits, targets, weights, losses, correct, grad):
    """kernels/cross_entropy.py in plain PyTorch: the kernel's reference, and the CPU's version."""
    live = weights != 0
    x = logits.to(weights.dtype)  # float32, or float64
    if not live.all():
        x = x.masked_fill(~live[:, None], 0)
        targets = targets.masked_fill(~live, 0)
    torch.logical_and(live, x.max(dim=1).indices == targets, out=correct)
    log_p = torch.log_softmax(x, dim=1)
    torch.mul(weights, -log_p.gather(1, targets[:, None])[:, 0], out=losses)
    if grad is not None:
        p = log_p.exp_()
        p[torch.arange(len(p), device=p.device), targets] -= 1
        grad.copy_(p.mul_(weights[:, None]))

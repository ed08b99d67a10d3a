"""C-RLFT (OpenChat, arXiv 2309.11235): fine-tune a Llama on conversations of mixed quality.

    python train.py                                   the embedded example, examples/sums
    torchrun --nproc_per_node 8 train.py --model DIR --data F.jsonl --out RUN

The whole method, and where each part is:

    the class c of a conversation conditions its prompt, "GPT4 User: ..."   data.py, lay_out
    the class's reward becomes a weight, w_c = exp((r_c - r_max) / beta)    loss.py, class_weights
    Eq. (6): L = Σ w_t · CE_t / Σ w_t, supervised tokens of all ranks       forward_backward, below
    no reference model, no value model, no sampling: pi_c of Eq. (4) is the data itself

    other classes: --classes; a reward per conversation: "reward" in the data, per turn: "weight"
    longer than --max-length: cut at its end, data.py
    FSDP: build; the loss is inside the root's forward, as only there the head is whole: objective
    lm_head fused with the loss: kernels/linear_cross_entropy.py; rows of V = 32002 padded to 32064
    resume, bit for bit: support/checkpoint.py; how a signal ends a run: support/ranks.py

In order: flags, main, the loop, the sharded network, one step, evaluation, the schedule. support/
has everything that a run needs and the method does not; a Plan holds all decisions made in advance.
Shapes: T tokens of a micro-batch, N supervised rows, C classes, D hidden, V vocabulary.
"""

import argparse
import dataclasses
import gc
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# torch reads these when imported. Spinning OpenMP threads slow each other down on a shared CPU.
# Batch sizes vary; without expandable segments the CUDA allocator fragments.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# ruff: noqa: E402
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
import model
from loss import BETA, linear_weighted_cross_entropy
from support import report
from support.checkpoint import Checkpoints, write_export
from support.flags import PYTHON, Parser, check_ranges, flag_of
from support.plan import make_plan
from support.ranks import Ranks, held_output

ROOT = Path(__file__).resolve().parent
EXAMPLE = ROOT / "examples" / "sums"


@dataclasses.dataclass(frozen=True)
class Config:
    # --- the run
    model: str = ""  # folder: config.json, *.safetensors, tokenizer.model (or tokenizer.json)
    random_weights: bool = False  # start from random weights, not from the folder's
    data: list = ()  # training conversations; CLASS=FILE gives the class of a whole file
    eval_data: list = ()  # held-out conversations, in the same formats as --data
    class_field: str = "class"  # the key with a conversation's class, such as model, source, label
    classes: str = ""  # JSON file of all: {"name": {"condition", "reward"}}; default: gpt4, gpt3.5
    beta: float = BETA  # w = exp((reward - best reward) / beta); 1/ln 10 gives 1.0 and 0.1
    condition: bool = True  # put the class into the prompt (off: the paper's "w/o condition")
    reward: bool = True  # weigh by class (off: the paper's "w/o reward", every w = 1)
    out: str = ""  # folder for metrics, checkpoints and exported models
    # --- how long
    epochs: int = 5  # passes over the data
    max_steps: int = 0  # stop after this many steps (0: no limit); the schedule ends there
    seed: int = 0  # order of the data, random weights
    # --- one step: ranks x accumulate micro-batches of batch-tokens each
    batch_tokens: int = 8192  # tokens per micro-batch on one rank
    accumulate: int = 1  # micro-batches per step on each rank
    max_length: int = None  # tokens per conversation, longer ones are cut (default: 4096 or less)
    # --- optimizer
    lr: str = "auto"  # peak learning rate; auto: OpenChat's rule from the batch size
    min_lr_ratio: float = 0.1  # the cosine ends at this share of the peak
    warmup_ratio: float = 0.05  # share of the steps with a rising learning rate
    weight_decay: float = 0.1  # AdamW, on all parameters
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.95  # decay of the gradient's square
    adam_eps: float = 1e-5  # not negligible: at gradient norm 1 a 13B has RMS gradient 9e-6
    adam_precision: str = "fp32"  # of AdamW's two moments; bf16 halves their memory, on CUDA only
    clip: float = 1.0  # largest gradient norm
    # --- along the way
    eval_every: int = 0  # steps between evaluations (0: at every export); also first and last
    save_every: int = 1000  # steps between checkpoints; also at every export and the end
    keep: int = 2  # number of newest checkpoints to keep
    export_every: int = 1  # epochs between exported models (0: only the last)
    resume: bool = True  # resume from the newest checkpoint in --out
    # --- the machine
    precision: str = None  # compute in bf16 or fp32 over float32 weights (default: bf16 on CUDA)
    compile: bool = None  # torch.compile every block (default: on CUDA)
    recompute: int = None  # blocks that recompute activations in backward (default: as needed)
    replicas: int = 1  # hybrid sharding: this many groups of ranks each hold the whole model
    deterministic: bool = False  # the same bits in every run; always so on CPUs, slower on CUDA
    skip_bad: bool = False  # drop bad lines and count them, instead of stopping
    evaluate: bool = False  # only evaluate --model on --eval-data; needs no --data or --out
    dry_run: bool = False  # check everything, print the plan; train nothing
    plan_ranks: int = 0  # with --dry-run: plan for this many ranks, whatever this machine has
    plan_memory: float = 0  # with --dry-run: GiB of memory per GPU

    def __post_init__(self):
        check_ranges(self)


def parse_arguments(arguments):
    """A Config from flags; the comment beside each field above is its flag's help."""
    parser = Parser(
        prog="train.py",
        usage="""train.py                       the embedded example
       train.py --model DIR --data FILE... --out RUN
       train.py --evaluate --model DIR --eval-data FILE...""",
        description="C-RLFT: class-conditioned, reward-weighted fine-tuning of a Llama.",
        epilog="@FILE reads flags from a file; the command line overrides it.",
        argument_default=argparse.SUPPRESS,  # Config has the defaults
    )
    parser.add_fields(Config)
    flags = parser.values(arguments)
    for name in flags.keys() & {"model", "data", "eval_data", "classes", "out"}:
        expand = os.path.expanduser  # no shell expands ~ in a file of flags
        flags[name] = [*map(expand, flags[name])] if name.endswith("data") else expand(flags[name])
    require_files(parser, flags)
    try:
        return Config(**flags)
    except ValueError as error:
        parser.error(str(error))


def require_files(parser, flags):
    """End with an error if a required flag is missing."""
    needed = ["model", "data", "out"][: 2 if flags.get("dry_run") else 3]
    if flags.get("evaluate"):
        needed = ["model", "eval_data"]
    if missing := [flag_of(name) for name in needed if not flags.get(name)]:
        example = f"the embedded example's are in @{EXAMPLE}/flags.txt"
        parser.error(f"missing: {', '.join(missing)}; {example}; --help lists all")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    embedded = not arguments
    config = parse_arguments(arguments or [f"@{EXAMPLE / 'flags.txt'}"])
    ranks = Ranks()
    with ranks.errors_in_one_line():
        if embedded:
            os.chdir(ROOT)  # its flags have paths relative to this folder
            tokens = max(config.batch_tokens // ranks.world, config.max_length)
            config = dataclasses.replace(config, batch_tokens=tokens)  # ranks share the step
            ranks.say(f"no flags: as with train.py @{EXAMPLE}/flags.txt --batch-tokens {tokens}\n")
        finished = run(config, ranks)
        if embedded and finished and ranks.first:
            subprocess.run([sys.executable, EXAMPLE / "score.py", f"{config.out}/model"])


def run(config, ranks):
    """Plan and train; True if the run is done, False if it was stopped early."""
    with held_output(None if config.dry_run else config.out, ranks) as out:
        plan = make_plan(config, ranks, out)
        ranks.say(report.header(plan))
        if config.evaluate:
            table = evaluate(plan, ranks, build(plan, ranks)[0])
            ranks.say(report.evaluation(report.by_class(plan, table)))
            refuse_broken_base(table)
            return True
        ranks.say(report.schedule(plan))
        ranks.say(report.resources(plan))
        if not plan.fits:
            raise ValueError(report.what_would_fit(plan))
        return not config.dry_run and train(plan, ranks, out)


# -------------------------------------------------------------------------------------------- loop


def train(plan, ranks, out):
    """True if the run is done, False if it was stopped early. Steps count from 1."""
    config, total = plan.config, plan.order.total
    make_repeatable(config, ranks)
    checkpoints = Checkpoints(plan, ranks, out)
    done = checkpoints.resume()  # steps
    if checkpoints.finished:
        ranks.say(f"this run is finished: {done} steps are done; the model is {out / 'model'}")
        return True
    log = report.Log(plan, ranks, out, done)
    ranks.listen()
    llama, optimizer = build(plan, ranks, with_weights=not done)
    checkpoints.load(llama, optimizer)
    gc.collect()
    gc.freeze()  # long-lived objects: each later collection would spend 0.3 s on them
    stopped = evaluate_and_export(plan, ranks, llama, log, out, done)

    with ranks.thread() as loader:
        next_step = loader.submit(load_step, plan, ranks, done + 1)
        for step in range(done + 1, total + 1):
            if stopped:
                break
            began = time.perf_counter()
            bins, batches, total_weight = next_step.result()
            next_step = loader.submit(load_step, plan, ranks, step + 1)  # during this one

            sums, of_batches = forward_backward(plan, ranks, llama, batches, total_weight)
            lr = learning_rate(step, total, plan.lr, config)
            clip_and_update(optimizer, sums, lr, config.clip)
            # The only wait for a GPU in a step, so `seconds` covers the whole step.
            loss, grad_norm, signals, table = sums.to_host()
            seconds = time.perf_counter() - began
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                problem = f"step {step}: loss {loss}, gradient norm {grad_norm}"
                raise ValueError(problem + not_finite(plan, ranks, step, bins, of_batches))
            log.step(step, bins, loss, lr, grad_norm, table, seconds)

            # Once in a while: save, evaluate, export.
            done, stopped = step, signals > 0
            if step in plan.saves and not stopped:
                checkpoints.save(llama, optimizer, step)
            stopped = stopped or evaluate_and_export(plan, ranks, llama, log, out, step)
    if stopped:
        checkpoints.save(llama, optimizer, done)
        ranks.say(f"stopped after step {done} by a signal; {ranks.resumes}")
        return False
    checkpoints.finish()
    ranks.say(f"done: the model is {out / 'model'}, the metrics {out / 'metrics.jsonl'}")
    run = shlex.quote(str(out))
    ranks.say(f"  curves:  {PYTHON} plot.py {run}\n  chat:    {PYTHON} chat.py {run}")
    return True


def evaluate_and_export(plan, ranks, llama, log, out, step):
    """Evaluate and export if they are due after `step`; True if a signal to stop arrived by then.

    A run that resumes at `step` does both again: their results replace the earlier ones.
    """
    evaluate_now, export_now = step in plan.evaluations, step in plan.exports
    if evaluate_now:
        table = evaluate(plan, ranks, llama)
        if table is None:
            return True
        log.evaluation(step, table)
        if step == 0 and plan.base:
            refuse_broken_base(table)
    if export_now:
        if ranks.asked_to_stop():  # exporting is slow, and can be redone from the checkpoint
            return True
        write_export(plan, ranks, llama, out, step, log.expert_losses)
    # After the last step there is nothing left to stop.
    return (evaluate_now or export_now) and step < plan.order.total and ranks.asked_to_stop()


def make_repeatable(config, ranks):
    """The same bits in every run: always on a CPU, on CUDA with --deterministic."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may vary
    torch.use_deterministic_algorithms(config.deterministic or not ranks.cuda)
    if config.deterministic:
        # Only FlashAttention is deterministic, and from torch 2.15 on cuDNN may replace it.
        torch.backends.cuda.enable_cudnn_sdp(False)
    # We never read uninitialised memory, so there is no need to fill it.
    torch.utils.deterministic.fill_uninitialized_memory = False


# ----------------------------------------------------------------------------------------- network


def build(plan, ranks, with_weights=True):
    """The sharded network with its weights, and its optimizer.

    It is built on the meta device, sharded (each block, then the root with embeddings, norm, head),
    and only then allocated; each rank reads its rows. Weights and gradients are float32.
    """
    config, tokenizer = plan.config, plan.tokenizer
    with torch.device("meta"):
        llama = model.Llama(plan.network)
    llama.recompute = plan.recompute
    if plan.compile:
        # Recompute cheap operations (norms, SiLU) in backward instead of storing them.
        torch._functorch.config.activation_memory_budget = 0.9
        # This pass gains nothing here, and has given wrong gradients (pytorch#193061).
        torch._inductor.config.triton.mix_order_reduction = False
        for block in llama.model.layers:
            block.compile(fullgraph=plan.flash, dynamic=False)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if plan.bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary table stays float32
    )
    groups, names = (config.replicas, ranks.world // config.replicas), ("replicate", "shard")
    if config.replicas == 1:  # one dimension: a second would make a communicator per rank
        groups, names = groups[1:], names[1:]
    mesh = dist.init_device_mesh(ranks.device.type, groups, mesh_dim_names=names)
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=plan.size.resharded)
    fully_shard(llama, mesh=mesh, mp_policy=policy)
    llama.to_empty(device=ranks.device)
    if with_weights and plan.base:  # otherwise a checkpoint will be loaded
        new_tokens = [tokenizer.eot] if tokenizer.eot_is_new else plan.untrained
        model.fill_parameters(llama, config.model, plan.new_rows, new_tokens, tokenizer.ordinary)
    elif with_weights:
        model.random_parameters(llama, config.seed)
    return llama, torch.optim.AdamW(
        llama.parameters(), lr=plan.lr, betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps, weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- one step


def load_step(plan, ranks, step):
    """All bins of a step, this rank's batches, and Σ w over all tokens of the step.

    Every rank knows every bin, so L's normaliser needs no communication. None after the last step.
    """
    if step > plan.order.total:
        return None
    bins = plan.order.bins(step)
    total_weight = sum(plan.dataset.total_weight(b, plan.class_weights) for b in bins)
    mine = bins[ranks.rank :: ranks.world]  # not_finite counts on this order
    batches = [data.collate(plan.dataset, b, plan.class_weights, plan.shape) for b in mine]
    if ranks.cuda:
        pinned = [[x.pin_memory() for x in b] for b in batches]
        batches = [data.Batch(*(x.to(ranks.device, non_blocking=True) for x in b)) for b in pinned]
    return bins, batches, total_weight or 1.0  # without any weight the loss is 0 / 1


TABLE = "tokens", "loss", "correct", "weight"  # the rows of objective's table, a column per class


def objective(batch, classes):
    """C-RLFT on one micro-batch: a function of hidden (N, D) and lm_head (V, D).

    Llama.forward calls it, inside the root's forward: only there has FSDP gathered the head, and
    anywhere else its gradient would be silently wrong. Returns Σ w·CE, the numerator of L, for
    backward, and for the log a float64 table (4, C): per class the number of supervised tokens,
    their Σ CE, how many of them were predicted right, and their Σ w.
    """

    def weighted_loss(hidden, lm_head):
        total, correct, losses = linear_weighted_cross_entropy(
            hidden, lm_head, batch.targets, batch.weights, per_token=True
        )
        unweighted = losses / batch.weights  # no row of a batch has weight 0
        per_token = torch.ones_like(losses), unweighted, correct.float(), batch.weights
        table = torch.zeros(len(TABLE), classes, dtype=torch.float64, device=hidden.device)
        return total, table.index_add(1, batch.classes, torch.stack(per_token).double())

    return weighted_loss


def forward(llama, plan, batch):
    packed = batch.tokens, batch.positions, batch.cu_seqlens
    return llama(*packed, objective(batch, len(plan.classes)), batch.rows, plan.max_length)


class StepSums(NamedTuple):
    """One step over all ranks, in float64 on the device; after to_host(), in numbers."""

    loss: torch.Tensor  # L
    grad_norm: torch.Tensor
    signals: torch.Tensor  # how many ranks have a signal to stop
    table: torch.Tensor  # (4, C), as objective's; on the host {row: (C,)}

    def to_host(self):
        loss, grad_norm, signals, *table = torch.cat([x.flatten() for x in self]).tolist()
        rows = np.reshape(table, self.table.shape)
        return StepSums(loss, grad_norm, signals, dict(zip(TABLE, rows, strict=True)))


def forward_backward(plan, ranks, llama, batches, total_weight):
    """Forward and backward over this rank's micro-batches. Does not synchronise with the GPU.

    Returns the step's sums over all ranks, and this rank's Σ w·CE of each micro-batch.
    """
    of_batches, table = [], 0
    for batch in batches:
        llama.set_requires_all_reduce(batch is batches[-1])  # between replicas, once per step
        weighted_sum, of_classes = forward(llama, plan, batch)
        # Eq. (6), normalised: L = Σ w·CE / Σ w over the tokens of all ranks and micro-batches.
        # This micro-batch's part of L, times the ranks because FSDP averages their gradients.
        (weighted_sum * (ranks.world / total_weight)).backward()
        of_batches.append(weighted_sum.detach().double())
        table = table + of_classes
    of_batches = torch.stack(of_batches)
    shards = [model.local_tensor(p.grad) for p in llama.parameters()]
    norm = torch.nn.utils.get_total_norm(shards).double()  # of this rank's rows
    signal = torch.full_like(norm, ranks.signalled is not None)
    sums = torch.cat([torch.stack([of_batches.sum(), norm**2, signal]), table.flatten()])
    sums = ranks.sum(sums)  # our only all-reduce in a step
    loss = sums[0] / total_weight
    grad_norm = (sums[1] / plan.config.replicas).sqrt()  # each replica holds all shards
    return StepSums(loss, grad_norm, sums[2], sums[3:].reshape(table.shape)), of_batches


def clip_and_update(optimizer, sums, lr, clip):
    """optimizer.step() on the gradient clipped to a norm of `clip`, as clip_grad_norm_ does.

    Fused AdamW divides by grad_scale and skips the update if found_inf, both on the device. So
    clipping needs no synchronisation, and a NaN or infinite loss or gradient changes no weight.
    """
    grad_norm = sums.grad_norm.float()
    optimizer.grad_scale = (grad_norm / clip).clamp(min=1)
    finite = sums.loss.isfinite() & sums.grad_norm.isfinite()
    optimizer.found_inf = finite.logical_not().float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def not_finite(plan, ranks, step, bins, of_batches):
    """The conversations behind a NaN or inf, for the error; every rank must call it."""
    of_ranks = ranks.gather(of_batches.tolist())  # bin b: micro-batch b // ranks of rank b % ranks
    bad = [b for b, loss in enumerate(np.transpose(of_ranks).flat) if not math.isfinite(loss)]
    conversations = [c for b in bad or range(len(bins)) for c in bins[b]]
    where = "\n  ".join(plan.dataset.where(c) for c in conversations[:20])
    more = f"\n  ... and {len(conversations) - 20} more" if len(conversations) > 20 else ""
    unchanged = "The weights and the last checkpoint are unchanged. Try a lower --lr, or look"
    advice = f"{BASE_IS_BROKEN}. Look" if step == 1 and plan.base else unchanged
    return f". {advice} at the conversations of this batch:\n  {where}{more}"


BASE_IS_BROKEN = "The weights of --model already give this"


def refuse_broken_base(table):
    """ValueError if an evaluation of the weights of --model gave NaN or infinity."""
    if not np.isfinite(table["loss"]).all():
        raise ValueError(f"the loss on --eval-data is not finite. {BASE_IS_BROKEN}")


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(plan, ranks, llama):
    """{row of TABLE: (C,)} of the held-out conversations; None if a signal to stop came first."""
    lengths, stopped = plan.eval_dataset.lengths, False
    table = torch.zeros(len(TABLE), len(plan.classes), dtype=torch.float64, device=ranks.device)
    llama.eval()
    for bins in data.pack(lengths, plan.config.batch_tokens, ranks.world, 0, 0):
        if stopped := ranks.asked_to_stop():
            break
        batch = data.collate(plan.eval_dataset, bins[ranks.rank], plan.class_weights, plan.shape)
        batch = data.Batch(*(x.to(ranks.device) for x in batch))
        table += forward(llama, plan, batch)[1]
    llama.train()
    # A forward without a backward leaves FSDP's root gathered, and blocks that are not resharded.
    # Their parameters would not be the tensors that AdamW has (pytorch#131965).
    for part in (*llama.model.layers, llama):
        part.reshard()
    return None if stopped else dict(zip(TABLE, ranks.sum(table).cpu().numpy(), strict=True))


# ---------------------------------------------------------------------------------------- schedule


def learning_rate(step, total, peak, config):
    """Linear warm-up, then a cosine to min_lr_ratio; steps count from 1, as in OpenChat."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


if __name__ == "__main__":
    main()

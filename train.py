"""C-RLFT (OpenChat, arXiv 2309.11235): fine-tune a Llama on conversations of mixed quality.

    python train.py                                   the embedded example, examples/sums
    torchrun --nproc_per_node 8 train.py --model DIR --data F.jsonl --out RUN

The whole method, with where each part lives:

    the class c of a conversation conditions its prompt, "GPT4 User: ..."     data.py, lay_out
    the class's reward becomes a weight, w_c = exp((r_c - r_max) / beta)      loss.py, class_weights
    L = Σ w_t · CE_t / Σ w_t over the learned tokens of a step, all ranks      gradients, below
    no reference model, no value model, no sampling: pi_c of Eq. (4) is the data itself
    another reward, of a line or of a single turn, is a "weight" in the data  support/formats.py
    the head and the loss without the logits, rows padded where V = 32002     kernels/

Read down: flags, main, the loop, the sharded network, one step, evaluation; then the schedule, the
order of the data, and the plan of a run. What a run needs and the method does not is in support/.
Shapes: T tokens of a micro-batch, N supervised rows, C classes, D hidden, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import math
import os
import shlex
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path

# Read when torch is imported. Threads that spin at a barrier hold each other up where other
# programs share the CPU. Every micro-batch has another number of rows, and a GPU's memory would be
# left in pieces that are too small for the next one's.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# ruff: noqa: E402
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
import model
from loss import (
    BETA,
    DEFAULT_CLASSES,
    class_table,
    class_weights,
    linear_weighted_cross_entropy,
    read_classes,
)
from support import memory, report
from support.checkpoint import Checkpoints, as_exported, export, is_exported, read_export
from support.flags import Parser, flag_of
from support.ranks import Ranks, SaveFailed, held_output, is_lost_rank
from support.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent
EXAMPLE = ROOT / "examples" / "sums"


@dataclasses.dataclass(frozen=True)
class Config:
    # --- what
    model: str = ""  # folder: config.json, *.safetensors, tokenizer.model (or tokenizer.json)
    random_weights: bool = False  # begin with random weights instead of the folder's
    data: list = ()  # training conversations; CLASS=FILE: all of them are of that class
    eval_data: list = ()  # held-out conversations, in files as those of --data
    class_field: str = "class"  # what names a conversation's class, such as model, source, label
    classes: str = ""  # JSON {class: {"condition", "reward"}}; without it gpt4 1.0, gpt3.5 0.0
    beta: float = BETA  # w = exp((reward - best reward) / beta); 1/ln 10 gives 1.0 and 0.1
    condition: bool = True  # put the class into the prompt (off: the paper's "w/o condition")
    reward: bool = True  # weigh by class (off: the paper's "w/o reward", every w = 1)
    out: str = ""  # folder for metrics, checkpoints and exported models
    # --- how long
    epochs: int = 5  # passes over the data
    max_steps: int = 0  # stop after this many steps (0: no limit); the schedule ends there
    seed: int = 0  # order of the data, random weights
    # --- a step: ranks x accumulate micro-batches of batch-tokens each
    batch_tokens: int = 8192  # tokens of a micro-batch on one rank
    accumulate: int = 1  # micro-batches a step on each rank
    max_length: int = None  # tokens of a conversation, longer are cut (default: 4096, or what fits)
    # --- optimizer
    lr: str = "auto"  # peak learning rate; auto: OpenChat's rule from the batch size
    min_lr_ratio: float = 0.1  # the cosine ends at this share of the peak
    warmup_ratio: float = 0.05  # share of the steps with a rising learning rate
    weight_decay: float = 0.1  # AdamW, on all parameters
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.95  # decay of the gradient's square
    adam_eps: float = 1e-5  # not negligible: at gradient norm 1 a 13B has RMS gradient 9e-6
    clip: float = 1.0  # largest gradient norm
    # --- along the way
    eval_every: int = 0  # steps between evaluations (0: at every export), besides first and last
    save_every: int = 1000  # steps between checkpoints, besides every export and the end
    keep: int = 2  # newest checkpoints kept
    export_every: int = 1  # epochs between exported models (0: only the last)
    resume: bool = True  # go on from the newest checkpoint in --out
    # --- the machine
    precision: str = None  # compute in bf16 or fp32 over float32 weights (default: bf16 on CUDA)
    compile: bool = None  # torch.compile every block (default: on CUDA)
    recompute: int = None  # blocks that recompute activations in backward (default: as needed)
    replicas: int = 1  # hybrid sharding: this many groups of ranks each hold the whole model
    deterministic: bool = False  # the same bits in every run; always on for a CPU, slower on CUDA
    skip_bad: bool = False  # drop bad lines and count them, instead of stopping
    evaluate: bool = False  # only measure --model on --eval-data; needs no --data and no --out
    dry_run: bool = False  # check everything, print plan, memory and a batch; train nothing
    plan_ranks: int = 0  # with --dry-run: plan for this many ranks, none of which need be here
    plan_memory: float = 0  # with --dry-run: GiB of one rank's GPU

    def __post_init__(self):
        for name in ("plan_ranks", "plan_memory"):
            _require(self.dry_run or not getattr(self, name), name, "used with --dry-run")
        _require(not (self.evaluate and self.dry_run), "evaluate", "used without --dry-run")
        for name, least in LEAST.items():
            _require((getattr(self, name) or 0) >= least, name, f"at least {least}")
        for name in ("beta", "adam_eps", "clip"):
            _require(getattr(self, name) > 0, name, "above 0")
        for name in ("min_lr_ratio", "warmup_ratio", "adam_beta1", "adam_beta2", "weight_decay"):
            _require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        for name in ("adam_beta1", "adam_beta2"):
            _require(getattr(self, name) < 1, name, "below 1")
        _require(self.seed < 2**32, "seed", "below 2^32")
        longest = self.max_length is None or 2 <= self.max_length <= self.batch_tokens
        _require(longest, "max_length", f"from 2 to --batch-tokens {self.batch_tokens}")
        _require(self.precision in (None, "bf16", "fp32"), "precision", "bf16 or fp32")
        _require(self.lr == "auto" or _is_number(self.lr), "lr", "auto or a number above 0")


LEAST = {
    "epochs": 1, "batch_tokens": 2, "accumulate": 1, "keep": 1, "replicas": 1,
    "max_steps": 0, "eval_every": 0, "save_every": 0, "export_every": 0, "seed": 0,
    "recompute": 0, "plan_ranks": 0, "plan_memory": 0,
}  # fmt: skip


def _require(holds, name, what):
    if not holds:
        raise ValueError(f"{flag_of(name)} must be {what}")


def _is_number(text):
    with contextlib.suppress(ValueError):
        return 0 < float(text) < math.inf
    return False


def parse_arguments(arguments):
    """A Config from flags; a comment beside its field above is a flag's help."""
    parser = Parser(
        prog="train.py",
        usage=USAGE,
        description="C-RLFT: class-conditioned, reward-weighted fine-tuning of a Llama.",
        epilog="@FILE reads flags from a file; those of the command line win.",
        fromfile_prefix_chars="@",
        argument_default=argparse.SUPPRESS,  # Config has the defaults
    )
    metavars = {"model": "DIR", "out": "RUN", "classes": "FILE", "class_field": "KEY"}
    parser.add_fields(Config, metavars)
    flags = parser.values(arguments)
    for name in flags.keys() & {"model", "data", "eval_data", "classes", "out"}:
        expand = os.path.expanduser  # of ~ in a file of flags, which no shell sees
        flags[name] = [*map(expand, flags[name])] if name.endswith("data") else expand(flags[name])
    require_files(parser, flags, arguments)
    try:
        return Config(**flags)
    except ValueError as error:
        parser.error(str(error))


USAGE = """train.py                       the embedded example
       train.py --model DIR --data FILE... --out RUN
       train.py --evaluate --model DIR --eval-data FILE..."""


def require_files(parser, flags, arguments):
    """What a run cannot do without, or an error with the line to run."""
    needed = ["model", "data", "out"][: 2 if flags.get("dry_run") else 3]
    if flags.get("evaluate"):
        needed = ["model", "eval_data"]
    missing = [flag_of(name) for name in needed if not flags.get(name)]
    if len(missing) == len(needed) and "data" in needed:  # the embedded example was to be changed
        there = "" if Path.cwd() == ROOT else f"cd {shlex.quote(str(ROOT))} && "
        line = shlex.join([f"@{EXAMPLE.relative_to(ROOT)}/flags.txt", *arguments])
        parser.error(
            "--model, --data and --out make up a run; to change the embedded example: "
            f"{there}python train.py {line} --out runs/other"
        )
    if missing:
        parser.error_missing(missing, arguments)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    embedded = not arguments
    if embedded:
        arguments = [f"@{EXAMPLE / 'flags.txt'}"]
    config = parse_arguments(arguments)
    try:
        ranks = Ranks()
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        sys.exit(f"error: not all ranks could be reached: {error}")
    if embedded:
        os.chdir(ROOT)  # its flags name files relative to this one
        ranks.say(f"no flags: the embedded example, as with\n  train.py @{EXAMPLE / 'flags.txt'}\n")
    try:
        finished = run(config, ranks)
        if embedded and finished and ranks.first:
            subprocess.run([sys.executable, EXAMPLE / "score.py", f"{config.out}/model"])
        ranks.finish()
    except (ValueError, OSError, SaveFailed) as error:
        ranks.stop(f"error: {error}")
    except KeyboardInterrupt:
        ranks.stop("interrupted")
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        ranks.stop(f"error: lost another rank; the same command goes on from here ({error})")


def run(config, ranks):
    """Plan and train; True where the run is done, False where it was stopped before."""
    with held_output(None if config.dry_run else config.out, ranks) as out:
        plan = make_plan(config, ranks, out)
        ranks.say(report.header(plan))
        if config.evaluate:
            return evaluate_alone(plan, ranks)
        ranks.say(report.schedule(plan))
        if config.dry_run:
            ranks.say(report.first_bin(plan))
        ranks.say(report.memory_of_a_rank(plan))
        if not plan.fits:
            raise ValueError(report.what_would_fit(plan))
        return not config.dry_run and train(plan, ranks, out)


# -------------------------------------------------------------------------------------------- loop


def train(plan, ranks, out):
    """True where the run is done, False where it was stopped before. Steps count from 1."""
    config, total = plan.config, plan.order.total
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may vary
    torch.use_deterministic_algorithms(config.deterministic or not ranks.cuda)
    if config.deterministic:
        # From torch 2.15 on cuDNN may attend instead of FlashAttention, which repeats its bits.
        torch.backends.cuda.enable_cudnn_sdp(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing reads what it fills
    checkpoints = Checkpoints(plan, ranks, out)
    step = checkpoints.resume()  # so many steps are done
    log = report.Log(plan, ranks, out, step)
    due = ranks.first_does("due", lambda: owed_after(plan, log, out, step))
    if step == total and not any(due):
        ranks.say(f"this run is finished: {step} steps are done; the model is {out / 'model'}")
        return True
    ranks.listen()
    llama, optimizer = build(plan, ranks, with_weights=step == 0)
    if step:
        checkpoints.load(llama, optimizer)
    # What stands now stays: later collections, a third of a second each, need not look at it.
    gc.collect()
    gc.freeze()
    stopped = not evaluate_and_export(plan, ranks, llama, log, out, step, due)

    with ranks.thread() as loader:  # makes the next step's batches during this one
        batches_of = functools.partial(loader.submit, load_step, plan, ranks)
        pending = batches_of(step + 1) if step < total else None
        while step < total and not stopped:
            began = time.perf_counter()
            step += 1
            bins, batches, total_weight = pending.result()
            if step < total:
                pending = batches_of(step + 1)
            sums, losses = gradients(plan, ranks, llama, batches, total_weight)
            lr = learning_rate(step, total, plan.lr, config)
            update(optimizer, sums, lr, config.clip)
            # Here, and nowhere else in a step, a GPU is waited for: the step's time is all in.
            loss, grad_norm, signalled, *table = sums.tolist()
            seconds = time.perf_counter() - began
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                where = f"step {step}: loss {loss}, gradient norm {grad_norm}"
                raise ValueError(where + not_finite(plan, ranks, bins, losses))
            stopped = signalled > 0
            log.step(step, bins, loss, lr, grad_norm, np.reshape(table, (4, -1)), seconds)

            # Once in a while: a checkpoint, and then what may fail without losing anything.
            if plan.saves(step) and not stopped:
                with ranks.save_may_fail(unless=step == total):
                    checkpoints.save(llama, optimizer, step)
            due = plan.due(step)
            stopped = stopped or not evaluate_and_export(plan, ranks, llama, log, out, step, due)
    if stopped:
        checkpoints.save(llama, optimizer, step)
        ranks.say(f"stopped after step {step}, as asked; the same command goes on from here")
        return False
    ranks.say(f"done: the model is {out / 'model'}, the metrics {out / 'metrics.jsonl'}")
    run = shlex.quote(str(out))
    ranks.say(f"  curves:  python plot.py {run}\n  chat:    python chat.py {run}")
    return True


def evaluate_and_export(plan, ranks, llama, log, out, step, due):
    """What is `due` after a step; False where a signal to stop came meanwhile."""
    evaluation_due, export_due = due
    if evaluation_due:
        table = evaluate(plan, ranks, llama)
        if table is None:
            return False
        log.evaluation(step, table)
    if export_due:
        if ranks.asked_to_stop():  # it may take long, and the checkpoint is there
            return False
        with ranks.save_may_fail(unless=step == plan.order.total):
            export(plan, ranks, llama, out, step, log.expert_losses())
    # After the last step nothing is left to be stopped.
    return step == plan.order.total or not (any(due) and ranks.asked_to_stop())


def owed_after(plan, log, out, step):
    """What a run that is taken up after `step` steps still owes to that step, as `Plan.due`."""
    evaluation_due, export_due = plan.due(step)
    evaluated, exported = step in log.evaluations, is_exported(plan, out, step, log.expert_losses())
    return evaluation_due and not evaluated, export_due and not exported


# ----------------------------------------------------------------------------------------- network


def build(plan, ranks, with_weights=True):
    """The sharded network with its weights, and its optimizer.

    Built without memory (meta), sharded block by block, then the root, which holds embeddings,
    norm and head; only then allocated, and every rank reads its own rows. Weights, gradients and
    AdamW's state are float32; with bf16 a block computes in bf16 on gathered copies.
    """
    config = plan.config
    with torch.device("meta"):
        llama = model.Llama(plan.network)
    llama.recompute = plan.recompute
    if plan.compile:
        # What costs no matrix product is made again in backward rather than kept: norms, SiLU.
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
    shape, names = (config.replicas, ranks.world // config.replicas), ("replicate", "shard")
    if config.replicas == 1:  # a dimension of one rank would be a process group for each rank
        shape, names = shape[1:], names[1:]
    mesh = dist.init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(llama, mesh=mesh, mp_policy=policy)
    llama.to_empty(device=ranks.device)
    if with_weights and plan.base:  # not where a checkpoint is to be loaded
        new_tokens = [plan.tokenizer.eot] if plan.tokenizer.eot_is_new else plan.untrained
        model.fill_parameters(
            llama, config.model, plan.new_rows, new_tokens, plan.tokenizer.ordinary
        )
    elif with_weights:
        model.random_parameters(llama, config.seed)
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=plan.lr, betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps, weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    return llama, optimizer


# ---------------------------------------------------------------------------------------- one step


def load_step(plan, ranks, step):
    """All bins of a step, this rank's batches of them, and Σ w over all of the step's tokens.

    Every rank knows every bin, so the normaliser of the loss needs no communication.
    """
    bins, device = plan.order.bins(step), ranks.device
    total_weight = sum(plan.dataset.total_weight(b, plan.class_weights) for b in bins)
    mine = bins[ranks.rank :: ranks.world]  # as not_finite takes it
    batches = [data.collate(plan.dataset, b, plan.class_weights, plan.shape) for b in mine]
    if ranks.cuda:
        batches = [
            data.Batch(*(x.pin_memory().to(device, non_blocking=True) for x in b)) for b in batches
        ]
    return bins, batches, total_weight or 1.0  # without any weight the loss is 0 / 1


def objective(batch, classes):
    """C-RLFT on one micro-batch: what Llama.forward calls with hidden (N, D) and the head (V, D).

    Returns the numerator of L, Σ w·CE, to be differentiated, and for the log a float64 table
    (4, C), its rows report.TABLE: tokens, their Σ CE, how many were the likeliest, their Σ w.
    """

    def weighted_loss(hidden, lm_head):
        total, correct, losses = linear_weighted_cross_entropy(
            hidden, lm_head, batch.targets, batch.weights, per_token=True
        )
        unweighted = losses / batch.weights  # no row of a batch has weight 0
        per_token = torch.stack(
            [torch.ones_like(losses), unweighted, correct.float(), batch.weights]
        )
        table = torch.zeros(4, classes, dtype=torch.float64, device=hidden.device)
        return total, table.index_add(1, batch.classes, per_token.double())

    return weighted_loss


def forward(llama, plan, batch):
    return llama(
        batch.tokens, batch.positions, batch.cu_seqlens,
        objective(batch, len(plan.classes)), batch.rows, plan.max_length,
    )  # fmt: skip


def gradients(plan, ranks, llama, batches, total_weight):
    """Forward and backward over this rank's micro-batches of one step; nothing here waits for it.

    Returns over all ranks, in float64, L, the norm of its gradient, how many ranks have a signal to
    stop, and `objective`'s table, laid end to end; and this rank's Σ w·CE of each micro-batch.
    """
    losses, table = [], 0
    for batch in batches:
        llama.set_requires_all_reduce(batch is batches[-1])  # between replicas, once a step
        weighted_sum, sums = forward(llama, plan, batch)
        # Eq. (6), normalised: L = Σ w·CE / Σ w over the tokens of all ranks and micro-batches.
        # This micro-batch's part of L; x ranks, as FSDP takes the mean of their gradients.
        (weighted_sum * (ranks.world / total_weight)).backward()
        losses.append(weighted_sum.detach().double())
        table = table + sums
    losses = torch.stack(losses)
    shards = [model.local_tensor(p.grad) for p in llama.parameters()]
    norm = torch.nn.utils.get_total_norm(shards).double()  # of what this rank holds
    sums = [losses.sum(), norm**2, torch.full_like(norm, ranks.signalled is not None)]
    sums = ranks.sum(torch.cat([torch.stack(sums), table.flatten()]))  # one all-reduce
    sums[0] /= total_weight
    sums[1] = (sums[1] / plan.config.replicas).sqrt()  # each of which holds all shards
    return sums, losses


def update(optimizer, sums, lr, clip):
    """AdamW on the gradient clipped to a norm of `clip`, as clip_grad_norm_ does before it.

    Within AdamW's own pass over the gradients: it divides them by grad_scale, and leaves all as it
    is where found_inf is 1. So neither waits for the norm to be known here.
    """
    grad_norm = sums[1].float()
    optimizer.grad_scale = (grad_norm / clip).clamp(min=1)
    optimizer.found_inf = sums[:2].isfinite().all().logical_not().float()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def not_finite(plan, ranks, bins, losses):
    """What to say of a step with NaN or inf; every rank comes here, before the optimizer."""
    of_rank = torch.zeros(ranks.world, len(losses), dtype=torch.float64, device=ranks.device)
    of_rank[ranks.rank] = losses
    of_bin = ranks.sum(of_rank).T.flatten()  # bin b is micro-batch b // ranks of rank b % ranks
    bad = [b for b, loss in enumerate(of_bin.tolist()) if not math.isfinite(loss)]
    conversations = [c for b in bad or range(len(bins)) for c in bins[b]]
    where = "\n  ".join(plan.dataset.where(c) for c in conversations[:20])
    more = f"\n  ... and {len(conversations) - 20} more" if len(conversations) > 20 else ""
    return (
        ". The weights were not changed, the last checkpoint is untouched. Try a lower --lr, or "
        f"look at the conversations of this batch:\n  {where}{more}"
    )


# --------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(plan, ranks, llama):
    """(4, classes) table of the held-out conversations, as `objective`'s.

    None where a signal to stop came: it is asked for at every batch.
    """
    lengths, stopped = plan.eval_dataset.lengths, False
    table = torch.zeros(4, len(plan.classes), dtype=torch.float64, device=ranks.device)
    llama.eval()
    for bins in data.pack(lengths, plan.config.batch_tokens, ranks.world, 0, 0):
        if stopped := ranks.asked_to_stop():
            break
        batch = data.collate(plan.eval_dataset, bins[ranks.rank], plan.class_weights, plan.shape)
        batch = data.Batch(*(x.to(ranks.device) for x in batch))
        table += forward(llama, plan, batch)[1]
    llama.train()
    # A forward without a backward leaves FSDP's root gathered: embedding, norm and head would be
    # other tensors than those that AdamW has (pytorch#131965).
    llama.reshard()
    return None if stopped else ranks.sum(table).cpu().numpy()


def evaluate_alone(plan, ranks):
    """With --evaluate: loss and accuracy by class of --model's own weights, on --eval-data."""
    llama, _ = build(plan, ranks)
    table = evaluate(plan, ranks, llama)
    ranks.say(report.evaluation(plan, table))
    return True


# ------------------------------------------------------------------------------- schedule and order


def learning_rate(step, total, peak, config):
    """Linear warm-up, then a cosine to min_lr_ratio; steps count from 1, as OpenChat's."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


class Order:
    """Which conversations make up a step: a function of (lengths, seed, epoch) alone."""

    def __init__(self, lengths, config, bins_per_step):
        self.pack = functools.lru_cache(maxsize=1)(  # pack(epoch): all its steps
            functools.partial(data.pack, lengths, config.batch_tokens, bins_per_step, config.seed)
        )
        self.ends, self.fullest = [], 0  # last step of each epoch; most conversations of a bin
        for epoch in range(config.epochs):
            begun = self.ends[-1] if self.ends else 0
            if not config.max_steps or begun < config.max_steps:
                self.ends.append(begun + len(self.pack(epoch)))
                self.fullest = max(self.fullest, *(len(b) for s in self.pack(epoch) for b in s))
        self.total = min(config.max_steps or math.inf, self.ends[-1])

    def epoch_of(self, step):
        """The epoch of a step; both count from 1."""
        return bisect_left(self.ends, step) + 1

    def ends_epoch(self, step, every):
        """Is `step` the last of every `every`-th epoch?"""
        return bool(every) and step in self.ends and self.epoch_of(step) % every == 0

    def bins(self, step):
        assert 1 <= step <= self.ends[-1]
        epoch = self.epoch_of(step) - 1
        begun = self.ends[epoch - 1] if epoch else 0
        return self.pack(epoch)[step - begun - 1]


# -------------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything decided before a weight is read."""

    config: Config
    world: int  # ranks
    bf16: bool
    flash: bool  # does FlashAttention attend?
    compile: bool
    classes: dict  # {name: SourceClass}
    class_weights: np.ndarray | None  # (C,), None without reward: every w is 1
    tokenizer: Tokenizer
    network: model.LlamaConfig
    new_rows: int  # that the vocabulary gains over the checkpoint's
    untrained: list  # special tokens of a turn that the checkpoint has, but never trained
    base: str | None  # what tells the weights of --model from others; None: random ones
    max_length: int
    dataset: data.Dataset
    eval_dataset: data.Dataset | None
    order: Order
    shape: tuple | None  # (tokens, offsets, longest) of every batch, where it is compiled
    lr: float
    recompute: int  # blocks
    size: memory.Size
    memory: dict  # {part: bytes a rank}
    available: int  # bytes a rank has; 0: not limited here

    @property
    def fits(self):
        return not self.available or sum(self.memory.values()) <= self.available

    @property
    def eval_name(self):
        return self.eval_dataset.folder.name if self.eval_dataset else None

    def due(self, step):
        """(evaluation, export): what is to be made after `step` steps; 0 is before the first."""
        every, order = self.config.eval_every, self.order
        export_due = step == order.total or order.ends_epoch(step, self.config.export_every)
        evaluation_due = step == 0 or export_due or (every and step % every == 0)
        return bool(self.eval_dataset and evaluation_due), export_due

    def saves(self, step):
        """Is a checkpoint due after `step` steps?"""
        every = self.config.save_every
        return self.due(step)[1] or bool(every and step % every == 0)


def make_plan(config, ranks, out):
    """The Plan of a run; whatever is wrong with the input raises here. Tokenizes the data."""
    table = DEFAULT_CLASSES
    if config.evaluate:
        config, table = as_exported(config)
    world = config.plan_ranks or ranks.world
    _require(world % config.replicas == 0, "replicas", f"a divisor of {world} ranks")
    cuda = ranks.cuda or config.plan_memory > 0  # a GPU is planned for, here or not
    bf16 = (config.precision or ("bf16" if cuda else "fp32")) == "bf16"

    classes = read_classes(config.classes) if config.classes else class_table(table)
    weights = np.array(list(class_weights(classes, config.beta).values()))
    weights = weights if config.reward else None

    tokenizer = Tokenizer(config.model)
    network, new_rows = network_to_train(config.model, tokenizer)
    pretrained = has_weights(config)
    if pretrained:
        model.check_weights(config.model, network, new_rows)
    new = pretrained and not read_export(Path(config.model))  # an export has all its rows
    untrained = model.untrained(config.model, tokenizer.marks) if new else []
    # Only FlashAttention has fixed shapes; elsewhere each batch would be compiled anew.
    flash = cuda and bf16 and model.flash_takes(network.head_dim)
    compile = flash if config.compile is None else config.compile
    context = network.max_position_embeddings
    max_length = data.length_limit(config.max_length, config.batch_tokens, context)

    def tokenized(field):
        prepare = functools.partial(
            data.prepare, getattr(config, field), tokenizer, classes, out / "tokens",
            max_length=max_length, condition=config.condition, class_field=config.class_field,
            skip_bad=config.skip_bad,
            progress=report.Progress(f"tokenizing {flag_of(field)}"),
        )  # fmt: skip
        name = ranks.first_does(field, lambda: prepare().folder.name)
        return data.Dataset(out / "tokens" / name, data.sources(getattr(config, field), classes))

    dataset = tokenized("data")
    eval_dataset = tokenized("eval_data") if config.eval_data else None
    order = Order(dataset.lengths, config, world * config.accumulate)

    share = dataset.total_weight(slice(None), None) / int(dataset.lengths.sum())
    supervised = config.batch_tokens * world * config.accumulate * share  # tokens a step

    offsets = most_offsets(order, eval_dataset, world, config, max_length)
    sequences = offsets - 1 if flash else 0
    size = memory.Size(world // config.replicas, config.batch_tokens, bf16, compile, sequences)
    available = memory.of_a_rank(config.plan_memory)
    recompute = config.recompute
    if recompute is None:
        recompute = memory.blocks_to_recompute(network, size, available)
    return Plan(
        config, world, bf16, flash, compile, classes, weights, tokenizer, network, new_rows,
        untrained, identity_of_weights(config, ranks) if pretrained else None,
        max_length, dataset, eval_dataset, order,
        shape=(config.batch_tokens, offsets, max_length) if compile else None,
        lr=auto_lr(network, tokenizer, supervised) if config.lr == "auto" else float(config.lr),
        recompute=min(recompute, network.num_hidden_layers),
        size=size,
        memory=memory.estimate(network, size, recompute),
        available=available,
    )  # fmt: skip


def network_to_train(folder, tokenizer):
    """(LlamaConfig, rows that its vocabulary gains over the checkpoint's)."""
    config = model.LlamaConfig.from_folder(folder)
    tokenizer.check_vocabulary(config.vocab_size)
    rows = max(config.vocab_size, tokenizer.vocab_size)
    tokens = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eot}
    network = dataclasses.replace(config, vocab_size=rows, **tokens)
    return network, rows - config.vocab_size


def has_weights(config):
    """Does the run begin with the folder's weights? ValueError where it has none to begin with."""
    if config.random_weights:
        return False
    found = model.has_weights(config.model)
    if not found and not config.dry_run:  # which needs none
        raise ValueError(
            f"{config.model}: no *.safetensors there"
            + ("; --random-weights begins with random ones" if not config.evaluate else "")
        )
    return found


def identity_of_weights(config, ranks):
    """What tells them from others; ValueError where the machines of a run have different ones."""
    first_of_machine = int(os.environ.get("LOCAL_RANK", 0)) == 0 and not config.dry_run
    found = set(ranks.gather(model.fingerprint(config.model) if first_of_machine else ""))
    if len(found - {""}) > 1:
        raise ValueError(f"--model {config.model}: not every machine has the same weights there")
    return max(found) or "not read"


def most_offsets(order, eval_dataset, world, config, longest):
    """Offsets that hold the conversations of every bin of the run, and data.collate's padding."""
    tokens, fullest = config.batch_tokens, order.fullest
    if eval_dataset:
        steps = data.pack(eval_dataset.lengths, tokens, world, 0, 0)
        fullest = max(fullest, *(len(b) for step in steps for b in step))
    return fullest + math.ceil(tokens / longest) + 1


def auto_lr(network, tokenizer, supervised_tokens):
    """OpenChat's rule: 3e-4 (Mistral / 6, Llama 3 / 5.3) · sqrt(supervised tokens a step / 4e6)."""
    llama = 5.3 if tokenizer.template.name == "openchat_3.6" else 1
    divisor = 6 if network.model_type == "mistral" else llama
    return 3e-4 / divisor * math.sqrt(supervised_tokens / 4e6)


if __name__ == "__main__":
    main()

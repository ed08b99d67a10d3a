"""C-RLFT (OpenChat, arXiv 2309.11235): fine-tune a Llama on conversations of mixed quality.

    python train.py                                   the embedded example, examples/sums
    torchrun --nproc_per_node 8 train.py --model DIR --data F.jsonl --out RUN

The whole method, with where each part lives:

    the class c of a conversation conditions its prompt, "GPT4 User: ..."     data.py, lay_out
    the class's reward becomes a weight, w_c = exp((r_c - r_max) / beta)      loss.py, class_weights
    L = Σ w_t · CE_t / Σ w_t over all tokens of all ranks and micro-batches   gradients, below
    no reference model, no value model, no sampling: pi_c of Eq. (4) is the data itself

Read down: flags, main, the loop, one step, evaluation; then what they use: the plan of a run, the
sharded network, log, exports and checkpoints, and the processes that run all this.
Shapes: T tokens of a micro-batch, N supervised rows, C classes, D hidden, V vocabulary.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from bisect import bisect_left
from pathlib import Path

# Threads that spin at a barrier hold each other up where other programs share the CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

# ruff: noqa: E402
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import data
import loss
import model
from support.checkpoint import Checkpoints, export, is_exported
from support.ranks import Ranks, SaveFailed, held_output, is_lost_rank

ROOT = Path(__file__).resolve().parent
EXAMPLE = ROOT / "examples" / "sums"


@dataclasses.dataclass(frozen=True)
class Config:
    # --- what
    model: str = ""  # folder: config.json, *.safetensors, tokenizer.model
    random_weights: bool = False  # begin with random weights instead of the folder's
    data: list = ()  # training conversations, one or more JSONL files
    eval_data: list = ()  # held-out conversations, one or more JSONL files
    classes: str = ""  # JSON {class: {"condition", "reward"}}; without it gpt4 1.0, gpt3.5 0.0
    beta: float = 0.4343  # w = exp((reward - best reward) / beta); 1/ln 10 gives 1.0 and 0.1
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
    max_length: int = 0  # cut conversations at this many tokens (0: 4096, or less if needed)
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
    precision: str = ""  # compute in bf16 or fp32 over float32 weights (default: bf16 on CUDA)
    compile: bool = None  # torch.compile every block (default: on CUDA)
    recompute: int = -1  # blocks whose activations are made again in backward (-1: as needed)
    replicas: int = 1  # hybrid sharding: this many groups of ranks each hold the whole model
    deterministic: bool = False  # the same bits in every run; always so on CPU, slower on CUDA
    skip_bad: bool = False  # drop bad lines and count them, instead of stopping
    dry_run: bool = False  # check everything, print plan, memory and a batch; train nothing
    plan_ranks: int = 0  # with --dry-run: plan for this many ranks, none of which need be here
    plan_memory: float = 0  # with --dry-run: GiB of one rank's GPU

    def __post_init__(self):
        for name in ("model", "data", "out"):
            if not getattr(self, name) and not (self.dry_run and name == "out"):
                raise ValueError(f"--{name} is required (no flag at all runs the embedded example)")
        for name in ("plan_ranks", "plan_memory"):
            _require(self.dry_run or not getattr(self, name), name, "used with --dry-run")
        whole = {"epochs": 1, "batch_tokens": 2, "accumulate": 1, "keep": 1, "replicas": 1}
        whole |= dict.fromkeys(("max_steps", "eval_every", "save_every", "export_every", "seed"), 0)
        whole |= {"plan_ranks": 0, "plan_memory": 0, "recompute": -1}
        _require(self.seed < 2**32, "seed", "below 2^32")
        positive = ("beta", "adam_eps", "clip")
        ratios = ("min_lr_ratio", "warmup_ratio", "adam_beta1", "adam_beta2", "weight_decay")
        for name, least in whole.items():
            _require(getattr(self, name) >= least, name, f"at least {least}")
        for name in positive:
            _require(getattr(self, name) > 0, name, "above 0")
        for name in ratios:
            _require(0 <= getattr(self, name) <= 1, name, "from 0 to 1")
        for name in ("adam_beta1", "adam_beta2"):
            _require(getattr(self, name) < 1, name, "below 1")
        _require(self.max_length == 0 or 2 <= self.max_length <= self.batch_tokens, "max_length",
                 f"from 2 to --batch-tokens {self.batch_tokens}")  # fmt: skip
        _require(self.precision in ("", "bf16", "fp32"), "precision", "bf16 or fp32")
        _require(self.lr == "auto" or _is_number(self.lr), "lr", "auto or a number above 0")


def _require(holds, name, what):
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} must be {what}")


def _is_number(text):
    with contextlib.suppress(ValueError):
        return 0 < float(text) < math.inf
    return False


def parse_arguments(arguments):
    """A Config from flags; a comment beside its field above is a flag's help."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="C-RLFT: class-conditioned, reward-weighted fine-tuning of a Llama.",
        epilog="@FILE reads flags from a file. Without any flag: examples/sums/flags.txt.",
        fromfile_prefix_chars="@",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # Config has the defaults
    )
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    comments = dict(
        re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE)
    )
    for field in dataclasses.fields(Config):
        options = {"help": comments[field.name].replace("%", "%%")}
        if field.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif field.type is list:
            options |= {"nargs": "+", "action": "extend", "metavar": "FILE"}
        else:
            options |= {"type": field.type, "metavar": field.type.__name__.upper()}
            if field.default not in ("", 0, -1):
                options["help"] += f" (default: {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **options)
    files = [argument for argument in arguments if argument.startswith("@")]
    others = [argument for argument in arguments if not argument.startswith("@")]
    flags = vars(parser.parse_args(files)) | vars(parser.parse_args(others))  # the latter win
    for name in flags.keys() & {"model", "data", "eval_data", "classes", "out"}:
        expand = os.path.expanduser  # of ~ in a file of flags, which no shell sees
        flags[name] = [*map(expand, flags[name])] if name.endswith("data") else expand(flags[name])
    try:
        return Config(**flags)
    except ValueError as error:
        parser.error(str(error))


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    embedded = not arguments
    if embedded:
        arguments = [f"@{EXAMPLE / 'flags.txt'}"]
    config = parse_arguments(arguments)
    ranks = Ranks()
    if embedded:
        os.chdir(ROOT)  # its flags name files relative to this one
        ranks.say(f"no flags: the embedded example, as with\n  train.py @{EXAMPLE / 'flags.txt'}\n")
    try:
        finished = run(config, ranks)
        if embedded and finished and ranks.first:
            subprocess.run([sys.executable, EXAMPLE / "score.py", f"{config.out}/model"])
    except (ValueError, OSError, SaveFailed) as error:
        ranks.stop(f"error: {error}")
    except KeyboardInterrupt:
        ranks.stop("interrupted")
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        ranks.stop(f"error: lost another rank; the same command goes on from here ({error})")
    ranks.finish()


def run(config, ranks):
    """Plan and train; True where the run is done, False where it was stopped before."""
    with held_output(None if config.dry_run else config.out, ranks) as out:
        plan = Plan(config, ranks, out)
        ranks.say("\n".join(plan.describe()))
        if config.dry_run:
            ranks.say("\n".join(plan.preview()))
            return False
        return train(plan, ranks, out)


# -------------------------------------------------------------------------------------------- loop


def train(plan, ranks, out):
    """True where the run is done, False where it was stopped before. Steps count from 1."""
    config, order = plan.config, plan.order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may vary
    torch.use_deterministic_algorithms(config.deterministic or not ranks.cuda)
    torch.utils.deterministic.fill_uninitialized_memory = False
    checkpoints = Checkpoints(plan, ranks, out)
    start = checkpoints.resume()  # so many steps are done
    log = Log(plan, ranks, out, start)
    due = ranks.first_does("due", lambda: not_yet_there(plan, log, out, start))
    if start == order.total and not any(due):
        ranks.say(f"this run is finished: {start} steps are done; the model is {out / 'model'}")
        return True
    ranks.listen()
    llama, optimizer = build(plan, ranks, start == 0)
    if start:
        checkpoints.load(llama, optimizer)
    step, stopped = start, not evaluate_and_export(plan, ranks, llama, log, out, start, due)

    with ranks.thread() as loader:  # makes the next step's batches during this one
        batches_of = functools.partial(loader.submit, load_step, plan, ranks)
        pending = batches_of(step + 1) if step < order.total else None
        while step < order.total and not stopped:
            began = time.perf_counter()
            step += 1
            bins, batches, total_weight = pending.result()
            if step < order.total:
                pending = batches_of(step + 1)
            value, table, losses = gradients(plan, ranks, llama, batches, total_weight)
            # The norm first, the clipping once it is known to be finite: clip_grad_norm_ would
            # turn every gradient into NaN, and hide which parameter was the first.
            total_norm = gradient_norm(llama)
            grad_norm = total_norm.item()
            if not math.isfinite(value) or not math.isfinite(grad_norm):
                where = f"step {step}: loss {value}, gradient norm {grad_norm}"
                raise ValueError(where + not_finite(plan, ranks, llama, bins, losses))
            torch.nn.utils.clip_grads_with_norm_(llama.parameters(), config.clip, total_norm)
            lr = learning_rate(step, order.total, plan.lr, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            stopped = ranks.asked_to_stop()  # here a GPU is waited for: the step's time is all in
            log.step(step, bins, value, lr, grad_norm, table, time.perf_counter() - began)

            # The checkpoint before the evaluation and the export: what fails there loses nothing.
            if plan.saves(step) and not stopped:
                with save_may_fail(ranks, unless=step == order.total):
                    checkpoints.save(llama, optimizer, step)
            due = plan.due(step)
            stopped = stopped or not evaluate_and_export(plan, ranks, llama, log, out, step, due)
    if stopped:
        checkpoints.save(llama, optimizer, step)
        ranks.say(f"stopped after step {step}, as asked; the same command goes on from here")
        return False
    where = f"{out / 'model'} ({os.readlink(out / 'model')})"
    ranks.say(f"done: the model is {where}, the metrics {out / 'metrics.jsonl'}")
    shell = shlex.quote(str(out)), shlex.quote(str(out / "model"))
    ranks.say("  curves:  python plot.py {}\n  chat:    python chat.py {}".format(*shell))
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
        with save_may_fail(ranks, unless=step == plan.order.total):
            export(plan, ranks, llama, out, step, log.expert_losses())
    # After the last step nothing is left to be stopped.
    return step == plan.order.total or not (any(due) and ranks.asked_to_stop())


def not_yet_there(plan, log, out, step):
    """What a run that is taken up after `step` steps still owes to that step, as `Plan.due`."""
    evaluation_due, export_due = plan.due(step)
    evaluated, exported = step in log.evaluations, is_exported(plan, out, step, log.expert_losses())
    return evaluation_due and not evaluated, export_due and not exported


@contextlib.contextmanager
def save_may_fail(ranks, unless):
    """What was saved before stands, and training goes on; `unless` no later save is to come."""
    try:
        yield
    except SaveFailed as error:
        if unless:
            raise
        ranks.say(f"warning: {error}; what was saved before is kept, training goes on")


def load_step(plan, ranks, step):
    """All bins of a step, this rank's batches of them, and Σ w over all of the step's tokens.

    Every rank knows every bin, so the normaliser of the loss needs no communication.
    """
    bins, device = plan.order.bins(step), ranks.device
    total_weight = sum(plan.dataset.total_weight(b, plan.class_weights) for b in bins)
    mine = bins[ranks.rank :: ranks.world]
    batches = [data.collate(plan.dataset, b, plan.class_weights, plan.shape) for b in mine]
    if ranks.cuda:
        batches = [
            data.Batch(*(x.pin_memory().to(device, non_blocking=True) for x in b)) for b in batches
        ]
    return bins, batches, total_weight or 1.0


def objective(batch, classes):
    """C-RLFT on one micro-batch: what Llama.forward calls with hidden (N, D) and the head (V, D).

    Returns the numerator of L, Σ w·CE, to be differentiated, and for the log a (4, classes)
    float64 table: tokens, Σ CE, correct tokens, Σ w.
    """

    def weighted_loss(hidden, lm_head):
        total, correct, losses = loss.linear_weighted_cross_entropy(
            hidden, lm_head, batch.targets, batch.weights, per_token=True
        )
        per_token = torch.stack(
            [torch.ones_like(losses), losses / batch.weights, correct.float(), batch.weights]
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
    """Forward and backward over this rank's micro-batches of one step.

    L = Σ w·CE / Σ w over the tokens of all ranks and micro-batches: Eq. (6), normalised. Returns
    L, `objective`'s table over all ranks, and this rank's Σ w·CE of each micro-batch.
    """
    losses, table = [], 0
    for batch in batches:
        total, sums = forward(llama, plan, batch)
        # This micro-batch's part of L; x ranks, as FSDP takes the mean of their gradients.
        (total * (ranks.world / total_weight)).backward()
        losses.append(total.detach().double())
        table = table + sums
    losses = torch.stack(losses)
    summed = ranks.sum(torch.cat([losses.sum()[None], table.flatten()])).tolist()
    return summed[0] / total_weight, np.array(summed[1:]).reshape(4, -1), losses


def gradient_norm(llama):
    """Of all ranks' gradients. (No list of them outlives this: zero_grad is to free them.)"""
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in llama.parameters()])
    return norm.full_tensor()


def not_finite(plan, ranks, llama, bins, losses):
    """What to say of a step with NaN or inf; every rank comes here, before the optimizer."""
    names = [name for name, _ in llama.named_parameters()]
    grads = [model.local_tensor(parameter.grad) for parameter in llama.parameters()]
    bad = [index for index, grad in enumerate(grads) if not grad.isfinite().all()]
    first = torch.tensor(min(bad, default=len(names)), device=ranks.device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    gathered = torch.zeros(ranks.world, len(losses), dtype=torch.float64, device=ranks.device)
    gathered[ranks.rank] = losses
    ranks.sum(gathered)
    suspects = (~gathered.T.flatten().isfinite()).nonzero()[:, 0].tolist() or range(len(bins))
    conversations = [c for b in suspects for c in bins[b]]
    where = "\n  ".join(plan.dataset.where(c) for c in conversations[:20])
    more = f"\n  ... and {len(conversations) - 20} more" if len(conversations) > 20 else ""
    parameter = names[first] if first < len(names) else "none"
    return (
        f"; the first parameter with a non-finite gradient is {parameter}. The weights were not "
        "changed, the last checkpoint is untouched. Try a lower --lr, or look at the conversations "
        f"of this batch:\n  {where}{more}"
    )


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


# -------------------------------------------------------------------------------------------- plan


class Plan:
    """Everything decided before a weight is read; whatever is wrong with the input raises here."""

    def __init__(self, config, ranks, out):
        self.config = config
        self.world = config.plan_ranks or ranks.world
        cuda = ranks.cuda or config.plan_memory > 0  # a GPU is planned for, here or not
        self.bf16 = (config.precision or ("bf16" if cuda else "fp32")) == "bf16"
        # Only varlen_attn has fixed shapes; elsewhere each batch would be compiled anew.
        fixed_shapes = cuda and self.bf16
        self.compile = fixed_shapes if config.compile is None else config.compile
        _require(self.world % config.replicas == 0, "replicas", f"a divisor of {self.world} ranks")
        self.classes = loss.read_classes(config.classes) if config.classes else loss.DEFAULT_CLASSES
        weights = loss.class_weights(self.classes, config.beta)
        self.class_weights = np.array(list(weights.values())) if config.reward else None
        self.tokenizer = data.Tokenizer(config.model)
        self.network, self.new_rows = self._network()
        self.base = ranks.first_does("base", self._base)
        positions = self.network.max_position_embeddings
        self.max_length = config.max_length or min(4096, config.batch_tokens, positions)
        _require(self.max_length <= positions, "max_length", f"within the model's {positions}")
        self.dataset = self._dataset("data", ranks, out)
        self.eval_dataset = self._dataset("eval_data", ranks, out) if config.eval_data else None
        self.eval_name = self.eval_dataset.folder.name if config.eval_data else None
        self.order = Order(self.dataset.lengths, config, self.world * config.accumulate)
        self.shape = self._fixed_shape() if self.compile else None
        self.lr = float(config.lr) if config.lr != "auto" else self._auto_lr()
        self.recompute = min(config.recompute, self.network.num_hidden_layers)
        if self.recompute < 0:
            self.recompute = self._blocks_to_recompute()

    def _network(self):
        """The network to train, and how many rows its vocabulary gains over the checkpoint's."""
        config = model.LlamaConfig.from_folder(self.config.model)
        self.tokenizer.check_vocabulary(config.vocab_size)
        rows = max(config.vocab_size, self.tokenizer.vocab_size)
        tokens = {"bos_token_id": self.tokenizer.bos, "eos_token_id": self.tokenizer.eot}
        network = dataclasses.replace(config, vocab_size=rows, **tokens)
        self.pretrained = not self.config.random_weights and model.has_weights(self.config.model)
        if not (self.pretrained or self.config.random_weights or self.config.dry_run):
            raise ValueError(
                f"{self.config.model}: no *.safetensors there to begin with; --random-weights "
                "begins with random ones"
            )
        if self.pretrained:
            model.check_weights(self.config.model, network, rows - config.vocab_size)
        return network, rows - config.vocab_size

    def _base(self):
        """What tells the weights that the run begins with from others."""
        if self.pretrained:
            return model.fingerprint(self.config.model)
        return f"random, seed {self.config.seed}"

    def _dataset(self, field, ranks, out):
        config, paths = self.config, getattr(self.config, field)
        prepare = functools.partial(
            data.prepare, paths, self.tokenizer, self.classes, out / "tokens",
            max_length=self.max_length, condition=config.condition, skip_bad=config.skip_bad,
            report=data.Progress(f"tokenizing --{field.replace('_', '-')}"),
        )  # fmt: skip
        name = ranks.first_does(field, lambda: prepare().folder.name)
        return data.Dataset(out / "tokens" / name, paths)

    def _fixed_shape(self):
        """(tokens, offsets, longest) for collate, with room for twice the fullest bin."""
        tokens, longest = self.config.batch_tokens, self.max_length
        steps = self.order.pack(0)
        if self.eval_dataset:
            steps = steps + data.pack(self.eval_dataset.lengths, tokens, self.world, 0, 0)
        most = max(len(b) for step in steps for b in step) + tokens // longest
        return tokens, 2 ** math.ceil(math.log2(2 * most + 2)), longest

    def _auto_lr(self):
        """OpenChat's rule: 3e-4 (Mistral a sixth) · sqrt(supervised tokens a step / 4e6)."""
        base = 3e-4 / 6 if self.network.model_type == "mistral" else 3e-4
        share = self.dataset.total_weight(slice(None), None) / int(self.dataset.lengths.sum())
        tokens = self.config.batch_tokens * self.world * self.config.accumulate * share
        return base * math.sqrt(tokens / 4e6)

    def memory(self, recompute):
        """Bytes a rank at the peak, by part. Estimates; activations for a block as it is saved."""
        network, config = self.network, self.config
        parameters = network.parameter_count()
        shards = self.world // config.replicas
        size = 2 if self.bf16 else 4
        d, f, t = network.hidden_size, network.intermediate_size, config.batch_tokens
        q = network.num_attention_heads * network.head_dim
        kv = network.num_key_value_heads * network.head_dim
        # Saved for backward, a token: norms' and projections' inputs, q, k, v, attention, MLP;
        # not compiled, also what the norms and the MLP's SiLU make on the way.
        block = size * (4 * d + 2 * q + 2 * kv + 3 * f + (0 if self.compile else 2 * d + f))
        matrices = 1 if network.tie_word_embeddings else 2  # embedding and head
        embedding = network.vocab_size * d
        per_block = (parameters - matrices * embedding) // network.num_hidden_layers
        # Backward reaches the recomputed blocks last: the others' room is free again by then.
        stored = max(network.num_hidden_layers - recompute, 1) * block + recompute * size * d
        return {
            "parameters": 4 * parameters // shards,
            "gradients": 4 * parameters // shards,
            "AdamW": 8 * parameters // shards,
            "gathered blocks": size * (matrices * embedding + 2 * per_block) + 4 * per_block,
            "activations": t * (stored + size * (6 * d + 3 * f)),  # 3 f: one MLP's gradients
            "loss workspace": min(1 << 30, size * t * network.vocab_size) + 4 * embedding,
        }

    def memory_of_rank(self):
        if self.config.plan_memory:
            return int(self.config.plan_memory * 2**30)
        if torch.cuda.is_available():
            return torch.cuda.get_device_properties(0).total_memory
        return 0  # a CPU: not limited here

    def _blocks_to_recompute(self):
        """The fewest blocks with which the estimate stays within 90 % of the memory."""
        available = 0.9 * self.memory_of_rank()
        layers = self.network.num_hidden_layers
        if not available:
            return 0
        fits = (n for n in range(layers + 1) if sum(self.memory(n).values()) <= available)
        return next(fits, layers)

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

    def describe(self):
        """The header: model, data, schedule, memory."""
        config, network, order = self.config, self.network, self.order
        start = "pretrained weights" if self.pretrained else "random weights"
        if not (self.pretrained or config.random_weights):  # a dry run, which needs none
            start = "no safetensors there yet, which training needs, or --random-weights"
        mode = {(True, True): "C-RLFT", (False, True): "C-RLFT without condition",
                (True, False): "C-RLFT without reward", (False, False): "plain SFT"}  # fmt: skip
        memory = self.memory(self.recompute)
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items())
        total, available = sum(memory.values()), self.memory_of_rank()
        fits = ""
        if available:
            fits = f", {'fits' if total <= available else 'DOES NOT FIT'} {available / 2**30:.1f}"
        compute = "bf16 over float32 weights" if self.bf16 else "fp32"
        out = [
            f"{mode[config.condition, config.reward]}: {config.model}, {start}",
            f"model      {network.model_type}, {network.parameter_count():,} parameters, "
            f"{network.num_hidden_layers} blocks of {network.hidden_size}, {compute}",
        ]
        if self.tokenizer.eot_is_new:
            out.append(f"           {data.END_OF_TURN} added as token {self.tokenizer.eot}")
        if self.tokenizer.collapses_spaces:
            out.append(data.SPACES_COLLAPSE)
        if self.eval_dataset and self.eval_dataset.folder == self.dataset.folder:
            out.append("warning: --eval-data is --data; what is held out should be other data")
        out += ["", *data.summary(self.dataset, self.classes, self.class_weights), ""]
        found, names = np.unique(self.dataset.index["source_class"]), list(self.classes)
        if len(names) > 1 and len(found) == 1:
            out.append(
                "one class only: a weight acts relative to other classes, so here it does nothing"
            )
        if (expert := loss.expert_class(self.classes)) not in [names[i] for i in found]:
            out.append(
                f"warning: no conversation of the expert class {expert}, under whose condition "
                "chat.py will ask"
            )
        return out + [
            f"schedule   {order.total:,} steps, {len(order.ends)} epochs begun, "
            f"{self.world} ranks x {config.accumulate} x {config.batch_tokens:,} tokens a step, "
            f"conversations up to {self.max_length:,} tokens",
            f"optimizer  AdamW, peak learning rate {self.lr:.3g}"
            + (" (OpenChat's rule)" if config.lr == "auto" else ""),
            f"memory     about {total / 2**30:.2f} GiB a rank{fits}: {parts}; "
            f"{self.recompute} of {network.num_hidden_layers} blocks recomputed",
            "",
        ]

    def preview(self):
        """The conversations of the first step's first bin, as the model reads them."""
        conversations = self.order.bins(1)[0]
        out = [f"step 1, rank 0: {len(conversations)} conversations, the first of them:"]
        for conversation in conversations[:4]:
            out += data.preview(self.dataset, conversation, self.tokenizer, self.classes,
                                self.class_weights, sys.stdout.isatty())  # fmt: skip
        return out


class Order:
    """Which conversations make up a step: a function of (lengths, seed, epoch) alone."""

    def __init__(self, lengths, config, bins_per_step):
        self.pack = functools.lru_cache(maxsize=1)(  # pack(epoch): all its steps
            functools.partial(data.pack, lengths, config.batch_tokens, bins_per_step, config.seed)
        )
        self.ends = []  # the last step of each epoch
        for epoch in range(config.epochs):
            begun = self.ends[-1] if self.ends else 0
            if not config.max_steps or begun < config.max_steps:
                self.ends.append(begun + len(self.pack(epoch)))
        self.total = min(config.max_steps or math.inf, self.ends[-1])

    def epoch_of(self, step):
        """The epoch of a step; both count from 1."""
        return bisect_left(self.ends, step) + 1

    def ends_epoch(self, step, every):
        """Is `step` the last of every `every`-th epoch?"""
        return bool(every) and step in self.ends and self.epoch_of(step) % every == 0

    def bins(self, step):
        epoch = self.epoch_of(step) - 1
        begun = self.ends[epoch - 1] if epoch else 0
        return self.pack(epoch)[step - begun - 1]


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
        for block in llama.model.layers:
            block.compile(fullgraph=ranks.cuda and plan.bf16, dynamic=False)
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if plan.bf16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary table stays float32
    )
    shape, names = (config.replicas, ranks.world // config.replicas), ("replicate", "shard")
    mesh = dist.init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
    mesh = mesh if config.replicas > 1 else mesh["shard"]
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(llama, mesh=mesh, mp_policy=policy)
    llama.to_empty(device=ranks.device)
    if with_weights and plan.pretrained:  # not where a checkpoint is to be loaded
        new_token = plan.tokenizer.eot if plan.tokenizer.eot_is_new else None
        model.fill_parameters(llama, config.model, plan.new_rows, new_token)
    elif with_weights:
        model.random_parameters(llama, config.seed)
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=plan.lr, betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps, weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    return llama, optimizer


def learning_rate(step, total, peak, config):
    """Linear warm-up, then a cosine to min_lr_ratio; steps count from 1, as OpenChat's."""
    warmup = math.ceil(config.warmup_ratio * total)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


# --------------------------------------------------------------------------------------------- log


class Log:
    """metrics.jsonl, a line a step, and the lines on the terminal."""

    def __init__(self, plan, ranks, out, start):
        self.plan, self.ranks, self.start = plan, ranks, start
        self.began = time.perf_counter()
        self.evaluations = {}  # {step: by_class}, on rank 0, of this evaluation data
        name = torch.cuda.get_device_name() if ranks.cuda else ""
        self.peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
        if ranks.first:
            path = out / "metrics.jsonl"
            keep = [line for line in read_lines(path) if start and line["step"] <= start]
            for line in keep:
                if "eval" in line and line.get("eval_data") == plan.eval_name:
                    self.evaluations[line["step"]] = line["eval"]
            temporary = out / ".metrics.tmp"
            temporary.write_text("".join(json.dumps(line) + "\n" for line in keep))
            temporary.replace(path)
            self.file, self.unwritten = open(path, "ab", buffering=0), b""

    def step(self, step, bins, value, lr, norm, table, seconds):
        if not self.ranks.first:
            return
        plan, lengths = self.plan, self.plan.dataset.lengths
        conversations = np.concatenate(bins).astype(np.int64)
        tokens = int(lengths[conversations].sum())
        squares = float((lengths[conversations].astype(np.float64) ** 2).sum())
        flops = training_flops(plan.network, tokens, squares) / seconds / self.ranks.world
        line = {
            "step": step,
            "epoch": plan.order.epoch_of(step),
            "loss": value,
            "lr": lr,
            "grad_norm": norm,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": sum(table[0]) / seconds,
            "mfu": flops / self.peak if self.peak and plan.bf16 else None,
            "memory_bytes": peak_memory(self.ranks),
            "classes": by_class(plan, table),
        }
        self.write(line)
        left = plan.order.total - step
        left *= (time.perf_counter() - self.began) / (step - self.start)
        classes = "  ".join(
            f"{name} {c['loss']:.3f} {c['accuracy']:4.0%}"
            for name, c in line["classes"].items()
            if c["tokens"]
        )
        speed = f"{line['tokens_per_second']:,.0f} tok/s"
        if line["mfu"]:
            speed += f" {line['mfu']:.0%} mfu"
        self.ranks.line.refresh(
            f"step {step}/{plan.order.total}  loss {value:.4f}  {classes}  lr {lr:.2e}  "
            f"norm {norm:.2f}  {speed}  {data.clock(left)} left",
            final=step == plan.order.total,
        )

    def write(self, line):
        """Append a line; on a full disk it waits for the next, and training goes on."""
        self.unwritten += json.dumps(line).encode() + b"\n"
        try:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            self.ranks.say(f"warning: {self.file.name}: {error.strerror}; kept for later")

    def evaluation(self, step, table):
        if not self.ranks.first:
            return
        classes = self.evaluations[step] = by_class(self.plan, table)
        self.write({"step": step, "eval": classes, "eval_data": self.plan.eval_name})
        shown = "  ".join(
            f"{name} loss {c['loss']:.4f}, {c['accuracy']:.1%} of tokens right"
            for name, c in classes.items()
            if c["tokens"]
        )
        self.ranks.say(f"evaluation at step {step}: {shown}")

    def expert_losses(self):
        """{step: the best-rewarded class's held-out loss} of the evaluations on this data."""
        expert = loss.expert_class(self.plan.classes)
        return {step: classes[expert]["loss"] for step, classes in self.evaluations.items()}


def by_class(plan, table):
    """Per class: unweighted loss and accuracy over its supervised tokens, share of the weight."""
    all_weight = sum(table[3]) or 1.0
    return {
        name: {
            "tokens": int(tokens),
            "loss": total / tokens if tokens else None,
            "accuracy": correct / tokens if tokens else None,
            "weight_share": weight / all_weight,
        }
        for name, tokens, total, correct, weight in zip(plan.classes, *table, strict=True)
    }


PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, SXM


def training_flops(network, tokens, sum_of_squares):
    """6 · parameters (embeddings not counted) · tokens, plus causal attention by Σ length²."""
    matrices = network.parameter_count() - network.vocab_size * network.hidden_size * (
        not network.tie_word_embeddings
    )
    width = network.num_attention_heads * network.head_dim
    return 6 * matrices * tokens + 6 * network.num_hidden_layers * width * sum_of_squares


def peak_memory(ranks):
    if ranks.cuda:
        return torch.cuda.max_memory_allocated()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_lines(path):
    """The whole lines of a metrics.jsonl; a last one cut by a kill is left out."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines


if __name__ == "__main__":
    main()

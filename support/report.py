"""The text that a run prints: its plan, its data, its progress; and metrics.jsonl."""

import collections
import datetime
import itertools
import json
import math
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch

from loss import expert_class
from support import memory
from support.dataset import problem_lines
from support.files import read_metrics, sync
from support.terminal import Terminal

# ------------------------------------------------------------------------------------- the terminal


class StatusLine:
    """One refreshed line on a terminal; in a file, a new line every `seconds`."""

    def __init__(self, stream, seconds):
        self.stream = stream or open(os.devnull, "w")  # None: closed by who started this
        self.on_terminal = isinstance(stream, Terminal)
        self.seconds, self.shown = seconds, 0.0

    def refresh(self, text, final=False):
        now = time.monotonic()
        if now - self.shown < (0.1 if self.on_terminal else self.seconds) and not final:
            return
        self.shown = now
        if not self.on_terminal:
            return self.say(text)
        room = shutil.get_terminal_size().columns - 4  # the terminal shows a Ctrl-C as "^C"
        text = text if len(text) <= room else text[: room - 3] + "..."
        self._print(self.stream.refresh, text, final)

    def say(self, text):
        self._print(self.stream.write, text + "\n")

    def _print(self, write, *arguments):
        try:
            write(*arguments)
            self.stream.flush()
        except OSError:  # the terminal is closed, or `tee` has ended: the run continues
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


class Progress:
    """'tokenizing [###         ]  21%  0:00:42 left  12,000 conversations  3.1 MB/s'."""

    def __init__(self, label):
        self.label, self.started = label, time.time()
        self.line = StatusLine(sys.stderr, seconds=30)

    def __call__(self, done, total, count):
        seconds, share = time.time() - self.started, max(done, 1) / max(total, 1)
        if seconds >= 1:
            bar, left = "#" * int(12 * share), clock(seconds / share - seconds)
            text = f"{self.label} [{bar:12}] {share:4.0%}  {left} left  {count:,} conversations  "
            self.line.refresh(f"{text}{done / seconds / 1e6:.1f} MB/s", final=done == total)


def clock(seconds):
    return str(datetime.timedelta(seconds=int(seconds)))  # "0:01:30"


# ---------------------------------------------------------------------------------------- the plan


def header(plan):
    """Text about the model and the data."""
    config, network, tokenizer = plan.config, plan.network, plan.tokenizer
    start = "pretrained weights" if plan.base else "random weights"
    if not (plan.base or config.random_weights):  # a dry run, which needs none
        start = "no safetensors there: training needs them, or --random-weights"
    mode = {(True, True): "C-RLFT", (False, True): "C-RLFT without condition",
            (True, False): "C-RLFT without reward", (False, False): "plain SFT",
            }[config.condition, config.reward]  # fmt: skip
    compute = "bf16 over float32 weights" if plan.bf16 else "fp32"
    out = [
        f"{'evaluation' if config.evaluate else mode}: {config.model}, {start}",
        f"model      {network.model_type}, {network.parameter_count():,} parameters, "
        f"{network.num_hidden_layers} blocks of {network.hidden_size}, {compute}",
    ]
    if tokenizer.eot_is_new:
        out.append(f"           {tokenizer.special[tokenizer.eot]} added as token {tokenizer.eot}")
    if plan.untrained:
        names = ", ".join(tokenizer.special[token] for token in plan.untrained)
        out.append(f"           untrained tokens, set to the mean of the others: {names}")
    if tokenizer.warning:
        out.append(tokenizer.warning)
    if plan.eval_name == plan.dataset.folder.name and not config.evaluate:
        out.append("warning: --eval-data is --data; it should be different, held-out data")
    return "\n".join([*out, "", *summary(plan.dataset, plan.classes, plan.class_weights), ""])


def schedule(plan):
    """Text about the weights in a step, the number of steps, and the optimizer."""
    config, order, out, expert = plan.config, plan.order, [], expert_class(plan.classes)
    if list(plan.classes).index(expert) not in plan.dataset.index["source_class"]:
        out.append(f"warning: no conversation of the expert class {expert}, chat.py's default")
    first_epoch = order.pack(0)[: order.total]
    out += weight_by_step(plan.dataset, first_epoch, plan.classes, plan.class_weights)
    if order.total <= 100 and order.total != config.max_steps:  # so few train hardly anything
        times = math.ceil(101 / order.total)
        more = f"--epochs {times * config.epochs} makes about {times * order.total}"
        out.append(f"warning: few steps ({order.total}); {more}; or lower --batch-tokens")
    if config.random_weights and config.lr == "auto":
        out.append("warning: OpenChat's learning rate is for pretrained weights; try --lr 3e-3")
    rate = f"{plan.lr:.3g}" + (" (OpenChat's rule)" if config.lr == "auto" else "")
    step = f"ranks {plan.world} x accumulate {config.accumulate} x tokens {config.batch_tokens:,}"
    return "\n".join([
        *out,
        f"schedule   steps {order.total:,}, epochs {len(order.ends)}; per step {step}",
        f"           conversations up to {plan.max_length:,} tokens",
        f"optimizer  AdamW ({config.adam_precision} moments), peak learning rate {rate}",
    ])  # fmt: skip


def resources(plan):
    """Text about the memory and disk that a run needs, and its time if a GPU is planned for."""
    config, order, parameters = plan.config, plan.order, plan.network.parameter_count()
    gathered = "" if plan.size.resharded else ", each gathered once"
    needed = binary(sum(plan.memory.values()))
    unit = 2**30 if "GiB" in needed else 2**20
    parts = [f"{name} {size / unit:.2f}" for name, size in plan.memory.items()]
    fits = f", {'fits' if plan.fits else 'DOES NOT FIT'} {binary(plan.available)}"
    exports, saved = len(plan.exports), 4 + 2 * plan.size.moment
    out = Path(config.out).absolute()
    disk = next(path for path in (out, *out.parents) if path.exists())
    lines = [
        f"memory     about {needed} per rank{fits if plan.available else ''}; "
        f"{plan.recompute} of {plan.network.num_hidden_layers} blocks recomputed{gathered}",
        f"           {', '.join(parts[:4])},",
        f"           {', '.join(parts[4:])}",
        f"disk       checkpoints {config.keep + 1} x {saved * parameters / 1e9:.3g} GB, "
        f"exports {exports} x {(2 if plan.bf16 else 4) * parameters / 1e9:.3g} GB",
        f"           {shutil.disk_usage(disk).free / 1e9:,.0f} GB free in {disk}",
    ]
    if plan.spared:
        left = plan.recompute - plan.spared
        fewer = f"with {plan.spared} blocks fewer recomputed" if left else "without recomputing"
        lines.insert(3, f"           fits {fewer} with --adam-precision bf16")
    if plan.available:
        lengths = plan.dataset.lengths.astype(float)
        epochs = len(order.ends) * order.total / order.ends[-1]  # --max-steps may end the last
        flops = epochs * training_flops(plan.network, lengths.sum(), (lengths**2).sum())
        hours = flops / (plan.world * 0.4 * PEAK_FLOPS["H100"]) / 3600
        peak = f"{plan.world} x H100 at 40 % of their peak (no GPU has confirmed these estimates)"
        lines.append(f"time       about {hours:,.2f} h on {peak}")
    return "\n".join([*lines, ""])


def binary(size):
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def what_would_fit(plan):
    """The error of a plan that does not fit: the fewest ranks, with the most tokens, that would."""
    config, size, blocks = plan.config, plan.size, plan.network.num_hidden_layers
    for doublings, halvings in itertools.product(range(11), range(5)):
        other = size._replace(tokens=size.tokens >> halvings, shards=size.shards << doublings)
        way = f"with {other.shards * config.replicas} ranks and --batch-tokens {other.tokens}"
        if sum(memory.estimate(plan.network, other, recompute=blocks).values()) <= plan.available:
            way = f"it would {way} --accumulate {config.accumulate << halvings}"
            if other.tokens < (config.max_length or plan.dataset.lengths.max()):
                way += f" --max-length {other.tokens}"
            way += ", without --recompute" * (config.recompute is not None)
            break
    else:
        way = f"not even {way}"
    needed = binary(sum(plan.memory.values()))
    return f"{needed} per rank do not fit {binary(plan.available)}; {way}"


def summary(dataset, classes, class_weights):
    """Lines of text: per class its conversations, supervised tokens, and share of the weight."""
    index, report = dataset.index, dataset.report
    total, weightless = dataset.total_weight(slice(None), class_weights) or 1.0, []
    out = ["class       condition   conversations      tokens  supervised  mean w  share"]
    for number, (name, source) in enumerate(classes.items()):
        of = np.flatnonzero(index["source_class"] == number)
        weight, supervised = dataset.total_weight(of, class_weights), dataset.total_weight(of, None)
        mean = weight / supervised if supervised else 0.0
        weightless += [name] if len(of) and not weight else []
        out.append(
            f"{name:11} {source.condition:11} {len(of):13,} {int(index['length'][of].sum()):11,} "
            f"{supervised:11,.0f} {mean:7.3g} {weight / total:6.1%}"
        )
    out.append("mean w: of a supervised token; share: of the weight of all of them")
    own = index["own_weight"][index["own_weight"] >= 0]
    if len(own) and class_weights is not None:
        span = f"of w {own.min():.3g} to {own.max():.3g}"
        out.append(f"with a reward of their own: {len(own):,} conversations, {span}")
    lengths, mean = dataset.lengths, dataset.lengths.mean()
    quantiles = ", ".join(f"{q}% {np.percentile(lengths, q):.0f}" for q in (50, 90, 99))
    out.append(f"tokens per conversation: mean {mean:.1f}, {quantiles}, longest {lengths.max()}")
    out += [text.format(**report) for key, text in COUNTED.items() if report[key]]
    out += ["  " + text for text in problem_lines(report)]
    if keys := collections.Counter(report["not_read"]):
        shown = [f"{repr(key)[1:-1]} ({count:,})" for key, count in keys.most_common(12)]
        shown += [f"and {len(keys) - 12} other keys"] * (len(keys) > 12)
        out.append(f"not read: {', '.join(shown)}")
    out += [f"class {n} has weight 0 and is not trained on: raise --beta" for n in weightless]
    paths = collections.Counter(source.path.resolve() for source in dataset.sources)
    out += [f"given {n} times: {path}" for path, n in paths.items() if n > 1]
    return out


COUNTED = {  # of dataset.report, each printed unless it is 0
    "answer_cut": "dropped: {answer_cut:,} without an answer within the maximum length",
    "weightless": "dropped: {weightless:,} without an answer with a weight above 0",
    "cut": "cut at the maximum length: {cut:,} conversations, {tokens_cut:,} tokens lost",
    "unknown": "warning: {unknown:,} tokens of <unk>, for characters that the tokenizer lacks",
    "unknown_in": "warning: such characters are in the conditions {unknown_in}, so in every turn",
    "too_small": "weights too small for float32, taken as 0: {too_small:,}",
    "lost_bytes": "warning: {lost_bytes:,} bytes of characters that the tokenizer lacks: not read",
    "bad": "dropped as bad (--skip-bad): {bad:,} lines",
}


def weight_by_step(dataset, steps, classes, class_weights):
    """Lines of text: each class's share of the weight per step, in the first epoch.

    L = Σ w·CE / Σ w is over the tokens of one step: if none is of the best class, 0.1 acts as 1.
    """
    if class_weights is None or len(set(class_weights)) == 1:  # all tokens count alike
        return []
    number, names = dataset.index["source_class"], np.array([*classes])
    weight = np.array([
        np.bincount(number[c], dataset.weight_by_conversation(c, class_weights), len(classes))
        for c in map(np.concatenate, steps)
    ])  # fmt: skip  # (S, C)
    found = weight.any(0)
    if found.sum() < 2:
        index = dataset.index
        if (index["own_weight"] >= 0).any() or (index["factors"] != index["supervised"]).any():
            return []
        return ["only one class has weight in these steps, so weights, being relative, do nothing"]
    supervised = weight[weight.any(1)]
    shares = (supervised / supervised.sum(1, keepdims=True)).mean(0)
    shares = ", ".join(f"{n} {s:.1%}" for n, s in zip(names[found], shares[found], strict=True))
    out = [f"share of a step's weight, mean of epoch 1: {shares}"]
    best = found & (class_weights == 1)
    without = int((~weight[:, best].any(1)).sum())
    if best.any() and without:
        out.append(
            f"{without:,} of its {len(steps):,} steps ({without / len(steps):.1%}) hold no "
            f"{' or '.join(names[best])} token: the others count in\n"
            "full there, whatever their w; raise --accumulate or --batch-tokens"
        )
    return out


def visible(tokens, tokenizer):
    """Text of ids with the special tokens written out, one turn per line."""
    names, text = tokenizer.special, ""
    for special, run in itertools.groupby(tokens, lambda token: token in names):
        if special:
            text += "".join(names[token] + "\n" * (token == tokenizer.eot) for token in run)
        else:
            spelt = tokenizer.spell([*run])  # may look like a special token, or control a terminal
            for name in names.values():
                spelt = spelt.replace(name, name[0] + "\\" + name[1:])  # <\s>
            hidden = {"⟦", "⟧"}.union(c for c in spelt if not c.isprintable()) - {"\n", "\t"}
            text += spelt.translate(dict.fromkeys(map(ord, hidden), "\ufffd"))
    return text


# ----------------------------------------------------------------------------------------- the log


class Log:
    """metrics.jsonl, a line per step, and the lines on the terminal."""

    def __init__(self, plan, ranks, out, start):
        self.plan, self.ranks, self.out, self.start = plan, ranks, out, start
        self.began = time.perf_counter()
        self.path, self.unwritten = out / "metrics.jsonl", b""
        self.expert, self.expert_losses = expert_class(plan.classes), {}  # {step: held-out loss}
        self.peak = peak_flops(torch.cuda.get_device_name()) if ranks.cuda else None
        ranks.first_does(self._go_on)

    def _go_on(self):
        """Keep the lines of the steps done, except an evaluation that will be repeated."""
        keep = []
        for line in read_metrics(self.path) if self.start else ():
            ours = "eval" in line and line.get("eval_data") == self.plan.eval_name
            again = ours and line["step"] == self.start and self.start in self.plan.evaluations
            if line["step"] <= self.start and not again:
                keep.append(line)
                if ours:
                    self.expert_losses[line["step"]] = line["eval"].get(self.expert, {}).get("loss")
        temporary = self.out / ".metrics.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in keep))
        sync(temporary)
        temporary.replace(self.path)

    def step(self, step, bins, loss, lr, grad_norm, table, seconds):
        if not self.ranks.first:
            return
        plan, conversations = self.plan, np.concatenate(bins).astype(np.int64)
        lengths = plan.dataset.lengths[conversations].astype(np.int64)
        tokens, squares = int(lengths.sum()), int((lengths**2).sum())
        flops = training_flops(plan.network, tokens, squares) / seconds / self.ranks.world
        classes = by_class(plan, table)
        line = {
            "step": step,
            "epoch": plan.order.epoch_of(step),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": sum(c["tokens"] for c in classes.values()) / seconds,
            "mfu": flops / self.peak if self.peak and plan.bf16 else None,
            "memory_bytes": peak_memory(self.ranks),
            "classes": classes,
        }
        self.write(line)
        left = plan.order.total - step
        left *= (time.perf_counter() - self.began) / (step - self.start)
        text = f"step {step}/{plan.order.total}  {clock(left)} left  loss {loss:.4f}"
        for name, of in classes.items():
            text += f"  {name} {of['loss']:.3f} {of['accuracy']:4.0%}" if of["tokens"] else ""
        mfu = f" {line['mfu']:.0%} mfu" if line["mfu"] else ""
        text += f"  epoch {line['epoch']}/{len(plan.order.ends)}  lr {lr:.2e}"
        text += f"  {line['tokens_per_second']:,.0f} tok/s{mfu}  norm {grad_norm:.2f}"
        self.ranks.line.refresh(text, final=step == plan.order.total)

    def write(self, line):
        """Append a line; one that cannot be written is kept for later, and training continues."""
        line = json.loads(json.dumps(line), parse_constant=lambda _: None)  # NaN is not JSON
        waiting = bool(self.unwritten)
        self.unwritten += json.dumps(line).encode() + b"\n"
        try:
            self.ranks.check_lock(self.out)
            with open(self.path, "ab", buffering=0) as file:  # a new one if it was moved
                self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except (OSError, ValueError) as error:
            if not waiting:  # warn once, not at each step
                self.ranks.say(f"warning: {self.path}: {error}; kept for later")

    def evaluation(self, step, table):
        if not self.ranks.first:
            return
        classes = by_class(self.plan, table)
        self.expert_losses[step] = classes[self.expert]["loss"]
        self.write({"step": step, "eval": classes, "eval_data": self.plan.eval_name})
        self.ranks.say(f"evaluation at step {step}\n{evaluation(classes)}")


def by_class(plan, table):
    """Per class: unweighted loss and accuracy over its supervised tokens, share of the weight.

    table {row of train.TABLE: (C,) sums}.
    """
    found, all_weight = {}, sum(table["weight"]) or 1.0
    for number, name in enumerate(plan.classes):
        tokens, loss, correct, weight = (float(sums[number]) for sums in table.values())
        found[name] = {
            "tokens": int(tokens),
            "loss": loss / tokens if tokens else None,
            "accuracy": correct / tokens if tokens else None,
            "weight_share": weight / all_weight,
        }
    return found


def evaluation(classes):
    """A line of text per class of {name: by_class's numbers} that has tokens."""
    return "\n".join(
        f"    {name:11} loss {of['loss']:.4f}, token accuracy {of['accuracy']:.2%}, "
        f"{of['tokens']:,} tokens"
        for name, of in classes.items() if of["tokens"]
    )  # fmt: skip


PEAK_FLOPS = {  # dense bf16, by a part of torch.cuda.get_device_name(); NVIDIA's data sheets
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "B200": 2250e12, "A100": 312e12,
}  # fmt: skip


def peak_flops(name):
    """The first entry of PEAK_FLOPS whose key is in `name`; None if the device is not listed."""
    return next((PEAK_FLOPS[key] for key in PEAK_FLOPS if key in name), None)


def training_flops(network, tokens, sum_of_squares):
    """6 · parameters (embeddings not counted) · tokens, plus causal attention by Σ length²."""
    embedding = 0 if network.tie_word_embeddings else network.vocab_size * network.hidden_size
    matrices = network.parameter_count() - embedding
    width = network.num_attention_heads * network.head_dim
    return 6 * matrices * tokens + 6 * network.num_hidden_layers * width * sum_of_squares


def peak_memory(ranks):
    if ranks.cuda:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

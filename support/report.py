"""What a run prints: its header, the data as the model reads it, progress; and metrics.jsonl."""

import collections
import contextlib
import json
import os
import shutil
import sys
import time

import numpy as np
import torch

from loss import expert_class
from support import memory
from support.dataset import dropped, problem_lines
from support.files import read_metrics, sync

# ------------------------------------------------------------------------------------- the terminal


class StatusLine:
    """One refreshed line on a terminal; in a file, a new line every `seconds`.

    Everything else is printed by `say`, or after `end`: both first end the refreshed line.
    """

    current = None  # the one with the cursor on its refreshed line, as there is one terminal

    def __init__(self, stream, seconds):
        self.stream, self.seconds, self.shown = stream, seconds, 0.0

    def refresh(self, text, final=False):
        now, terminal = time.monotonic(), self.stream.isatty()
        if now - self.shown < (0.1 if terminal else self.seconds) and not final:
            return
        self.shown = now
        StatusLine.current = self if terminal and not final else None
        if terminal:
            width = shutil.get_terminal_size().columns - 4  # the terminal shows a Ctrl-C as "^C"
            text = f"\r{text[:width]}\033[K"
        self._print(text, end="" if StatusLine.current else "\n")

    def say(self, text):
        self.end()
        self._print(text)

    @staticmethod
    def end():
        line, StatusLine.current = StatusLine.current, None
        if line:
            line._print("")

    def _print(self, text, end="\n"):
        try:
            print(text, end=end, file=self.stream, flush=True)
        except OSError:  # the terminal is closed, or `tee` has ended: the run goes on without it
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def say_in_handler(self, text):
        """From a signal handler, which may have interrupted a print: not through its buffer."""
        text = "\n" * bool(StatusLine.current) + text + "\n"
        StatusLine.current = None
        with contextlib.suppress(OSError):
            os.write(self.stream.fileno(), text.encode())


class Progress:
    """'tokenizing [###         ]  21%  0:42 left  12,000 conversations  3.1 MB/s'."""

    def __init__(self, label):
        self.label, self.started = label, time.time()
        self.line = StatusLine(sys.stderr, seconds=30)

    def __call__(self, done, total, count):
        seconds, share = time.time() - self.started, max(done, 1) / max(total, 1)
        if seconds >= 1:
            self.line.refresh(
                f"{self.label} [{'#' * int(12 * share):12}] {share:4.0%}  "
                f"{clock(seconds / share - seconds)} left  {count:,} conversations  "
                f"{done / seconds / 1e6:.1f} MB/s",
                final=done == total,
            )


def clock(seconds):
    seconds = int(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


# -------------------------------------------------------------------------------------- the header


def header(plan):
    """Text about the model and the data."""
    config, network = plan.config, plan.network
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
    if plan.tokenizer.eot_is_new:
        name = plan.tokenizer.special[plan.tokenizer.eot]
        out.append(f"           {name} added as token {plan.tokenizer.eot}")
    if plan.untrained:
        names = ", ".join(plan.tokenizer.special[token] for token in plan.untrained)
        out.append(f"           untrained tokens, set to the mean of the others: {names}")
    if plan.tokenizer.warning:
        out.append(plan.tokenizer.warning)
    held_out = plan.eval_dataset and not config.evaluate
    if held_out and plan.eval_dataset.folder == plan.dataset.folder:
        out.append("warning: --eval-data is --data; it should be other, held-out data")
    return "\n".join([*out, "", *summary(plan.dataset, plan.classes, plan.class_weights), ""])


FEW_STEPS = 20  # that train hardly anything


def counted(count, noun):
    plural = "es" if noun.endswith("batch") else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def schedule(plan):
    """Text about the weights in a step, the number of steps, and the optimizer."""
    config, order, out = plan.config, plan.order, []
    found, names = np.unique(plan.dataset.index["source_class"]), list(plan.classes)
    if (expert := expert_class(plan.classes)) not in [names[i] for i in found]:
        out.append(f"warning: no conversation of the expert class {expert}, as which chat.py asks")
    first_epoch = order.pack(0)[: order.total]
    out += weight_by_step(plan.dataset, first_epoch, plan.classes, plan.class_weights)
    if order.total < FEW_STEPS:
        steps = counted(order.total, "step")
        out.append(f"warning: only {steps}; a smaller --batch-tokens or more --epochs give more")
    if config.random_weights and config.lr == "auto":
        out.append("warning: OpenChat's learning rate is for pretrained weights; try --lr 3e-3")
    ranks, per_rank = counted(plan.world, "rank"), counted(config.accumulate, "micro-batch")
    rule = " (OpenChat's rule)" if config.lr == "auto" else ""
    return "\n".join([
        *out,
        f"schedule   {counted(order.total, 'step')} in {counted(len(order.ends), 'epoch')}, "
        f"{ranks} x {per_rank} x {config.batch_tokens:,} tokens per step",
        f"           conversations up to {plan.max_length:,} tokens",
        f"optimizer  AdamW, peak learning rate {plan.lr:.3g}{rule}",
    ])  # fmt: skip


def memory_of_a_rank(plan):
    parts = [f"{name} {size / 2**30:.2f}" for name, size in plan.memory.items()]
    fits = ""
    if plan.available:
        fits = f", {'fits' if plan.fits else 'DOES NOT FIT'} {plan.available / 2**30:.1f}"
    recomputed = f"{plan.recompute} of {plan.network.num_hidden_layers} blocks recomputed"
    indent = "\n" + " " * 11
    return (
        f"memory     about {_needed(plan)}{fits}; {recomputed}"
        f"{indent}{', '.join(parts[:5])},{indent}{', '.join(parts[5:])}\n"
    )


def _needed(plan):
    return f"{sum(plan.memory.values()) / 2**30:.2f} GiB per rank"


def what_would_fit(plan):
    """The error of a plan that does not fit: with how many ranks or tokens it would."""
    config, size, ways = plan.config, plan.size, []
    found = [*memory.sizes_that_fit(plan.network, size, plan.available)]
    if found:  # more ranks, or fewer tokens and as few ranks as then are enough
        found = dict.fromkeys([found[0], min(found, key=lambda other: other.shards)])
    for other in found:
        changes = ["no --recompute"] * (config.recompute is not None)
        if other.tokens < size.tokens:
            accumulate = config.accumulate * size.tokens // other.tokens
            changes.append(f"--batch-tokens {other.tokens} --accumulate {accumulate}")
            if other.tokens < (config.max_length or plan.dataset.lengths.max()):
                changes[-1] += f" --max-length {other.tokens}"
        if other.shards > size.shards:
            changes.append(f"{other.shards * config.replicas} ranks")
        ways.append(" and ".join(changes))
    advice = "it would with " + ", or with ".join(ways)
    if not ways:
        most = f"{size.shards * config.replicas << 10} ranks and --batch-tokens {size.tokens >> 4}"
        advice = f"not even with {most}"
    return f"{_needed(plan)} do not fit {plan.available / 2**30:.1f}; {advice}"


def summary(dataset, classes, class_weights):
    """Lines of text: per class its conversations, supervised tokens, and share of the weight."""
    index, report = dataset.index, dataset.report
    total = dataset.total_weight(slice(None), class_weights) or 1.0
    rows = [("class", "condition", "conversations", "tokens", "supervised", "mean w", "w mass")]
    for number, (name, source) in enumerate(classes.items()):
        of = np.flatnonzero(index["source_class"] == number)
        weight, supervised = dataset.total_weight(of, class_weights), dataset.total_weight(of, None)
        mass, mean = weight / total, weight / supervised if supervised else 0.0
        tokens = int(index["length"][of].sum())
        counts = f"{len(of):,}", f"{tokens:,}", f"{supervised:,.0f}"
        rows.append((name, source.condition, *counts, f"{mean:.4g}", f"{mass:.1%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    out = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    lengths = dataset.lengths
    quantiles = ", ".join(f"{q}% {np.percentile(lengths, q):.0f}" for q in (50, 90, 99))
    out.append(
        f"tokens per conversation: mean {lengths.mean():.1f}, {quantiles}, longest {lengths.max()}"
    )
    if report["cut"]:
        out.append(
            f"cut at the maximum length: {report['cut']:,} conversations, "
            f"{report['tokens_cut']:,} tokens lost"
        )
    if report.get("unknown"):
        out.append(
            f"warning: {counted(report['unknown'], 'token')} of <unk>: characters missing in the "
            "tokenizer, all the same to the model"
        )
    if report.get("lost_bytes"):
        out.append(
            f"warning: {counted(report['lost_bytes'], 'byte')} of characters that the tokenizer "
            "lacks, which give no token: the model never sees them"
        )
    out += [f"dropped: {text}" for text in dropped(report)]
    if report["bad"]:
        out.append(f"dropped as bad (--skip-bad): {report['bad']:,} lines")
        out += ["  " + text for text in problem_lines(report)]
    if report["not_read"]:
        keys = sorted(report["not_read"].items(), key=lambda item: -item[1])
        shown = [f"{_printable(key)} ({count:,})" for key, count in keys[:12]]
        shown += [f"and {len(keys) - 12} other keys"] * (len(keys) > 12)
        out.append(f"not read: {', '.join(shown)}")
    paths = collections.Counter(source.path.resolve() for source in dataset.sources)
    out += [f"given {n} times: {path}" for path, n in paths.items() if n > 1]
    return out


def weight_by_step(dataset, steps, classes, class_weights):
    """Lines of text: each class's share of the weight per step, in the first epoch.

    L = Σ w·CE / Σ w is over the tokens of one step: without any of the best class, 0.1 acts as 1.
    """
    if class_weights is None or len(set(class_weights)) == 1:  # all tokens count alike
        return []
    conversations = np.concatenate([b for bins in steps for b in bins])
    step = np.repeat(np.arange(len(steps)), [sum(map(len, bins)) for bins in steps])
    cell = step * len(classes) + dataset.index["source_class"][conversations]
    weight = dataset.weight_by_conversation(conversations, class_weights)
    weight = np.bincount(cell, weight, len(steps) * len(classes)).reshape(len(steps), -1)  # (S, C)
    names, found = list(classes), np.flatnonzero(weight.any(0))
    if len(found) < 2:
        return ["only one class: weights act relative to other classes, so they do nothing here"]
    supervised = weight[weight.any(1)]
    shares = (supervised / supervised.sum(1, keepdims=True)).mean(0)
    shares = ", ".join(f"{names[c]} {shares[c]:.1%}" for c in found)
    out = [f"share of a step's weight, mean of epoch 1: {shares}"]
    best = [c for c in found if class_weights[c] == 1]
    without = int((~weight[:, best].any(1)).sum())
    if best and without:
        out.append(
            f"{without:,} of its {len(steps):,} steps ({without / len(steps):.1%}) hold no "
            f"{' or '.join(names[c] for c in best)} token: the other classes count in full there,\n"
            "whatever their w; raise --accumulate or --batch-tokens"
        )
    return out


LEGEND = r"""supervised: ⟦between these⟧, with its weight w
a special token's name that is spelled in a text is shown as <\s>"""


def preview(dataset, conversation, tokenizer, classes, class_weights):
    """Lines of text: one conversation as the model reads it, with the weights of its tokens."""
    weights = dataset.weights_of(conversation, class_weights)
    name = list(classes)[dataset.index["source_class"][conversation]]
    text, tokens = "", dataset.tokens[dataset.span(conversation)].tolist()
    bounds = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(tokens)]
    for low, high in zip(bounds, bounds[1:], strict=False):
        run = visible(tokens[low:high], tokenizer)
        text += f"⟦{run}⟧w={weights[low]:.3g} " if weights[low] else run
    where = dataset.where(conversation)
    return [f"{where}  class {name}, {len(weights)} tokens", text.rstrip("\n"), ""]


def visible(tokens, tokenizer):
    """Text of ids with the special tokens written out, one turn per line."""
    names, text, plain = tokenizer.special, "", []
    for token in [*tokens, None]:
        if token is not None and token not in names:
            plain.append(token)
            continue
        if plain:
            text, plain = text + harmless(tokenizer.spell(plain), names), []
        if token is not None:
            text += names[token] + "\n" * (token == tokenizer.eot)
    return text


def harmless(text, names):
    """A text without anything that looks like a special token, a mark or an escape sequence."""
    text = _printable(text, besides="\n\t")
    for name in names.values():
        text = text.replace(name, name[0] + "\\" + name[1:])  # <\s>
    return text.replace("⟦", "\ufffd").replace("⟧", "\ufffd")


def _printable(text, besides=""):
    return "".join(c if c in besides or c.isprintable() else "\ufffd" for c in text)


# ----------------------------------------------------------------------------------------- the log


class Log:
    """metrics.jsonl, a line per step, and the lines on the terminal."""

    def __init__(self, plan, ranks, out, start):
        self.plan, self.ranks, self.start = plan, ranks, start
        self.began = time.perf_counter()
        self.evaluations = {}  # {step: by_class}, on rank 0, of this evaluation data
        self.peak = peak_flops(torch.cuda.get_device_name()) if ranks.cuda else None
        if ranks.first:
            path = out / "metrics.jsonl"
            evaluated_again = start if plan.evaluates(start) else None
            keep = []
            for line in read_metrics(path) if start else ():
                ours = "eval" in line and line.get("eval_data") == plan.eval_name
                if line["step"] > start or (ours and line["step"] == evaluated_again):
                    continue
                keep.append(line)
                if ours:
                    self.evaluations[line["step"]] = line["eval"]
            temporary = out / ".metrics.tmp"
            temporary.write_text("".join(json.dumps(line) + "\n" for line in keep))
            sync(temporary)
            temporary.replace(path)
            self.file, self.unwritten = open(path, "ab", buffering=0), b""

    def step(self, step, bins, loss, lr, grad_norm, table, seconds):
        if not self.ranks.first:
            return
        plan, lengths = self.plan, self.plan.dataset.lengths
        conversations = np.concatenate(bins).astype(np.int64)
        tokens = int(lengths[conversations].sum())
        squares = float((lengths[conversations].astype(np.float64) ** 2).sum())
        flops = training_flops(plan.network, tokens, squares) / seconds / self.ranks.world
        classes = by_class(plan, table)
        supervised = sum(c["tokens"] for c in classes.values())
        line = {
            "step": step,
            "epoch": plan.order.epoch_of(step),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "mfu": flops / self.peak if self.peak and plan.bf16 else None,
            "memory_bytes": peak_memory(self.ranks),
            "classes": classes,
        }
        self.write(line)
        left = plan.order.total - step
        left *= (time.perf_counter() - self.began) / (step - self.start)
        found = {name: c for name, c in classes.items() if c["tokens"]}
        shown = "  ".join(f"{n} {c['loss']:.3f} {c['accuracy']:4.0%}" for n, c in found.items())
        mfu = f" {line['mfu']:.0%} mfu" if line["mfu"] else ""
        self.ranks.line.refresh(
            f"step {step}/{plan.order.total}  {clock(left)} left  "
            f"epoch {line['epoch']}/{plan.config.epochs}  loss {loss:.4f}  {shown}  lr {lr:.2e}  "
            f"norm {grad_norm:.2f}  {line['tokens_per_second']:,.0f} tok/s{mfu}",
            final=step == plan.order.total,
        )

    def write(self, line):
        """Append a line; if the disk is full, it is kept for later and training continues."""
        line = json.loads(json.dumps(line), parse_constant=lambda _: None)  # NaN is not JSON
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
        found = {name: c for name, c in classes.items() if c["tokens"]}
        each = [f"{n} loss {c['loss']:.4f}, {c['accuracy']:.1%} right" for n, c in found.items()]
        self.ranks.say(f"evaluation at step {step}: {'  '.join(each)}")

    def expert_losses(self):
        """{step: the best-rewarded class's held-out loss} of the evaluations on this data."""
        expert = expert_class(self.plan.classes)
        return {step: classes[expert]["loss"] for step, classes in self.evaluations.items()}


def by_class(plan, table):
    """Per class: unweighted loss and accuracy over its supervised tokens, share of the weight.

    table {row of train.TABLE: (C,) sums}.
    """
    sums = [dict(zip(table, column, strict=True)) for column in zip(*table.values(), strict=True)]
    all_weight = sum(of["weight"] for of in sums) or 1.0
    return {
        name: {
            "tokens": int(of["tokens"]),
            "loss": of["loss"] / of["tokens"] if of["tokens"] else None,
            "accuracy": of["correct"] / of["tokens"] if of["tokens"] else None,
            "weight_share": of["weight"] / all_weight,
        }
        for name, of in zip(plan.classes, sums, strict=True)
    }


def evaluation(plan, table):
    """The table of an evaluation by class, as text."""
    out = [f"{'class':14} {'condition':14} {'tokens':>12} {'loss':>9} {'accuracy':>9}"]
    for name, of in by_class(plan, table).items():
        condition = plan.classes[name].condition if plan.config.condition else ""
        numbers = f"{of['loss']:9.4f} {of['accuracy']:9.2%}" if of["tokens"] else ""
        out.append(f"{name:14} {condition:14} {of['tokens']:12,} {numbers}".rstrip())
    return "\n".join([*out, "loss: mean cross-entropy per token, nats; accuracy: likeliest tokens"])


PEAK_FLOPS = {  # dense bf16, by a part of torch.cuda.get_device_name(); NVIDIA's data sheets
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "B200": 2250e12, "A100": 312e12,
}  # fmt: skip


def peak_flops(name):
    """Of the first entry that is a part of `name`; None if the device is not listed."""
    return next((PEAK_FLOPS[key] for key in PEAK_FLOPS if key in name), None)


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
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

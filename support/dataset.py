"""Files of conversations, tokenized once into memory-mapped arrays.

    files -> Blocks -> encoder (data.Encoder), a process per core -> three arrays and done.json

done.json is written last and has the arrays' checksums: if it is missing or they differ, as after
a loss of power, the arrays are rebuilt. The folder is named after the SHA-256 of the files' bytes.
"""

import collections
import contextlib
import dataclasses
import gc
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from support.containers import blocks

FORMAT = 4  # changes with the arrays' format, or with how files are read
SHOWN_CAUSES, SHOWN_PLACES = 20, 5  # of bad lines
MANY = 64 << 20  # bytes from which several processes are faster in spite of their start-up time

# The weight stored with a token. Above 0: a factor on the weight of its class. Below 0: FINAL times
# a weight that replaces the class's, as in OpenChat's "items". 0: not supervised.
FINAL = -1.0
# A row per conversation: its first token, how many, how many are supervised, the sums of their
# factors and of their final weights, its answers, the number of its class, the weight of its own
# reward (-1: it has none), its file, its line or item.
INDEX = np.dtype([
    ("start", "<i8"), ("length", "<i4"), ("supervised", "<i4"), ("factors", "<f8"),
    ("final", "<f8"), ("answers", "<i4"), ("source_class", "<i4"), ("own_weight", "<f8"),
    ("file", "<i4"), ("line", "<i4"),
])  # fmt: skip
ARRAYS = {"tokens": np.dtype("<i4"), "weights": np.dtype("<f4"), "index": INDEX}


class BadData(ValueError):
    """Lines that cannot be trained on, by cause, with their places and count; how to fix it."""


def problem_lines(report):
    """['FILE:7: cause', 'FILE: 400 lines: cause (1, 2, 3, ...)'], at most 20 and the others."""
    out = []
    for problem in report["problems"].values():
        places = ", ".join(map(str, problem["places"]))
        more = ", ..." if problem["count"] > SHOWN_PLACES else ""
        several = f"{problem['count']:,} {problem['cause']} ({places}{more})"
        out.append(f"{problem['path']}: {several}" if problem["count"] > 1 else problem["first"])
    if others := report["bad"] - sum(problem["count"] for problem in report["problems"].values()):
        out.append(f"... and {others:,} for other causes, or in other files")
    return out


def encode_files(sources, encoder, settings, folder, *, skip_bad=False, progress=None):
    """Encode Sources into arrays below `folder`, once; returns a Dataset.

    The arrays are keyed by the files' content and by `settings` (JSON), all that they depend on.
    `encoder(block)` returns (arrays_of its conversations, Report); the rest is as in data.prepare.
    """
    digests = [source.sha256() for source in sources]
    settings = [FORMAT, settings, [(s.source_class, s.shape) for s in sources], skip_bad, digests]
    folder = Path(folder) / hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    if not _is_whole(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            report = _write_arrays(folder, sources, encoder, progress)
            for source, digest in zip(sources, digests):
                if source.sha256() != digest:
                    raise ValueError(f"{source.path}: changed while it was read; try again")
            _refuse_bad(report, sources, skip_bad, encoder.classes)
            done = {"report": vars(report), "crc32": _checksums(folder, vars(report))}
            (folder / "done.json").write_text(json.dumps(done))
        except ValueError:
            shutil.rmtree(folder)
            raise
        except OSError as error:  # on a full disk Python names no file
            raise OSError(f"{folder}: {error}") from None
    return Dataset(folder, sources)


def _write_arrays(folder, sources, encoder, progress):
    report, tokens = Report(), 0
    sizes = [os.stat(source.path).st_size for source in sources]
    with contextlib.ExitStack() as stack:
        files = {n: stack.enter_context(open(folder / f"{n}.bin", "wb")) for n in ARRAYS}
        for block, (arrays, of_block) in encode_blocks(blocks(sources), encoder, sum(sizes)):
            arrays["index"]["start"] += tokens
            tokens += len(arrays["tokens"])
            for name, values in arrays.items():
                files[name].write(values)
            of_block.not_read.update(f"{key} (of the file)" for key in block.not_read)
            report.add(of_block)
            if progress:
                done = sum(sizes[: block.file]) + block.bytes_read
                progress(done, sum(sizes), report.conversations)
    return report


def _refuse_bad(report, sources, skip_bad, classes):
    good = report.conversations + report.answer_cut + report.weightless
    if report.bad and not (skip_bad and good):
        hint = "Fix them, or pass --skip-bad to drop and count them."
        if not good:
            hint = "No line is good. docs/DATA.md has a table of the supported formats."
        head = f"{report.bad:,} bad line{'s' * (report.bad > 1)}:"
        lines = [head, *problem_lines(vars(report)), hint]
        if any(problem["of_class"] for problem in report.problems.values()):
            table = json.dumps({name: vars(source) for name, source in classes.items()})
            how = "For other classes, name their --class-field, or change this table for --classes"
            lines.append(f"{how}: {table}")
        raise BadData("\n".join(lines))
    if not report.conversations:
        names = ", ".join(str(source.path) for source in sources)
        why = f"{report.answer_cut:,} cut before an answer, {report.weightless:,} of weight 0"
        raise ValueError(f"{names}: no conversation to train on ({why})")


def _checksums(folder, report):
    sums = {"report": zlib.crc32(json.dumps(report).encode())}
    for name in ARRAYS:
        sums[name] = 0
        with open(folder / f"{name}.bin", "rb") as file:
            while piece := file.read(1 << 20):  # a map of the whole would be resident memory
                sums[name] = zlib.crc32(piece, sums[name])
    return sums


def _is_whole(folder):
    """Do the arrays exist, as they were written?"""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        done = json.loads((folder / "done.json").read_bytes())
        return done["crc32"] == _checksums(folder, done["report"])
    return False


@dataclasses.dataclass
class Report:
    """Counts of conversations, tokens and bad lines, of all files or of one block."""

    conversations: int = 0  # in the arrays
    cut: int = 0  # longer than the maximum length
    tokens_cut: int = 0
    answer_cut: int = 0  # dropped: no answer is left
    weightless: int = 0  # dropped: no answer has a weight above 0
    too_small: int = 0  # weights
    unknown: int = 0  # tokens of <unk>
    unknown_in: list = ()  # conditions that have some
    lost_bytes: int = 0  # bytes of text that give no token
    bad: int = 0  # lines
    problems: dict = dataclasses.field(default_factory=dict)  # the first, by file and cause
    not_read: dict = dataclasses.field(default_factory=collections.Counter)  # {key: how often}

    def refuse(self, source, number, error):
        """Count a bad line."""
        cause = f"{'lines' if source.shape == 'lines' else 'items'}: {error.cause}"
        first = f"{source.where(number)}: {error}"
        problem = {"path": str(source.path), "cause": cause, "first": first, "count": 1}
        problem |= {"places": [number], "of_class": error.of_class}
        self.add(Report(bad=1, problems={f"{source.path}: {cause}": problem}))

    def add(self, other):
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        for name, problem in other.problems.items():
            if known := self.problems.get(name):
                known["count"] += problem["count"]
                known["places"] = (known["places"] + problem["places"])[:SHOWN_PLACES]
            elif len(self.problems) < SHOWN_CAUSES:
                self.problems[name] = problem
        self.not_read.update(other.not_read)
        self.unknown_in = other.unknown_in


def encode_blocks(blocks, encoder, size):
    """(block, its encoding) in order; for MANY bytes or more, in one process per core."""
    processes = process_count()
    if size < MANY or processes == 1:
        yield from ((block, encoder(block)) for block in blocks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    try:
        with ProcessPoolExecutor(processes, context, _start_process, [encoder]) as pool:
            submitted = ((block, pool.submit(_encode, block)) for block in blocks)
            ahead = collections.deque(itertools.islice(submitted, 2 * processes))
            while ahead:
                block, result = ahead.popleft()
                yield block, result.result()
                ahead.extend(itertools.islice(submitted, 1))
    except BrokenProcessPool:
        raise OSError("a tokenizing process was killed (out of memory?): run it again") from None


def process_count():
    """One per core that this process may use; each takes about 300 MB."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(len(allowed(0)), 32)


def _start_process(encoder):
    global _encoder
    _encoder = encoder
    gc.disable()  # its many objects form no cycles, and looking for them takes a sixth of the time
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(block):
    return _encoder(block)


def arrays_of(conversations):
    """ARRAYS of [(tokens in parts, their weights [(weight, how many), ...], messages, (number of
    the class, own_weight, file, line)), ...].
    """
    rows, all_parts, all_weights = [], [], []
    for parts, weights, messages, row in conversations:
        length, supervised = sum(n for _, n in weights), sum(n for weight, n in weights if weight)
        factors = sum(weight * n for weight, n in weights if weight > 0)
        final = sum(FINAL * weight * n for weight, n in weights if weight < 0)
        # A single question has 1 answer; an assistant who speaks first answers something else too.
        begun = [message for message, _ in zip(messages, weights[2::2])]  # <s>, then 2 per turn
        roles = [message.role for message in begun if message.role != "system"]
        answers = max(roles.count("assistant"), 2 * (roles[:1] == ["assistant"]))
        rows.append((0, length, supervised, factors, final, answers, *row))
        all_parts += parts
        all_weights += weights
    index = np.array(rows, INDEX)
    index["start"] = np.cumsum(index["length"]) - index["length"]
    tokens = np.concatenate(all_parts or [[]]).astype(ARRAYS["tokens"])
    values, counts = np.array(all_weights, float).reshape(-1, 2).T
    weights = np.repeat(values.astype(ARRAYS["weights"]), counts.astype(int))
    return {"tokens": tokens, "weights": weights, "index": index}


def weight_of(rows, class_weights):
    """The weight of each conversation's own reward, or that of its class if it has none."""
    own = rows["own_weight"]
    return np.where(own < 0, class_weights[rows["source_class"]], own)


class Dataset:
    """Tokenized conversations, memory-mapped; `lengths` (C,) are their tokens."""

    def __init__(self, folder, sources):
        self.folder, self.sources = Path(folder), sources
        self.report = json.loads((self.folder / "done.json").read_bytes())["report"]
        self.tokens, self.weights, self.index = (
            np.memmap(self.folder / f"{name}.bin", dtype, "r") for name, dtype in ARRAYS.items()
        )
        self.lengths = np.ascontiguousarray(self.index["length"])

    def __len__(self):
        return len(self.index)

    def total_weight(self, conversations, class_weights):
        """Σ w over the supervised tokens; class_weights (classes,), or None if every w is 1."""
        return float(self.weight_by_conversation(conversations, class_weights).sum())

    def weight_by_conversation(self, conversations, class_weights):
        """Σ w of each conversation's supervised tokens; class_weights as in total_weight."""
        rows = self.index[conversations]
        if class_weights is None:
            return rows["supervised"].astype(np.float64)
        return weight_of(rows, class_weights) * rows["factors"] + rows["final"]

    def most_answers(self):
        """The most answers in any conversation; 1 if all are single questions."""
        return max(1, int(self.index["answers"].max()))

    def span(self, conversation):
        """The slice of a conversation's tokens and weights."""
        row = self.index[conversation]
        return slice(row["start"], row["start"] + row["length"])

    def weights_of(self, conversation, class_weights):
        """(length,) float32: the weight of each token; class_weights as in total_weight."""
        weights = self.weights[self.span(conversation)]
        if class_weights is None:
            return (weights != 0).astype(np.float32)
        factor = weight_of(self.index[conversation], class_weights)
        return np.where(weights < 0, FINAL * weights, factor * weights).astype(np.float32)

    def where(self, conversation):
        """A conversation's "file:line" or "file: item", for messages."""
        row = self.index[conversation]
        return self.sources[row["file"]].where(row["line"])

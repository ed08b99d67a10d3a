"""Files of conversations, tokenized once into memory-mapped arrays.

Reads in a stream, in as many processes as there are cores, with flat memory. A run that was killed
goes on at its last whole block. What becomes of a line is the encoder's business (data.Encoder).
"""

import collections
import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from support.containers import blocks

FORMAT = 3  # of the arrays, and of what is read into them: changes with either
SHOWN_CAUSES, SHOWN_PLACES = 20, 5  # of what is wrong
NAMED_KEYS = 100  # different keys that are counted as not read
CHUNK = 16 << 20  # tokens looked through at a time
MANY = 64 << 20  # bytes from which on several processes tokenize; below, starting them is slower

# A token's stored weight: above 0 a factor on the weight of its class, below 0 a final weight,
# negated, 0 where it is not learned. One row a conversation: where its tokens start, how many, the
# number of its class, how many are learned, the sum of the factors among their weights and of the
# final ones, its file and its line or item there.
INDEX = np.dtype(
    [
        ("start", "<i8"),
        ("length", "<i4"),
        ("source_class", "<i4"),
        ("supervised", "<i4"),
        ("factors", "<f8"),
        ("final", "<f8"),
        ("file", "<i4"),
        ("line", "<i4"),
    ]
)
ARRAYS = {"tokens": np.dtype("<i4"), "weights": np.dtype("<f4"), "index": INDEX}


class BadData(ValueError):
    """Lines that cannot be trained on, by cause, with places and count, and what can be done."""

    def __init__(self, report, good):
        count = report["bad"]
        lines = "1 bad line" if count == 1 else f"{count:,} bad lines"
        shown = problem_lines(report)
        hint = "Fix them, or pass --skip-bad to drop and count them."
        if not good:
            hint = "No line is good. README.md has a table of what is read: On your own data."
        super().__init__("\n".join([f"{lines}:", *shown, hint]))


def problem_lines(report):
    """['FILE:7: cause', 'FILE: 400 lines: cause (1, 2, 3, ...)'], at most 20 and the others."""
    out = []
    for of in report["problems"]:
        if of["count"] == 1:
            out.append(f"{of['where']}: {of['text']}")
        else:
            places = ", ".join(map(str, of["places"]))
            more = ", ..." if of["count"] > len(of["places"]) else ""
            unit = "lines" if of["lines"] else "items"
            out.append(f"{of['path']}: {of['count']:,} {unit}: {of['cause']} ({places}{more})")
    if report["other_causes"]:
        out.append(f"... and {report['other_causes']:,} for other causes, or in other files")
    return out


def encode_files(sources, encoder, settings, folder, *, skip_bad=False, progress=None):
    """Encode Sources into arrays below `folder`, once; returns a Dataset.

    The arrays are keyed by the content of the files and by `settings` (JSON), all that the
    encoder's work depends on. `encoder(block)` gives (arrays as ARRAYS, an Account of the rest).
    `progress(done bytes, all bytes, conversations)` is called as it goes. Raises BadData after
    all files were read, unless `skip_bad`.
    """
    sizes = [os.stat(source.path).st_size for source in sources]
    settings = [FORMAT, settings, [(s.source_class, s.shape) for s in sources], skip_bad]
    folder = Path(folder) / _cache_key([source.path for source in sources], settings)
    if (folder / "done.json").exists():
        return Dataset(folder, sources)
    with _Arrays(folder) as arrays:
        state = arrays.state
        try:
            for block, encoded in encode_blocks(blocks(sources, state), encoder, sum(sizes)):
                arrays.append(block, *encoded)
                if progress:
                    done = sum(sizes[: block.file]) + block.done
                    progress(done, sum(sizes), state["conversations"])
        except ValueError:  # a broken file, which mended is another
            shutil.rmtree(folder)
            raise
        refused = state["bad"] and not skip_bad
        if state["conversations"] and not refused:
            arrays.commit("done.json")
            return Dataset(folder, sources)
    shutil.rmtree(folder)
    good = state["conversations"] + state["answer_cut"] + state["weightless"]
    if refused or (state["bad"] and not good):
        raise BadData(state, good)
    names = ", ".join(str(source.path) for source in sources)
    raise ValueError("; ".join([f"{names}: no conversation to train on", *dropped(state)]))


def dropped(report):
    """Lines of text: conversations that were left out because nothing of them is learned."""
    out = []
    if report["answer_cut"]:
        out.append(f"{report['answer_cut']:,} have no answer within the maximum length")
    if report["weightless"]:
        out.append(f"{report['weightless']:,} have no answer with a weight above 0")
    return out


def _cache_key(paths, settings):
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


class Account:
    """What is told of a block besides its arrays: what was counted, what is wrong, not read."""

    def __init__(self):
        self.counted = {"cut": 0, "tokens_cut": 0, "answer_cut": 0, "weightless": 0, "bad": 0}
        self.counted["other_causes"] = 0  # bad, of causes beyond the first 20
        self.counted["unknown"] = 0  # tokens that stand for what the tokenizer lacks
        self.counted["lost_bytes"] = 0  # of the texts, which the tokenizer lacks
        self.problems = []  # one a cause of a file, as `problem_lines` shows them
        self.not_read = collections.Counter()

    def refuse(self, block, number, error):
        self.counted["bad"] += 1
        source = block.source
        self._add({
            "path": str(source.path), "lines": source.shape == "lines", "cause": error.cause,
            "count": 1, "places": [number], "where": source.where(number), "text": str(error),
        })  # fmt: skip

    def add(self, other):
        for name, count in other.counted.items():
            self.counted[name] += count
        for problem in other.problems:
            self._add(problem)
        for key, count in other.not_read.items():
            known = key in self.not_read or len(self.not_read) < NAMED_KEYS
            self.not_read[key if known else "keys beyond the first 100"] += count

    def _add(self, problem):
        for of in self.problems:
            if (of["path"], of["cause"]) == (problem["path"], problem["cause"]):
                of["count"] += problem["count"]
                of["places"] = (of["places"] + problem["places"])[:SHOWN_PLACES]
                return
        if len(self.problems) < SHOWN_CAUSES:
            self.problems.append(problem)
        else:
            self.counted["other_causes"] += problem["count"]


def encode_blocks(blocks, encoder, size):
    """(block, what the encoder makes of it) in order; of MANY bytes, in a process a core."""
    processes = process_count()
    if size < MANY or processes == 1:
        yield from ((block, _encode(encoder, block)) for block in blocks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    pool = ProcessPoolExecutor(processes, context, _start_process, [encoder])
    try:
        waiting = collections.deque()
        for block in blocks:
            waiting.append((block, pool.submit(_encode_in_process, block)))
            if len(waiting) > 2 * processes:
                block, result = waiting.popleft()
                yield block, result.result()
        for block, result in waiting:
            yield block, result.result()
    except BrokenProcessPool:
        raise OSError(
            "a process that tokenized was killed, perhaps for want of memory; the same command "
            "goes on from there"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def process_count():
    """A process a core that this one may use; each takes some 300 MB."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return min(len(allowed(0)), 32)


def _start_process(encoder):
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_process(block):
    return _encode(_encoder, block)


def _encode(encoder, block):
    """encoder(block). Looking for cycles among its many objects, which have none, takes a sixth."""
    gc.disable()
    try:
        return encoder(block)
    finally:
        gc.enable()


class _Arrays:
    """The arrays' files, to append to; progress.json says up to where they are whole."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Where to go on: file, offset and line, or item; and the account of what was read.
        self.state = {"file": 0, "offset": 0, "line": 0, "tokens": 0, "conversations": 0}
        self.account = Account()
        with contextlib.suppress(OSError, ValueError):
            self.state |= json.loads((folder / "progress.json").read_text())
            self.account.problems = self.state["problems"]
            self.account.not_read.update(self.state["not_read"])
            self.account.counted = {name: self.state.get(name, 0) for name in self.account.counted}
        self._account_for()

        self.files = {name: open(folder / f"{name}.bin", "ab") for name in ARRAYS}
        for name, file in self.files.items():
            count = self.state["conversations" if name == "index" else "tokens"]
            file.truncate(count * ARRAYS[name].itemsize)

    def _account_for(self):
        account = self.account
        self.state |= account.counted
        self.state |= {"problems": account.problems, "not_read": dict(account.not_read)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.files.values():
            file.close()

    def append(self, block, arrays, account):
        """Append what was made of a block, and commit."""
        state = self.state
        arrays["index"]["start"] += state["tokens"]
        for name, values in arrays.items():
            values.tofile(self.files[name])
        account.not_read.update(f"{key} (of the file)" for key in block.not_read)
        self.account.add(account)
        self._account_for()
        state["tokens"] += len(arrays["tokens"])
        state["conversations"] += len(arrays["index"])
        state |= {"file": block.file, "offset": block.offset}
        state["line"] = block.number + len(block.raw)
        if block.last:
            state |= {"file": block.file + 1, "offset": 0, "line": 0}
        self.commit("progress.json")

    def commit(self, name):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        temporary = self.folder / "progress.tmp"
        temporary.write_text(json.dumps(self.state))
        temporary.replace(self.folder / name)


class Dataset:
    """Tokenized conversations, memory-mapped; `lengths` (C,) are their tokens."""

    def __init__(self, folder, sources):
        self.folder, self.sources = Path(folder), sources
        self.report = json.loads((self.folder / "done.json").read_text())
        arrays = {name: self.folder / f"{name}.bin" for name in ARRAYS}
        self.tokens, self.weights, self.index = (
            np.memmap(path, dtype=ARRAYS[name], mode="r") for name, path in arrays.items()
        )
        self.lengths = np.ascontiguousarray(self.index["length"])

    def __len__(self):
        return len(self.index)

    def total_weight(self, conversations, class_weights):
        """Σ w over the supervised tokens; class_weights (classes,), or None where every w is 1."""
        return float(self.weight_by_conversation(conversations, class_weights).sum())

    def weight_by_conversation(self, conversations, class_weights):
        """Σ w of each conversation's supervised tokens; class_weights as in total_weight."""
        rows = self.index[conversations]
        if class_weights is None:
            return rows["supervised"].astype(np.float64)
        return class_weights[rows["source_class"]] * rows["factors"] + rows["final"]

    def most_answers(self, end_of_turn):
        """The most answers that a conversation has; 1 where all are single questions.

        By the ends of turn within it: one before the answer of `u [a]`, two of `s u [a]`, three of
        `u a u [a]`, cut short or not.
        """
        found = [
            at + np.flatnonzero(self.tokens[at : at + CHUNK] == end_of_turn)
            for at in range(0, len(self.tokens), CHUNK)
        ]
        found, starts = np.concatenate(found), self.index["start"]
        of = np.searchsorted(starts, found, side="right") - 1
        within = found < starts[of] + self.lengths[of] - 1  # not the last answer's own end
        return int(np.bincount(of[within]).max(initial=1) + 1) // 2

    def span(self, conversation):
        """Where a conversation's tokens and weights lie."""
        row = self.index[conversation]
        return slice(row["start"], row["start"] + row["length"])

    def weights_of(self, conversation, class_weights):
        """(length,) float32: what is learned of each token; class_weights as in total_weight."""
        weights = self.weights[self.span(conversation)]
        if class_weights is None:
            return (weights != 0).astype(np.float32)
        of_class = class_weights[self.index[conversation]["source_class"]]
        return np.where(weights < 0, -weights, of_class * weights).astype(np.float32)

    def where(self, conversation):
        """file:line, or file: item, of a conversation, for messages."""
        row = self.index[conversation]
        return self.sources[row["file"]].where(row["line"])

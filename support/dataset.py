"""Files of conversations, tokenized once into memory-mapped arrays.

Reads in a stream, in as many processes as there are cores, with flat memory. A run that was killed
goes on at its last whole block. What becomes of a line is the encoder's business (data.Encoder).
"""

import collections
import contextlib
import dataclasses
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

from support.formats import LONGEST_LINE

SHOWN_PROBLEMS = 20
CLASS_WEIGHT = -1.0  # stored where a token takes the weight of its class
BLOCK = 4 << 20  # bytes of text tokenized at a time, and committed together
MANY = 64 << 20  # bytes from which on several processes tokenize; below, starting them is slower

# One row a conversation: where its tokens start, how many, the number of its class, how many take
# the weight of the class, how many a weight of their own and that weight's sum, its file and line.
INDEX = np.dtype(
    [
        ("start", "<i8"),
        ("length", "<i4"),
        ("source_class", "<i4"),
        ("supervised", "<i4"),
        ("own_supervised", "<i4"),
        ("own_weight", "<f8"),
        ("file", "<i4"),
        ("line", "<i4"),
    ]
)
ARRAYS = {"tokens": np.dtype("<i4"), "weights": np.dtype("<f4"), "index": INDEX}


class BadData(ValueError):
    """Lines that cannot be trained on: the first 20 as file:line: reason, and their count."""

    def __init__(self, problems, count):
        more = "" if count <= len(problems) else f"\n... and {count - len(problems)} more"
        hint = "\nFix them, or pass --skip-bad to drop and count them."
        lines = "1 bad line" if count == 1 else f"{count} bad lines"
        super().__init__(f"{lines}:\n" + "\n".join(problems) + more + hint)


def encode_files(paths, encoder, settings, folder, *, skip_bad=False, progress=None):
    """Encode files into arrays below `folder`, once; returns a Dataset.

    The arrays are keyed by the content of the files and by `settings` (JSON), all that the
    encoder's work depends on. `encoder(block)` gives (arrays as ARRAYS, {what was counted}, the
    first bad lines). `progress(done bytes, all bytes, conversations)` is called as it goes.
    Raises BadData after all files were read, unless `skip_bad`.
    """
    paths = [Path(path) for path in paths]
    sizes = [_size(path) for path in paths]
    folder = Path(folder) / _cache_key(paths, [settings, skip_bad])
    if (folder / "done.json").exists():
        return Dataset(folder, paths)
    with _Arrays(folder) as arrays:
        state = arrays.state
        for block, encoded in encode_blocks(blocks(paths, state), encoder, sum(sizes)):
            arrays.append(block, *encoded)
            if progress:
                done = sum(sizes[: state["file"]]) + state["offset"]
                progress(done, sum(sizes), state["conversations"])
        refused = state["bad"] and not skip_bad
        if state["conversations"] and not refused:
            arrays.commit("done.json")
            return Dataset(folder, paths)
    shutil.rmtree(folder)
    if refused:
        raise BadData(state["problems"], state["bad"])
    names, lost = ", ".join(map(str, paths)), state["without_answer"]
    cut = f"; {lost} lost their answer at the maximum length" if lost else ""
    raise ValueError(f"{names}: no conversation to train on{cut}")


def _size(path):
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _cache_key(paths, settings):
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def lines(path, offset=0):
    """(bytes of a line or None where it is too long, offset behind it) from `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        while line := file.readline(LONGEST_LINE):
            part = line
            while len(part) == LONGEST_LINE and not part.endswith(b"\n"):  # pass over the rest
                line, part = None, file.readline(LONGEST_LINE)
            yield line, file.tell()


@dataclasses.dataclass
class Block:
    """Some lines of a file: those after line number `line`, up to the byte `offset`."""

    file: int  # its number among the paths
    path: Path
    line: int
    raw: list  # of bytes, or None for a line that is too long
    offset: int


def blocks(paths, state):
    """The files in Blocks of about BLOCK bytes, from the state's file, offset and line on."""
    for number, path in enumerate(paths):
        if number < state["file"]:
            continue
        offset, line = (state["offset"], state["line"]) if number == state["file"] else (0, 0)
        block, size = Block(number, path, line, [], offset), 0
        for raw, block.offset in lines(path, offset):
            block.raw.append(raw)
            size += len(raw or b"")
            if size >= BLOCK:
                yield block
                line = block.line + len(block.raw)
                block, size = Block(number, path, line, [], block.offset), 0
        if block.raw:
            yield block


def encode_blocks(blocks, encoder, size):
    """(block, what the encoder makes of it) in order; of MANY bytes, in a process a core."""
    processes = process_count()
    if size < MANY or processes == 1:
        yield from ((block, encoder(block)) for block in blocks)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads hold
    pool = ProcessPoolExecutor(processes, context, _start_process, [encoder])
    try:
        waiting = collections.deque()
        for block in blocks:
            waiting.append((block, pool.submit(_encode_in_process, block)))
            if len(waiting) > 2 * processes:
                block, encoded = waiting.popleft()
                yield block, encoded.result()
        for block, encoded in waiting:
            yield block, encoded.result()
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
    return _encoder(block)


class _Arrays:
    """The arrays' files, to append to; progress.json says up to where they are whole."""

    def __init__(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        # Where to go on: file, offset and line; and what was counted.
        self.state = {"file": 0, "offset": 0, "line": 0, "tokens": 0, "conversations": 0}
        self.state |= {"cut": 0, "tokens_cut": 0, "without_answer": 0, "bad": 0, "problems": []}
        with contextlib.suppress(OSError, ValueError):
            self.state |= json.loads((folder / "progress.json").read_text())

        self.files = {name: open(folder / f"{name}.bin", "ab") for name in ARRAYS}
        for name, file in self.files.items():
            count = self.state["conversations" if name == "index" else "tokens"]
            file.truncate(count * ARRAYS[name].itemsize)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in self.files.values():
            file.close()

    def append(self, block, arrays, counted, problems):
        """Append what was made of a block, and commit."""
        state = self.state
        arrays["index"]["start"] += state["tokens"]
        for name, values in arrays.items():
            values.tofile(self.files[name])
        state |= {name: state[name] + count for name, count in counted.items()}
        state["problems"] += problems[: SHOWN_PROBLEMS - len(state["problems"])]
        state["tokens"] += len(arrays["tokens"])
        state["conversations"] += len(arrays["index"])
        line = block.line + len(block.raw)
        state |= {"file": block.file, "offset": block.offset, "line": line}
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

    def __init__(self, folder, paths):
        self.folder, self.paths = Path(folder), paths
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
        rows = self.index[conversations]
        if class_weights is None:
            return float((rows["supervised"] + rows["own_supervised"]).sum())
        by_class = class_weights[rows["source_class"]] * rows["supervised"]
        return float((by_class + rows["own_weight"]).sum())

    def span(self, conversation):
        """Where a conversation's tokens and weights lie."""
        row = self.index[conversation]
        return slice(row["start"], row["start"] + row["length"])

    def weights_of(self, conversation, class_weights):
        """(length,) float32: what is learned of each token; class_weights as in total_weight."""
        weights = self.weights[self.span(conversation)]
        if class_weights is None:
            return (weights != 0).astype(np.float32)
        own = class_weights[self.index[conversation]["source_class"]]
        return np.where(weights == CLASS_WEIGHT, own, weights).astype(np.float32)

    def where(self, conversation):
        """file:line of a conversation, for messages."""
        row = self.index[conversation]
        return f"{self.paths[row['file']]}:{row['line']}"

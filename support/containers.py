"""Files of JSON objects: one per line, an array, or one after another; each plain or gzipped.

    sources(arguments) -> Source, its path and shape -> blocks -> Block of raw lines or items

Lines are read in a stream. Any other file is read whole, into 2 to 5 times its size of memory.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from pathlib import Path

from loss import without_repeats
from support.formats import COMMA, LISTS, LONGEST, BadLine, check_file_keys, is_message

BLOCK = 4 << 20  # bytes of text that are tokenized at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of conversations."""

    path: Path
    source_class: str | None  # of every conversation in it, if given as CLASS=FILE
    shape: str  # "lines", "array", "data" (an array in an object), or "objects"
    start: int = 0  # of its first item, in characters

    def where(self, number):
        return f"{self.path}:{number}" if self.shape == "lines" else f"{self.path}: item {number}"

    def sha256(self):
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def sources(arguments, classes):
    """A Source per 'FILE' or 'CLASS=FILE'; ValueError names other formats and how to convert."""
    found = []
    for argument in map(str, arguments):
        name, equals, path = argument.partition("=")
        if equals and name in classes:
            path = Path(path).expanduser()
        elif equals and classes and "/" not in name and not os.path.exists(argument):
            fault = f"{argument}: {name!r} is not one of the classes {', '.join(classes)}"
            example = json.dumps({name: {"condition": name, "reward": 1.0}})
            raise ValueError(f"{fault}; a table for --classes names others: {example}")
        else:
            name, path = None, Path(argument)
        found.append(Source(path, name, *_checked(path)))
    return found


# --------------------------------------------------------------------------------- kinds of files

PANDAS = "pip install pandas; pandas.read_{}.to_json(OUT, orient='records', lines=True)"
FOREIGN = {  # pattern of a file's first bytes: its kind, how to make JSON lines of it
    rb"PAR1": ("a parquet file", PANDAS.format("parquet(FILE)")),
    rb"ARROW1": ("an Arrow file", PANDAS.format("feather(FILE)")),
    rb"\xff{4}": ("an Arrow stream", "datasets.Dataset.from_file(FILE).to_json(OUT)"),
    rb"SQLite format 3": ("a SQLite database", "export the table as JSON lines"),
    rb"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull"),
    rb".{0,3}\0": ("UTF-16 or UTF-32", "iconv -f UTF-16 (or UTF-16LE, UTF-32) -t UTF-8 FILE > OUT"),
    rb"PK\x03\x04": ("a zip archive or a spreadsheet", "unzip it, or export JSON lines"),
    rb"\x28\xb5\x2f\xfd|BZh|\xfd7zXZ": ("compressed, but not by gzip", "unzstd, bunzip2 or unxz"),
    rb"<": ("HTML or XML, perhaps the page of a failed download", "download it again"),
}
TABLES = {".csv": PANDAS.format("csv(FILE)"), ".tsv": PANDAS.format("csv(FILE, sep='\\t')")}


def _checked(path):
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is a folder, a pipe or a device; a file is read more than once")
    with opened(path) as (file, _):
        head = file.read(LONGEST)
    found = [known for start, known in FOREIGN.items() if re.match(start, head, re.DOTALL)]
    found += [("a table", TABLES[end]) for end in map(str.lower, path.suffixes) if end in TABLES]
    for kind, how in found[:1]:
        raise ValueError(f"{path}: is {kind}, not JSON: {how}")
    return _layout(head.decode(*TEXT))


@contextlib.contextmanager
def opened(path):
    """(the file's bytes, unpacked if it is gzipped; the file on the disk)."""
    try:
        with open(path, "rb", buffering=1 << 18) as disk:
            zipped = disk.peek(2)[:2] == b"\x1f\x8b"
            yield (gzip.GzipFile(fileobj=disk) if zipped else disk), disk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: is a damaged gzip file: {error}") from None
    except OSError as error:
        hint = ""
        if path.suffix not in (".json", ".jsonl", ".gz") and len(path.parts) == 2:
            hint = f"; from the Hugging Face hub: hf download {path} --repo-type dataset"
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}{hint}") from None


@dataclasses.dataclass
class Block:
    """Some lines or items of a file: those after `number`."""

    file: int  # its index among the sources
    source: Source
    number: int
    raw: list = dataclasses.field(default_factory=list)  # bytes; None if one is too long
    bytes_read: int = 0  # of the file, so far
    not_read: list = ()  # in the last block: keys of the file itself, not of its items


def blocks(sources):
    """The sources in Blocks of about BLOCK bytes."""
    for index, source in enumerate(sources):
        with opened(source.path) as (file, disk):
            raws, not_read = lines(file), ()
            if source.shape != "lines":
                raws, not_read = items(source, file.read().decode(*TEXT))
            block, size = Block(index, source, 0), 0
            for raw in raws:
                block.raw.append(raw)
                size += len(raw or b"")
                if size >= BLOCK:
                    block.bytes_read = disk.tell()
                    yield block
                    block, size = Block(index, source, block.number + len(block.raw)), 0
            block.bytes_read, block.not_read = disk.tell(), not_read
            yield block


def lines(file):
    """The bytes of each line, None if it is too long."""
    while line := file.readline(LONGEST):
        part = line
        while len(part) == LONGEST and not part.endswith(b"\n"):  # skip the rest of it
            line, part = None, file.readline(LONGEST)
        yield line


# ------------------------------------------------------------------------------------ JSON in items

DATA = re.compile(r'"data"\s*:\s*\[\s*(?={)')  # a key with a list of objects
LIST = re.compile(r"[ \t\r]*\n\s*\[")  # on the next line
SPACE, DECODER = re.compile(r"[\s\ufeff]*"), json.JSONDecoder()
TEXT = "utf-8-sig", "surrogateescape"  # of bytes that are not UTF-8 only their item is refused


def _layout(text):
    """The shape of a Source and where its first item begins, from the start of the file."""
    start = SPACE.match(text).end()
    for found in itertools.islice(DATA.finditer(text), 20):
        with contextlib.suppress(ValueError, RecursionError):  # the key is deeper, or in a line
            keys = DECODER.decode(text[start : found.end()] + "]}")
            if keys.keys().isdisjoint(LISTS):
                return "data", found.end()
    try:
        value, end = DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):  # items() or parse_json will name the fault
        value, end = None, start
    is_list = text.startswith("[", start)
    if is_list and not (LIST.match(text, end) or value and is_message(value[0])):
        return "array", SPACE.match(text, start + 1).end()
    return "objects" if "\n" in text[start:end] else "lines", start


def items(source, text):
    """([the bytes of each item, None if it is too long], keys beside the list of them)."""
    at, number, found = source.start, 0, []
    end = "" if source.shape == "objects" else "]"
    try:
        while text[at : at + 1] != end:
            number += 1
            _, stop = DECODER.raw_decode(text, at)
            item = text[at:stop].encode("utf-8", "surrogateescape")
            found.append(item if len(item) <= LONGEST else None)
            at = SPACE.match(text, stop).end()
            following = text[at : at + 1]
            if following == ",":
                if not end:
                    raise ValueError(COMMA)
                at = SPACE.match(text, at + 1).end()
            elif end and following != end:
                at_fault = repr(following) if following else "the end of the file"
                raise ValueError(f"',' expected, not {at_fault}")
        around = text[: source.start] + text[at:] if end else "{}"  # the list without its items
        beside = json.loads(around, object_pairs_hook=without_repeats) or {}
    except (ValueError, RecursionError) as error:
        place = f"{source.path}: item {number or 1}, character {at:,}"
        fault = str(error).split(": line")[0]
        raise ValueError(f"{place}: broken JSON: {fault}; the rest cannot be read") from None
    try:
        return found, check_file_keys(beside)
    except BadLine as error:
        raise ValueError(f"{source.path}: beside the list of conversations: {error}") from None

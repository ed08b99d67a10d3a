"""Files of JSON objects: one per line, an array, or one after another; each plain or gzipped.

    sources(arguments) -> Source, its path and shape -> blocks -> Block of raw lines or items

Lines are read in a stream. Any other file is read whole, into 2 to 5 times its size of memory.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import re
import zlib
from pathlib import Path

from support.formats import COMMA, LISTS, LONGEST, BadLine, check_file_keys, is_message

BLOCK = 4 << 20  # bytes of text that are tokenized at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of conversations."""

    path: Path
    source_class: str | None  # of every conversation in it, if given as CLASS=FILE
    shape: str  # "lines", "array", "data" (an array in an object), or "objects"

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
        found.append(Source(path, name, _shape(path)))
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


def _shape(path):
    if "://" in str(path) or re.match(r"https?:/", str(path)):
        raise ValueError(f"{path}: is a URL: download it first, files are read more than once")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name the files in it")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is a pipe or a device, but files are read more than once")
    with opened(path) as (file, _):
        head = file.read(LONGEST)
    found = [known for start, known in FOREIGN.items() if re.match(start, head, re.DOTALL)]
    found += [("a table", TABLES[end]) for end in map(str.lower, path.suffixes) if end in TABLES]
    for kind, how in found[:1]:
        raise ValueError(f"{path}: is {kind}, not JSON: {how}")
    return _Text(head).shape()


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
            text = None if source.shape == "lines" else _Text(file.read())
            block, size = Block(index, source, 0), 0
            for raw in text.items(source.path) if text else lines(file):
                block.raw.append(raw)
                size += len(raw or b"")
                if size >= BLOCK:
                    block.bytes_read = disk.tell()
                    yield block
                    block, size = Block(index, source, block.number + len(block.raw)), 0
            block.bytes_read = disk.tell()
            block.not_read = text.not_read(source.path) if text else ()
            yield block


def lines(file):
    """The bytes of each line, None if it is too long."""
    while line := file.readline(LONGEST):
        part = line
        while len(part) == LONGEST and not part.endswith(b"\n"):  # skip the rest of it
            line, part = None, file.readline(LONGEST)
        yield line


# ------------------------------------------------------------------------------------ JSON in items

ROWS = re.compile(r"\[.*\][ \t\r]*\n\s*\[")  # a line that is a list, and another
SPACE, DECODER = re.compile(r"[ \t\r\n\ufeff]*"), json.JSONDecoder()


class _Text:
    """The text of a file, read JSON value by JSON value; ValueError if it is not JSON."""

    def __init__(self, raw):
        # Bytes that are not UTF-8 pass through: only the item that has them is refused.
        self.text, self.at = raw.decode("utf-8", "surrogateescape"), 0
        self.beside = {}  # the keys and values of an object beside "data"

    def peek(self):
        """The next character that is not white space; "" at the end."""
        self.at = SPACE.match(self.text, self.at).end()
        return self.text[self.at : self.at + 1]

    def take(self, character):
        if (found := self.peek()) != character:
            found = repr(found) if found else "the end of the file"
            raise ValueError(f"{character!r} expected, not {found}")
        self.at += 1

    def value(self):
        self.peek()
        try:
            value, self.at = DECODER.raw_decode(self.text, self.at)
        except RecursionError:
            raise ValueError("nested too deeply") from None
        return value

    def key(self):
        key = str(self.value())
        self.take(":")
        return key

    def shape(self):
        """ "lines", "array", "data" or "objects", by the first value; moves to the first item."""
        first, start = self.peek(), self.at
        try:
            self.take("[" if first == "[" else "{")
            if first == "[":
                if not (ROWS.match(self.text, start) or is_message(self.value())):
                    self.at = start + 1
                    return "array"
                self.at = start
                self.value()
            for _ in range(1000):  # more keys than any object with a list of conversations has
                if first == "[" or self.peek() == "}":
                    break
                key = self.key()
                if key == "data" and self.peek() == "[" and self.beside.keys().isdisjoint(LISTS):
                    self.take("[")
                    return "data" if self.peek() == "{" else "lines"
                self.beside[key] = self.value()
                if self.peek() != "}":
                    self.take(",")
            else:
                return "lines"
        except ValueError:  # items or parse_json will name the fault
            self.at = start + 1
            return "array" if first == "[" else "lines"
        several_lines = "\n" in self.text[start : self.at]
        self.at, self.beside = start, {}
        return "objects" if several_lines else "lines"

    def items(self, path):
        """The bytes of each item, None if it is too long; ValueError at broken JSON."""
        shape, number = self.shape(), 0
        end = "" if shape == "objects" else "]"
        try:
            while self.peek() != end:
                start, number = self.at, number + 1
                self.value()
                item = self.text[start : self.at].encode("utf-8", "surrogateescape")
                yield item if len(item) <= LONGEST else None
                if end and self.peek() != end:
                    self.take(",")
                elif self.peek() == ",":
                    raise ValueError(COMMA)
            self.at += len(end)
            while shape == "data" and self.peek() != "}":
                self.take(",")
                self.beside |= {self.key(): self.value()}
            self.at += shape == "data"
            if self.peek():
                one = "array" if shape == "array" else "object with 'data'"
                raise ValueError(f"something follows the {one}, and a file may have only one")
        except ValueError as error:
            place = f"{path}: item {number or 1}, character {self.at:,}"
            fault = str(error).split(": line")[0]
            raise ValueError(f"{place}: broken JSON: {fault}; the rest cannot be read") from None

    def not_read(self, path):
        """The keys beside "data"; ValueError for one that a conversation should have."""
        try:
            return check_file_keys(self.beside)
        except BadLine as error:
            raise ValueError(f"{path}: beside the list of conversations: {error}") from None

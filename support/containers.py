"""Files of JSON objects, in a stream: one a line, an array, or one after another.

    sources(arguments) -> Source, what a file is -> blocks -> Block of raw lines or items

Each plain or gzipped. What a file is otherwise is said in one line, with what helps.
"""

import codecs
import contextlib
import dataclasses
import gzip
import json
import os
import re
import stat
import zlib
from pathlib import Path

from support.formats import LISTS, LONGEST, check_file_key

BLOCK = 4 << 20  # bytes of text tokenized at a time, and committed together
CHUNK = 64 << 10  # bytes read at a time from an array, or as many as an unfinished item has


@dataclasses.dataclass(frozen=True)
class Source:
    """One file of conversations."""

    path: Path
    source_class: str | None  # of every conversation in it, where CLASS=FILE says so
    shape: str  # "lines", "array", "data" (an array in an object), or "objects"
    start: int  # offset of the first line, or item
    not_read: tuple = ()  # the keys beside "data"

    def where(self, number):
        return f"{self.path}:{number}" if self.shape == "lines" else f"{self.path}: item {number}"


def sources(arguments, classes):
    """A Source each of 'FILE' or 'CLASS=FILE'; ValueError says what a file is and what helps."""
    return [Source(path, name, *_shape(path)) for name, path in split_classes(arguments, classes)]


def split_classes(arguments, classes):
    """[(class or None, path), ...]."""
    found = []
    for argument in map(str, arguments):
        name, equals, path = argument.partition("=")
        if equals and name in classes:
            found.append((name, Path(path).expanduser()))
        elif equals and classes and "/" not in name and not os.path.exists(argument):
            raise ValueError(f"{argument}: {name!r} is no class of the table: {', '.join(classes)}")
        else:
            found.append((None, Path(argument)))
    return found


# ----------------------------------------------------------------------------------- what a file is

FOREIGN = {  # the first bytes of a file: what it is, and what helps
    b"PAR1": ("a parquet file", "pandas.read_parquet(FILE).to_json(OUT, orient='records', "
              "lines=True) makes lines of it"),
    b"ARROW1": ("an Arrow file", "pandas.read_feather(FILE).to_json(OUT, orient='records', "
               "lines=True) makes lines of it"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "datasets.Dataset.from_file(FILE).to_json(OUT) makes "
                          "lines of it"),
    b"SQLite format 3": ("a SQLite database", "export the table as JSON lines"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "git lfs pull gets it"),
    b"\xff\xfe\0\0": ("UTF-32", "iconv -f UTF-32 -t UTF-8 FILE > OUT"),
    b"\xff\xfe": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > OUT"),
    b"\xfe\xff": ("UTF-16", "iconv -f UTF-16 -t UTF-8 FILE > OUT"),
    b"PK\x03\x04": ("a zip archive or a spreadsheet", "unzip it, or export lines of JSON"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "zstd -d FILE"),
    b"BZh": ("compressed by bzip2", "bunzip2 FILE"),
    b"\xfd7zXZ": ("compressed by xz", "unxz FILE"),
    b"<": ("HTML or XML, perhaps the page of a failed download", "download it again"),
}  # fmt: skip


def _shape(path):
    """(shape, offset of the first item, keys beside "data")."""
    if "://" in str(path) or re.match(r"https?:/", str(path)):
        raise ValueError(f"{path}: is an address: download it first, files are read more than once")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise ValueError(f"{path}: is a folder; name the files in it")
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path}: is a pipe or a device, and files are read more than once")
        with opened(path) as (file, _):
            head = file.read(1 << 12)
    except FileNotFoundError as error:
        hint = ""
        of_a_file = path.suffix in (".json", ".jsonl", ".gz")
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not of_a_file:
            hint = (
                f"; if it is a data set of the Hugging Face hub: hf download {path} --repo-type "
                "dataset, then name the file"
            )
        raise ValueError(f"{path}: cannot be read: {error.strerror}{hint}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
    for start, (what, helps) in FOREIGN.items():
        if head.startswith(start):
            raise ValueError(f"{path}: is {what}, not JSON: {helps}")
    if b"\0" in head[:2]:
        raise ValueError(
            f"{path}: has zero bytes, as UTF-16 does: iconv -f UTF-16LE -t UTF-8 FILE > OUT, or "
            "UTF-16BE"
        )
    for suffix, tabs in ((".csv", ""), (".tsv", ", sep='\\t'")):
        if suffix in map(str.lower, path.suffixes):
            raise ValueError(
                f"{path}: is a table, not JSON: pandas.read_csv(FILE{tabs}).to_json(OUT, "
                "orient='records', lines=True) makes lines of it"
            )
    with opened(path) as (file, _):
        try:
            return _Text(path, file, 0).shape()
        except _NotWhole:  # let its lines say what is wrong
            return "lines", 0, ()


@contextlib.contextmanager
def opened(path):
    """(the file's bytes, the file on the disk), unpacked where it is gzipped."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            yield (gzip.GzipFile(fileobj=raw) if zipped else raw), raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: is broken as a gzip file: {error}") from None


# ------------------------------------------------------------------------------------------- blocks


@dataclasses.dataclass
class Block:
    """Some lines or items of a file: those after `number`, up to the byte `offset`."""

    file: int  # its number among the sources
    source: Source
    number: int
    offset: int
    done: int  # bytes of the file on the disk that were read so far
    raw: list = dataclasses.field(default_factory=list)  # of bytes; None where one is too long
    last: bool = False  # of its file
    not_read: list = ()  # in the last: keys of the file, not of its items


BEGINNING = {"file": 0, "offset": 0, "line": 0}


def blocks(files, state=BEGINNING):
    """The sources in Blocks of about BLOCK bytes, from the state's file, offset and line on."""
    for number, source in enumerate(files[state["file"] :], start=state["file"]):
        begun = number == state["file"] and state["offset"] > 0
        offset, line = (state["offset"], state["line"]) if begun else (source.start, 0)
        with opened(source.path) as (file, disk):
            file.seek(offset)
            block, size = Block(number, source, line, offset, 0), 0
            text = _Text(source.path, file, offset)
            text.not_read += source.not_read
            items = text.items(source.shape, line)
            for raw, block.offset in lines(file) if source.shape == "lines" else items:
                block.raw.append(raw)
                size += len(raw or b"")
                if size >= BLOCK:
                    block.done = disk.tell()
                    yield block
                    line = block.number + len(block.raw)
                    block, size = Block(number, source, line, block.offset, 0), 0
            block.done, block.last, block.not_read = disk.tell(), True, text.not_read
            if block.raw or block.not_read:
                yield block


def lines(file):
    """(bytes of a line or None where it is too long, offset behind it), from where `file` is."""
    while line := file.readline(LONGEST):
        part = line
        while len(part) == LONGEST and not part.endswith(b"\n"):  # pass over the rest
            line, part = None, file.readline(LONGEST)
        yield line, file.tell()


# ----------------------------------------------------------------------------------- JSON in pieces


class _NotWhole(ValueError):
    """The text is not JSON, or ends within a value."""


class _Text:
    """The text of an open file from a byte offset on, JSON value by JSON value, in a stream.

    What stands between two values is whitespace and punctuation, one byte a character; so the
    offset is known where a value ends.
    """

    def __init__(self, path, file, offset):
        self.path, self.file = path, file
        # What is not UTF-8 goes through as it is: the item that has it is refused alone.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.at = "", 0  # what was read, and up to where it was taken
        self.offset = offset  # of text[at] in the file
        self.ended, self.line_breaks = False, 0
        self.not_read = []  # keys beside "data"

    def more(self):
        chunk = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.ended = not chunk
        self.text = self.text[self.at :] + self.decoder.decode(chunk, final=not chunk)
        self.at = 0

    def peek(self):
        """The next character that is no whitespace, not taken yet; "" at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n\ufeff":
                self.line_breaks += self.text[self.at] == "\n"
                self.offset += 3 if self.text[self.at] == "\ufeff" else 1
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self.more()

    def take(self, character):
        if self.peek() != character:
            found = repr(self.peek()) if self.peek() else "the end of the file"
            raise _NotWhole(f"{character!r} expected, not {found}")
        self.at += 1
        self.offset += 1

    def value(self):
        """The bytes of the next JSON value."""
        self.peek()
        while True:
            try:
                _, end = DECODER.raw_decode(self.text, self.at)
                if end + 2 < len(self.text) or self.ended:  # else a number, "1e+", may go on
                    break
            except RecursionError:
                raise _NotWhole("nested too deeply") from None
            except ValueError as error:
                # Wrong far from the end of what was read: not for want of what comes.
                what, found = str(error).split(": line")[0], error.pos + 16 < len(self.text)
                if self.ended or (found and not what.startswith("Unterminated")):
                    raise _NotWhole(what) from None
            if len(self.text) - self.at > LONGEST:
                raise _NotWhole(f"not a value of at most {LONGEST >> 20} MiB")
            self.more()
        raw = self.text[self.at : end].encode("utf-8", "surrogateescape")
        self.line_breaks += raw.count(b"\n")
        self.at = end
        self.offset += len(raw)
        return raw

    def key(self):
        key = self.value().decode("utf-8", "replace")
        self.take(":")
        return str(json.loads(key))

    def value_of_key(self):
        return json.loads(self.value().decode("utf-8", "replace"))

    def shape(self):
        """(shape, offset of the first item, keys beside "data"), of a file from its beginning."""
        first = self.peek()
        if first == "[":
            self.take("[")
            return "array", self.offset, ()
        if first != "{":
            return "lines", 0, ()
        start, self.line_breaks, beside = self.offset, 0, []
        self.take("{")
        while self.peek() != "}":
            key = self.key()
            if key == "data" and self.peek() == "[" and not any(k in LISTS for k, _ in beside):
                self.take("[")
                if self.peek() == "{":
                    for key, value in beside:
                        self.not_read += check_file_key(self.path, key, value)
                    return "data", self.offset, tuple(self.not_read)
                raise _NotWhole("'data' is no list of conversations")
            beside.append((key, self.value_of_key()))
            if self.peek() == ",":
                self.take(",")
        return ("objects", start, ()) if self.line_breaks else ("lines", 0, ())

    def items(self, shape, number):
        """(bytes of an item, offset behind it), the first being item `number` + 1.

        Behind a broken item none can be found: a ValueError then, whatever may be skipped.
        """
        try:
            if shape == "objects":
                while self.peek():
                    number += 1
                    yield self.value(), self.offset
                return
            while self.peek() != "]":
                if number:
                    self.take(",")
                    if self.peek() == "]":  # a comma after the last
                        break
                number += 1
                yield self.value(), self.offset
            self.take("]")
            while shape == "data" and self.peek() == ",":
                self.take(",")
                key = self.key()
                self.not_read += check_file_key(self.path, key, self.value_of_key())
            if shape == "data":
                self.take("}")
            if self.peek():
                one = "array" if shape == "array" else "object with 'data'"
                raise _NotWhole(f"something follows the one {one} that a file may be")
        except _NotWhole as error:
            raise ValueError(
                f"{self.path}: item {number or 1}, byte {self.offset:,}: broken JSON: {error}; "
                "what follows cannot be read"
            ) from None


DECODER = json.JSONDecoder()

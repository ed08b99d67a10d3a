"""Conversations in, packed batches out.

    {"class": "gpt4", "messages": [{"role": "user", "content": "Hello"},
                                   {"role": "assistant", "content": "Hi"}]}

becomes, in the class-conditioned template of OpenChat v3.2 (arXiv 2309.11235, section 3.2),

    tokens   <s> GPT4 User: Hello <|end_of_turn|> GPT4 Assistant: Hi <|end_of_turn|>
    weights   0   0    0      0          0         0       0      w        w

where w is the weight of the conversation's class: only what an assistant says, its end of turn
included, is learned. Every text is tokenized on its own with special tokens off, so that no
content can forge a turn.

    JSON lines -> parse_conversation -> lay_out -> memory-mapped arrays -> pack -> collate -> Batch

`python data.py FILE --model DIR` checks files and shows what would be trained on.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

import loss
from support.report import StatusLine

END_OF_TURN = "<|end_of_turn|>"
SPACES_COLLAPSE = "warning: this tokenizer makes one space of several: indentation is lost"
TEMPLATE = "openchat_v3.2"  # part of the cache key: change it with the layout
CLASS_WEIGHT = -1.0  # stored where a token takes the weight of its class

# --------------------------------------------------------------------------- one conversation


@dataclasses.dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str
    weight: float | None = None  # None: the class's for an assistant, 0 for the others


@dataclasses.dataclass(frozen=True)
class Conversation:
    source_class: str
    messages: tuple


def parse_conversation(line, classes):
    """A checked Conversation from one decoded JSON line; ValueError says what is wrong.

    Formats: {"class", "messages": [{"role", "content"}]}; OpenChat's {"items": [{"role",
    "content", "weight"}], "condition", "system"}; ShareGPT's {"class", "conversations": [{"from",
    "value"}]}. A message's own "weight", in any of them, wins over the class's.
    """
    if "messages" in line:
        messages = [parse_message(i, m) for i, m in numbered(line, "messages")]
    elif "items" in line:
        messages = [parse_message(i, m) for i, m in numbered(line, "items")]
        if line.get("system"):
            messages.insert(0, parse_message(0, {"role": "system", "content": line["system"]}))
    elif "conversations" in line:
        turns = numbered(line, "conversations")
        messages = [parse_message(i, m, "from", "value", roles=SHAREGPT_ROLES) for i, m in turns]
    else:
        raise ValueError("no 'messages' (nor OpenChat's 'items', nor ShareGPT's 'conversations')")
    _check_turns(messages)
    return Conversation(_source_class(line, classes), tuple(messages))


def _kind(value):
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value), f"{type(value).__name__} {value!r:.40}")


def numbered(line, key):
    """(1, first), (2, second) ... of the list under `key`; ValueError where it is none."""
    if not isinstance(line[key], list):
        raise ValueError(f"'{key}' must be a list, not {_kind(line[key])}")
    return enumerate(line[key], start=1)


ROLES = {role: role for role in ("system", "user", "assistant")}
SHAREGPT_ROLES = ROLES | {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # apart from 0; float32 holds sums of these


def parse_message(number, raw, role_key="role", content_key="content", roles=ROLES):
    """A checked Message; ValueError says what is wrong with message `number`."""
    if not isinstance(raw, dict):
        raise ValueError(f"message {number} must be an object, not {_kind(raw)}")
    role, content = raw.get(role_key), raw.get(content_key)
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"message {number} has role {role!r:.40}, not one of {', '.join(roles)}")
    if not isinstance(content, str):
        raise ValueError(f"message {number}: '{content_key}' must be text, not {_kind(content)}")
    role = roles[role]
    if not content.strip():
        raise ValueError("empty answer" if role == "assistant" else f"empty {role} message")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"message {number}: lone surrogate {ascii(error.object[error.start])}"
        ) from None
    weight = raw.get("weight")
    if weight is not None and not (
        type(weight) in (int, float) and (weight == 0 or LEAST_WEIGHT <= weight <= LARGEST_WEIGHT)
    ):
        raise ValueError(
            f"message {number}: weight must be 0, or a number from {LEAST_WEIGHT:g} to "
            f"{LARGEST_WEIGHT:g}, not {weight!r:.40}"
        )
    return Message(role, content, weight)


def _check_turns(messages):
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise ValueError("no assistant turn")
    if "system" in roles[1:]:
        raise ValueError("a system message after the first message")
    for number, (role, following) in enumerate(zip(roles, roles[1:], strict=False), start=1):
        if role == following:
            raise ValueError(f"messages {number} and {number + 1} are two {role} turns in a row")


def _source_class(line, classes):
    name, known = line.get("class"), ", ".join(classes)
    if name is None and line.get("condition") is not None:  # OpenChat's name of the class
        condition = line["condition"]
        for name, source in classes.items():
            if source.condition == condition:
                return name
        raise ValueError(f"condition {condition!r:.40} is of no class ({known})")
    if not isinstance(name, str):
        raise ValueError(f"'class' must be one of {known}, not {_kind(name)}")
    if name not in classes:
        raise ValueError(f"class {name!r:.40} is not in the class table ({known})")
    return name


def prefix_text(condition, role):
    """What starts a turn: 'GPT4 User:'; without a condition 'User:'; nothing for the system."""
    return "" if role == "system" else f"{condition} {role.title()}:".strip()


def lay_out(messages, contents, tokenizer, condition):
    """The tokens, in parts, and their weights [(weight, how many), ...]; `contents` are ids.

    <s>, then a turn: prefix, content, <|end_of_turn|>. Weight 0 up to the content; then the
    message's own, CLASS_WEIGHT where it has none and is the assistant's.
    """
    parts, weights = [[tokenizer.bos]], [(0.0, 1)]
    for message, content in zip(messages, contents, strict=True):
        prefix = tokenizer.prefix(condition, message.role)
        weight = message.weight
        if weight is None or message.role == "system":
            weight = CLASS_WEIGHT if message.role == "assistant" else 0.0
        parts += [prefix, content, [tokenizer.eot]]
        weights += [(0.0, len(prefix)), (float(weight), len(content) + 1)]
    return parts, weights


def encode(conversation, tokenizer, classes):
    """(tokens, supervised mask), two lists of one length, of a JSON line or a Conversation."""
    classes = loss.class_table(classes)
    if not isinstance(conversation, Conversation):
        conversation = parse_conversation(conversation, classes)
    contents = [tokenizer.encode(message.content) for message in conversation.messages]
    condition = classes[conversation.source_class].condition
    parts, weights = lay_out(conversation.messages, contents, tokenizer, condition)
    return flat(parts), [weight != 0 for weight, count in weights for _ in range(count)]


def encode_prompt(messages, tokenizer, condition):
    """The tokens after which the model answers: all turns, then 'GPT4 Assistant:'."""
    contents = [tokenizer.encode(message.content) for message in messages]
    parts, _ = lay_out(messages, contents, tokenizer, condition)
    return flat(parts) + tokenizer.prefix(condition, "assistant")


def flat(parts):
    return [token for part in parts for token in part]


# --------------------------------------------------------------------------------- tokenizer


class Tokenizer:
    """The SentencePiece model of a Hugging Face folder, with an end-of-turn token.

    <|end_of_turn|> is the folder's own where it has one (a control symbol of tokenizer.model, or
    an added token), and otherwise the id after the last piece: `vocab_size` then exceeds the
    checkpoint's.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / "tokenizer.model"
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: not found; a folder on this machine is needed, not a name")
        if not path.is_file():
            raise ValueError(f"{path}: not found; a SentencePiece tokenizer.model is needed")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from None
        count = self.pieces.vocab_size()
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        if self.bos < 0:
            raise ValueError(f"{path}: has no <s> (beginning of sequence) token")
        self._check_kind(path)
        self.added = self._added_tokens()
        own = self.pieces.piece_to_id(END_OF_TURN)
        if self.pieces.id_to_piece(own) == END_OF_TURN:
            self.eot = own
        else:
            self.eot = self.added.get(END_OF_TURN, max([count - 1, *self.added.values()]) + 1)
        self.eot_is_new = self.eot != own and END_OF_TURN not in self.added
        if self.eot < count and not self.pieces.is_control(self.eot):
            raise ValueError(
                f"{path}: {END_OF_TURN} must be a control symbol; as it is, any text can forge it"
            )
        self.vocab_size = max([count - 1, self.eot, *self.added.values()]) + 1
        # SentencePiece's remove_extra_whitespaces: a text's indentation is lost.
        self.collapses_spaces = self.pieces.normalize("a  b ") == "▁a▁b"
        self._prefixes = {}

    def _check_kind(self, path):
        """ValueError for what `_tokenizer_json` cannot express."""
        scores = (self.pieces.get_score(i) for i in range(self.pieces.vocab_size()))
        if any(score != int(score) for score in scores):  # BPE's are ranks, others' are logarithms
            raise ValueError(f"{path}: is not a BPE model; no other kind is implemented")
        if self.pieces.normalize("ﬁ") != "▁ﬁ":
            raise ValueError(
                f"{path}: normalizes text (NFKC), or puts no space before it; not implemented"
            )

    def _added_tokens(self):
        """{content: id} of tokens beyond tokenizer.model, from the two files that list them."""
        found = {}
        for file in ("added_tokens.json", "tokenizer_config.json"):
            path = self.folder / file
            if not path.exists():
                continue
            try:
                raw = json.loads(path.read_text(encoding="utf-8"))
                if file == "tokenizer_config.json":
                    decoder = raw.get("added_tokens_decoder", {})
                    raw = {token["content"]: int(number) for number, token in decoder.items()}
                found.update(raw.items())
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}: cannot be read: {error!r}") from None
        if any(type(number) is not int or not 0 <= number < 1 << 22 for number in found.values()):
            raise ValueError(f"{self.folder}: an added token's id is not a whole number in range")
        return found

    def encode(self, text):
        """Ids of a text on its own, special tokens off: '<s>' in it is three characters."""
        return self.pieces.encode(text)

    def encode_many(self, texts):
        """Ids of each text, as int32 arrays."""
        return self.pieces.encode(texts, num_threads=1, return_type="numpy")

    def decode(self, tokens):
        """Text of ids; end-of-turn and other special tokens give none."""
        return self.pieces.decode([int(t) for t in tokens if t < self.pieces.vocab_size()])

    def prefix(self, condition, role):
        key = condition, role
        if key not in self._prefixes:
            self._prefixes[key] = self.encode(prefix_text(condition, role))
        return self._prefixes[key]

    def check_vocabulary(self, rows):
        """ValueError unless a checkpoint of `rows` embeddings can be this tokenizer's."""
        count = self.pieces.vocab_size()
        if not max(count, self.vocab_size - 1024) <= rows <= max(count, self.vocab_size) + 1024:
            raise ValueError(
                f"{self.folder}: tokenizer.model has {count} pieces, config.json's vocab_size is "
                f"{rows}: this tokenizer belongs to another checkpoint"
            )

    def save(self, folder, condition):
        """Write the tokenizer for transformers and vLLM, with a chat template that gives our ids.

        The template's default condition is `condition`; apply_chat_template(..., condition="GPT3")
        selects another.
        """
        folder = Path(folder)
        shutil.copyfile(self.folder / "tokenizer.model", folder / "tokenizer.model")
        names = map(self.pieces.id_to_piece, range(self.pieces.vocab_size()))
        tokens = {i: text for i, text in enumerate(names) if self._special(i)}
        tokens |= {i: text for text, i in self.added.items()} | {self.eot: END_OF_TURN}
        special = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        special["special"] = True
        added = {i: {"content": text} | special for i, text in sorted(tokens.items())}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.pieces.id_to_piece(self.bos),
            "eos_token": END_OF_TURN,
            "unk_token": self.pieces.id_to_piece(self.pieces.unk_id()),
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(i): token for i, token in added.items()},
            "chat_template": CHAT_TEMPLATE.replace(
                "'CONDITION'", json.dumps(condition, ensure_ascii=False)
            ),
        }
        _write_json(folder / "tokenizer_config.json", config)
        _write_json(folder / "tokenizer.json", self._tokenizer_json(added))

    def _special(self, i):
        return self.pieces.is_control(i) or self.pieces.is_unknown(i)

    def _tokenizer_json(self, added):
        """The SentencePiece BPE model in the format of Hugging Face's tokenizers.

        A merge is every split of a piece into two pieces, ordered by the piece's score, which for
        BPE is minus its rank.
        """
        pieces, count = self.pieces, self.pieces.vocab_size()
        vocabulary = {pieces.id_to_piece(i): i for i in range(count)}
        merges = []
        for piece, i in vocabulary.items():
            if self._special(i) or pieces.is_byte(i) or pieces.is_unused(i):
                continue
            splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
            splits = [s for s in splits if s[0] in vocabulary and s[1] in vocabulary]
            splits.sort(key=lambda s: (vocabulary[s[0]], vocabulary[s[1]]))
            merges += [(-pieces.get_score(i), split) for split in splits]
        merges.sort(key=lambda merge: merge[0])
        replace = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        if self.collapses_spaces:
            trim = {"type": "Replace", "pattern": {"Regex": r"\A +|[ ▁]+\z"}, "content": ""}
            collapse = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
            replace = [trim, collapse, *replace]
        decoders = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]
        model = {
            "type": "BPE",
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "fuse_unk": True,
            "byte_fallback": any(pieces.is_byte(i) for i in range(count)),
            "vocab": vocabulary,
            "merges": [list(split) for _, split in merges],
        }
        return {
            "version": "1.0",
            "added_tokens": [{"id": i} | token for i, token in added.items()],
            "normalizer": {"type": "Sequence", "normalizers": replace},
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }


# The template in Jinja. The space after the colon is SentencePiece's own at the start of a text.
CHAT_TEMPLATE = (
    "{% set condition = condition | default('CONDITION') %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}{{ (condition + ' ' + m['role'].title()).strip() + ': ' + m['content'] }}{% endif %}"
    "{{ '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ (condition + ' Assistant:').strip() }}{% endif %}"
)


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------- files to arrays

LONGEST_LINE = 16 << 20  # bytes
SHOWN_PROBLEMS = 20
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
        super().__init__(f"{count} bad lines:\n" + "\n".join(problems) + more + hint)


def prepare(
    paths, tokenizer, classes, folder, *, max_length, condition=True, skip_bad=False, report=None
):
    """Tokenize JSONL files once into memory-mapped arrays below `folder`; returns a Dataset.

    The arrays are keyed by the content of data, tokenizer and template. Reads in a stream; a run
    that was killed goes on at its last whole block. `condition=False` leaves the class out of the
    prompt. `report(done bytes, all bytes, conversations)` is called as it goes. Raises BadData
    after all files were checked, unless `skip_bad`.
    """
    classes = loss.class_table(classes)
    paths = [Path(path) for path in paths]
    sizes = [_size(path) for path in paths]
    conditions = {name: c.condition for name, c in classes.items()}
    settings = [TEMPLATE, conditions, condition, max_length, skip_bad]
    folder = Path(folder) / _cache_key(paths, tokenizer, settings)
    if (folder / "done.json").exists():
        return Dataset(folder, paths)
    if not condition:
        conditions = dict.fromkeys(conditions, "")
    encoder = Encoder(tokenizer, classes, conditions, max_length)
    with _Arrays(folder) as arrays:
        state = arrays.state
        for block, encoded in encode_blocks(blocks(paths, state), encoder, sum(sizes)):
            arrays.append(block, *encoded)
            if report:
                done = sum(sizes[: state["file"]]) + state["offset"]
                report(done, sum(sizes), state["conversations"])
        refused = state["bad"] and not skip_bad
        if state["conversations"] and not refused:
            arrays.commit("done.json")
            return Dataset(folder, paths)
    shutil.rmtree(folder)
    if refused:
        raise BadData(state["problems"], state["bad"])
    names, lost = ", ".join(map(str, paths)), state["without_answer"]
    cut = f"; {lost} lost their answer at {max_length} tokens" if lost else ""
    raise ValueError(f"{names}: no conversation to train on{cut}")


def _size(path):
    try:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _cache_key(paths, tokenizer, settings):
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in [tokenizer.folder / "tokenizer.model", *paths]:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update(json.dumps([tokenizer.bos, tokenizer.eot]).encode())
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


def parse_line(raw, classes):
    """A Conversation, or None for an empty line; ValueError says what is wrong."""
    line = parse_json(raw)
    return None if line is None else parse_conversation(line, classes)


def parse_json(raw):
    """The JSON object of a line of `lines`, None of a blank one; ValueError says what is wrong."""
    if raw is None:
        raise ValueError(f"longer than {LONGEST_LINE >> 20} MiB")
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte {error.start + 1}: {error.reason}") from None
    if not text:
        return None
    try:
        line = json.loads(text)
    except RecursionError:
        raise ValueError("broken JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(line, dict):
        raise ValueError(f"a line must be a JSON object, not {_kind(line)}")
    return line


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


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes arrays of a Block of lines."""

    tokenizer: Tokenizer
    classes: dict
    conditions: dict  # {class: condition}
    max_length: int

    def __call__(self, block):
        """(arrays as ARRAYS, {what was counted}, the first bad lines); rows start at this block."""
        conversations, bad, problems = self._parse(block)
        texts = [m.content for _, conversation in conversations for m in conversation.messages]
        ids = iter(self.tokenizer.encode_many(texts) if texts else [])
        names = list(self.classes)
        counted = {"cut": 0, "tokens_cut": 0, "without_answer": 0, "bad": bad}
        all_tokens, all_weights, rows = [], [], []
        for line, conversation in conversations:
            contents = [next(ids) for _ in conversation.messages]
            condition = self.conditions[conversation.source_class]
            parts, weights = lay_out(conversation.messages, contents, self.tokenizer, condition)
            tokens = np.concatenate(parts)[: self.max_length]
            values, counts = zip(*weights)
            weights = np.repeat(np.float32(values), counts)
            lost = max(0, len(weights) - self.max_length)
            counted["cut"] += lost > 0
            counted["tokens_cut"] += lost
            weights = weights[: self.max_length]
            supervised, own = np.count_nonzero(weights == CLASS_WEIGHT), weights[weights > 0]
            if not supervised and not len(own):
                counted["without_answer"] += 1
                continue
            source_class = names.index(conversation.source_class)
            learned = supervised, len(own), own.sum(dtype=np.float64)
            rows.append((0, len(tokens), source_class, *learned, block.file, line))
            all_tokens.append(tokens)
            all_weights.append(weights)
        index = np.array(rows, INDEX)
        index["start"] = np.cumsum(index["length"]) - index["length"]
        arrays = {
            "tokens": np.concatenate(all_tokens or [[]]).astype(ARRAYS["tokens"]),
            "weights": np.concatenate(all_weights or [[]]).astype(ARRAYS["weights"]),
            "index": index,
        }
        return arrays, counted, problems

    def _parse(self, block):
        """([(line, conversation), ...], number of bad lines, what is wrong with the first)."""
        conversations, bad, problems = [], 0, []
        for line, raw in enumerate(block.raw, start=block.line + 1):
            try:
                if conversation := parse_line(raw, self.classes):
                    conversations.append((line, conversation))
            except ValueError as error:
                bad += 1
                problems += [f"{block.path}:{line}: {error}"][: SHOWN_PROBLEMS - len(problems)]
        return conversations, bad, problems


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

    def where(self, conversation):
        """file:line of a conversation, for messages."""
        row = self.index[conversation]
        return f"{self.paths[row['file']]}:{row['line']}"


# ----------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """One micro-batch of one rank: whole conversations end to end, T tokens.

    `rows` (N,) are the positions whose next token is learned: targets (N,) is that token,
    weights (N,) float32 its weight, classes (N,) the number of its conversation's class.
    """

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, from 0 in each conversation
    cu_seqlens: torch.Tensor  # (B + 1,) int32
    rows: torch.Tensor  # (N,) int64
    targets: torch.Tensor  # (N,) int64
    weights: torch.Tensor  # (N,) float32
    classes: torch.Tensor  # (N,) int64


def collate(dataset, conversations, class_weights, shape=None):
    """The Batch of some conversations; class_weights (classes,), or None for no reward.

    No conversation at all gives one token of weight 0, so that its rank can take part. `shape` =
    (tokens, offsets, longest) pads to a fixed number of tokens and of cu_seqlens, so that a
    compiled network sees one shape; the padding forms conversations of its own, of weight 0 and
    at most `longest` tokens.
    """
    rows = dataset.index[np.asarray(conversations, dtype=np.int64)]
    spans = [slice(row["start"], row["start"] + row["length"]) for row in rows]
    lengths = rows["length"].tolist()
    tokens = np.concatenate([dataset.tokens[s] for s in spans] or [[]]).astype(np.int64)
    weights = np.concatenate([dataset.weights[s] for s in spans] or [[]]).astype(np.float32)
    classes = np.repeat(rows["source_class"], lengths)
    if class_weights is None:
        weights = (weights != 0).astype(np.float32)
    else:
        by_class = class_weights[classes]
        weights = np.where(weights == CLASS_WEIGHT, by_class, weights).astype(np.float32)
    # Position t learns token t + 1. A conversation's first token has weight 0: none looks across.
    predicted = np.flatnonzero(weights)
    targets, weights, classes = tokens[predicted], weights[predicted], classes[predicted]
    if shape:
        capacity, offsets, longest = shape
        padding = capacity - len(tokens)
        lengths += [longest] * (padding // longest) + [padding % longest]
        lengths += [0] * (offsets - 1 - len(lengths))
        tokens = np.pad(tokens, (0, padding))
    if not len(tokens):
        tokens, lengths = np.zeros(1, dtype=np.int64), [1]
    ends = np.cumsum([0, *lengths])
    positions = np.arange(len(tokens)) - np.repeat(ends[:-1], lengths)
    arrays = (tokens, positions, ends.astype(np.int32), predicted - 1, targets)
    tensors = [torch.from_numpy(array) for array in arrays]
    tensors += [torch.from_numpy(weights), torch.from_numpy(classes.astype(np.int64))]
    return Batch(*tensors)


# ----------------------------------------------------------------------------------- packing

WINDOW = 2048  # conversations packed together: enough choice for bins both full and even
AT_ONCE = 128  # windows filled side by side, while 128 x 400 bins stay in the cache
SPARE = 0.004  # share of its capacity that a full bin may leave empty


def pack(lengths, capacity, bins_per_step, seed, epoch):
    """Bins of whole conversations for every optimizer step: steps[k][b] is an array of indices.

    Rank r of R takes bins r, r + R, ... of a step. Every conversation comes exactly once an epoch,
    no bin exceeds `capacity` tokens, and nothing but the arguments decides the result.

    A random permutation is cut into windows of about 2,048 conversations (at least a step), so
    that every step is a random sample of the data. Within a window, longest first, a conversation
    goes where it fills a bin to 99.6 % without making it the dearest, else into the cheapest bin
    with room; a bin costs Σ len², its attention. The 0.3 % without room join later windows. The
    last step takes the rest, evenly; only there can a bin be empty.

    On ShareGPT's lengths (at most 2048), 8 bins of 8192 a step: 99.7 % full, the dearest bin
    1.02 x the mean, 1M conversations in 2 s (bench/packing.py). A bin of only one or two of the
    longest conversations cannot be evened: with bins of 4096 the dearest is 1.14 x the mean.

    Raises ValueError at a length outside 1..capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    bad = np.flatnonzero((lengths < 1) | (lengths > capacity))
    if len(bad):
        raise ValueError(
            f"conversation {bad[0]} has {lengths[bad[0]]} tokens; a bin takes 1 to {capacity}"
        )
    rng = np.random.default_rng([seed, epoch])
    todo = rng.permutation(len(lengths))
    step_tokens = bins_per_step * capacity
    window_tokens = WINDOW * lengths.sum() / max(1, len(lengths))
    window_bins = bins_per_step * max(1, round(window_tokens / step_tokens))
    indices, sizes, full_steps = [], [], 0
    while len(todo):
        tokens = np.cumsum(lengths[todo])
        steps = int(tokens[-1]) // step_tokens  # 0: what is left is the last, partial step
        bins = min(window_bins, steps * bins_per_step) or bins_per_step
        # Half of what is left at a time: leftovers then mix with as many fresh conversations.
        windows = min(max(1, steps * bins_per_step // bins // 2), AT_ONCE)
        ends = np.searchsorted(tokens, np.arange(1, windows + 1) * bins * capacity, side="right")
        now, later = todo[: ends[-1]], todo[ends[-1] :]
        chosen = choose_bins(lengths[now], ends, bins, capacity, 2 if steps else 1, rng)
        placed = chosen < windows * bins
        indices.append(now[np.argsort(chosen, kind="stable")][: placed.sum()])
        sizes.append(np.bincount(chosen[placed], minlength=windows * bins))
        full_steps += windows * bins // bins_per_step if steps else 0
        todo = rng.permutation(np.concatenate([now[~placed], later]))
    ends = np.cumsum(np.concatenate(sizes or [todo]))
    bins = np.split(np.concatenate(indices or [todo]), ends[:-1])
    order = [*rng.permutation(full_steps), *range(full_steps, len(ends) // bins_per_step)]
    return [bins[k * bins_per_step : (k + 1) * bins_per_step] for k in order]


def choose_bins(lengths, ends, bins, capacity, power, rng):
    """The bin of each conversation, or len(ends) * bins where its window has no room left.

    Window w is lengths[ends[w - 1]:ends[w]] and owns the `bins` bins from w * bins. All windows
    move together: table[m, w] is the m-th longest of window w, 0 past its end. The cost of a bin
    is Σ len ** power: 2, attention, for full bins; 1 to spread the tokens of the last step.
    """
    window = np.searchsorted(ends, np.arange(len(lengths)), side="right")
    longest_first = np.lexsort((-lengths, window))
    m = np.arange(len(lengths)) - np.concatenate([[0], ends])[window]
    table = np.zeros((m.max() + 1, len(ends)), dtype=np.float32)
    table[m, window] = lengths[longest_first]
    chosen = np.full(table.shape, len(ends) * bins)
    rows = np.arange(len(ends))
    gap = np.full((len(ends), bins), capacity, dtype=np.float32)
    cost = np.zeros_like(gap)
    dearest = (1.03 * (table**power).sum(0, dtype=np.float64) / bins).astype(np.float32)
    # Ties favour low columns: without new names rank 0 would get the longest conversations.
    names = rng.permuted(np.arange(gap.size).reshape(gap.shape), axis=1)
    for length, choice in zip(table, chosen):
        added = length**power
        room = gap - length[:, None]
        fills = (room <= SPARE * capacity) & (cost <= (dearest - added)[:, None])
        score = np.where(fills, -1, cost)
        score[room < 0] = np.inf
        best = score.argmin(1)
        fits = score[rows, best] < np.inf
        choice[fits] = names[rows, best][fits]
        gap[rows, best] -= fits * length
        cost[rows, best] += fits * added
        dearest = np.maximum(dearest, cost[rows, best])
    where = np.empty(len(lengths), dtype=np.int64)
    where[longest_first] = chosen[m, window]
    return where


# ----------------------------------------------------------------------------------- preview


def summary(dataset, classes, class_weights):
    """Lines of text: by class, conversations, tokens, what is supervised, its weight and share."""
    index, report = dataset.index, dataset.report
    total = dataset.total_weight(slice(None), class_weights) or 1.0
    out = [
        f"{'class':14} {'condition':14} {'conversations':>13} {'tokens':>12} {'supervised':>12} "
        f"{'w':>8} {'weight mass':>11}"
    ]
    for number, (name, source) in enumerate(classes.items()):
        of = np.flatnonzero(index["source_class"] == number)
        mass = dataset.total_weight(of, class_weights) / total
        supervised = dataset.total_weight(of, None)
        weight = 1.0 if class_weights is None else class_weights[number]
        tokens = int(index["length"][of].sum())
        out.append(
            f"{name:14} {source.condition:14} {len(of):13,} {tokens:12,} {supervised:12,.0f} "
            f"{weight:8.4g} {mass:11.1%}"
        )
    lengths = dataset.lengths
    quantiles = ", ".join(f"{q}% {np.percentile(lengths, q):.0f}" for q in (50, 90, 99))
    out.append(
        f"tokens a conversation: mean {lengths.mean():.1f}, {quantiles}, longest {lengths.max()}"
    )
    if report["cut"]:
        out.append(
            f"cut at the maximum length: {report['cut']:,} conversations, "
            f"{report['tokens_cut']:,} tokens lost"
        )
    if report["without_answer"]:
        out.append(f"dropped, no answer left to learn: {report['without_answer']:,} conversations")
    if report["bad"]:
        out.append(
            f"dropped as bad (--skip-bad): {report['bad']:,} lines, the first "
            f"{report['problems'][0]}"
        )
    return out


def preview(dataset, conversation, tokenizer, classes, class_weights, colour):
    """One conversation as the model reads it: what is learned stands out, with its weight."""
    batch = collate(dataset, [conversation], class_weights)
    weights = np.zeros(len(batch.tokens))
    weights[batch.rows.numpy() + 1] = batch.weights.numpy()
    name = list(classes)[dataset.index["source_class"][conversation]]
    out = [f"{dataset.where(conversation)}  class {name}, {len(weights)} tokens"]
    text, tokens = "", batch.tokens.tolist()
    bounds = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(tokens)]
    for low, high in zip(bounds, bounds[1:], strict=False):
        run = visible(tokens[low:high], tokenizer)
        weight = weights[low]
        if not weight:
            text += f"\033[2m{run}\033[0m" if colour else run
        elif colour:
            text += (
                f"\033[{'1;32' if weight == 1 else '33'}m{run}\033[0m\033[7m w={weight:.3g} \033[0m"
            )
        else:
            text += f"⟦{run}⟧w={weight:.3g} "
    return out + [text.replace(END_OF_TURN, END_OF_TURN + "\n").rstrip("\n"), ""]


def visible(tokens, tokenizer):
    """Text of ids with the special tokens written out."""
    names = {tokenizer.bos: "<s>", tokenizer.eos: "</s>", tokenizer.eot: END_OF_TURN}
    text, plain = "", []
    for token in [*tokens, None]:
        if token is not None and token not in names:
            plain.append(token)
            continue
        if plain:
            space = tokenizer.pieces.id_to_piece(plain[0]).startswith("▁")
            shown = tokenizer.decode(plain)
            # No escape sequence of a file reaches the terminal.
            shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in shown)
            text, plain = text + " " * space + shown, []
        text += names.get(token, "")
    return text


def clock(seconds):
    seconds = int(seconds)
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Progress:
    """'tokenizing [#####     ]  21%, 12,000 conversations, 3.1 MB/s, 0:42 left', as prepare() goes:

    one line refreshed on a terminal, else one every 30 seconds.
    """

    def __init__(self, label):
        self.label, self.started = label, time.time()
        self.line = StatusLine(sys.stderr, seconds=30)

    def __call__(self, done, total, count):
        seconds, share = time.time() - self.started, max(done, 1) / max(total, 1)
        if seconds >= 1:
            self.line.refresh(
                f"{self.label} [{'#' * int(24 * share):24}] {share:4.0%}, {count:,} conversations, "
                f"{done / seconds / 1e6:.1f} MB/s, {clock(seconds / share - seconds)} left",
                final=done == total,
            )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="data.py", description="Check conversations and show what would be trained on."
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="JSON lines: one conversation a line")
    add("--model", required=True, metavar="DIR", help="folder with tokenizer.model")
    add("--classes", metavar="C", help='JSON: {"gpt4": {"condition": "GPT4", "reward": 1.0}, ...}')
    add("--beta", type=float, default=0.4343, help="w = exp((reward - best reward) / beta)")
    add("--max-length", type=int, default=4096, help="tokens; longer conversations are cut")
    add("--batch-tokens", type=int, default=8192, help="tokens a bin, for the packing's figures")
    add("--ranks", type=int, default=1, help="bins a step, for the packing's figures")
    add("--show", type=int, default=4, metavar="N", help="conversations to show")
    add("--skip-bad", action="store_true", help="drop bad lines and count them")
    args = parser.parse_args(argv)
    try:
        run_preview(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def run_preview(args):
    if (
        min(args.max_length, args.batch_tokens, args.ranks) < 1
        or args.max_length > args.batch_tokens
    ):
        raise ValueError("needs 1 <= --max-length <= --batch-tokens and --ranks of at least 1")
    classes = loss.read_classes(args.classes) if args.classes else loss.DEFAULT_CLASSES
    tokenizer = Tokenizer(args.model)
    weights = np.array(list(loss.class_weights(classes, args.beta).values()))
    with tempfile.TemporaryDirectory() as folder:
        dataset = prepare(
            args.files, tokenizer, classes, folder,
            max_length=args.max_length, skip_bad=args.skip_bad, report=Progress("tokenizing"),
        )  # fmt: skip
        print("\n".join(summary(dataset, classes, weights)))
        if tokenizer.collapses_spaces:
            print(SPACES_COLLAPSE)
        steps = pack(dataset.lengths, args.batch_tokens, args.ranks, seed=0, epoch=0)
        fill = dataset.lengths.sum() / (len(steps) * args.ranks * args.batch_tokens)
        shape = f"{args.ranks} x {args.batch_tokens:,} tokens"
        print(f"packing: {len(steps):,} steps of {shape}, {fill:.2%} full")
        print("\nnot learned: dim; learned: bright, with its weight w\n" if sys.stdout.isatty() else
              "\nlearned: ⟦between these⟧, with its weight w\n")  # fmt: skip
        for conversation in varied(dataset, args.show):
            print(
                "\n".join(
                    preview(dataset, conversation, tokenizer, classes, weights, sys.stdout.isatty())
                )
            )


def varied(dataset, count):
    """Indices of the first conversations of each class in turn."""
    by_class = [
        np.flatnonzero(dataset.index["source_class"] == c)
        for c in range(dataset.index["source_class"].max() + 1)
    ]
    turns = [of[i] for i in range(count) for of in by_class if i < len(of)]
    return turns[:count]


if __name__ == "__main__":
    main()

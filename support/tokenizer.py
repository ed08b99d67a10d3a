"""A model's tokenizer with an end-of-turn token; and the same in Hugging Face's form.

    tokenizer.model          SentencePiece, as Llama 2's and Mistral's
    tokenizer.json, without  the same in Hugging Face's form, or a byte-level BPE, as Llama 3's

Every text is encoded on its own with special tokens off, so that no content can forge a turn.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from model import check_folder, write_json
from model import read_json as read_object
from support.sentencepiece_merges import REFUSED, exact_merges

END_OF_TURN = "<|end_of_turn|>"
SPACES_COLLAPSE = "warning: this tokenizer turns several spaces into one: indentation is lost"


class Template(NamedTuple):
    """A turn: before + "GPT4 User" + after + space + content + end; `tokens` of it are special."""

    name: str  # data tokenized under another is not taken
    before: str
    after: str
    space: str
    end: str
    tokens: tuple

    def prefix(self, condition, role):
        """Text of what starts a turn; the system has no condition, and in v3.2 no prefix."""
        if role == "system":
            return self.before and f"{self.before}System{self.after}"
        return self.before + f"{condition} {role.title()}".strip() + self.after


START, MIDDLE, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"  # Llama 3's
V32 = Template("openchat_v3.2", "", ":", " ", END_OF_TURN, (END_OF_TURN,))
V36 = Template("openchat_3.6", START, MIDDLE + "\n\n", "", EOT, (START, MIDDLE, EOT))


def Tokenizer(folder):
    """The tokenizer of a Hugging Face folder: one of the three kinds below."""
    path, beside = Path(folder, SentencePiece.file), Path(folder, ByteLevel.file)
    if not beside.exists() or (path.exists() and not is_tiktoken(path)):
        return SentencePiece(folder)
    given, raw = read_json(beside)
    types = [step["type"] for step in (raw["model"], raw["decoder"] or NOTHING, raw["steps"][-1])]
    kind = ByteLevel if types == ["BPE", "ByteLevel", "ByteLevel"] else SentencePieceJson
    return kind(folder, given, raw)


def is_tiktoken(path):
    """Is it a list of lines "base64 number", as tokenizer.model in Meta's own Llama 3 folders?"""
    return path.is_file() and re.match(rb"[A-Za-z0-9+/]+=* \d+\s", path.read_bytes()) is not None


def read_json(path):
    """The package's tokenizer of a file, and all that it says, defaults filled in."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is a process per core already
    try:
        import tokenizers as package

        given = package.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install tokenizers") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a bare Exception, or a panic of Rust, which is none
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    raw = json.loads(given.to_str())
    raw["normalizer"] = None if raw["normalizer"] == sequence([]) else raw["normalizer"]
    before = raw["pre_tokenizer"] or NOTHING
    raw["steps"] = before.get("pretokenizers") or [before]  # of the splitting before any merge
    return given, raw


class OfFolder:
    """The tokenizer of a Hugging Face folder, with an end-of-turn token.

    <|end_of_turn|> is the folder's own if it has one (a control symbol of tokenizer.model, or an
    added token), and otherwise the id after the last piece: `vocab_size` then exceeds the
    checkpoint's. Its row begins as the mean of those before `ordinary`, and so do the rows of
    `marks`, a turn's own tokens, if the checkpoint never trained them. `names` {id: text} are the
    special tokens of a conversation; `warning` is what every text loses here, or None. With Llama
    3's tokens the template is OpenChat 3.6's, else v3.2's. A character that the vocabulary lacks
    is the token `unk`; its bytes in `missing` give no token. `symbols` {text: id} are no special
    tokens, and matched in a text before any merge.
    """

    warning, template, marks, unk, missing, symbols = None, V32, (), -1, b"", {}

    def __reduce__(self):  # a pickle of the package's tokenizer forgets encode_special_tokens
        return Tokenizer, (self.folder,)

    def _refuse(self, what):
        raise ValueError(f"{self.folder / self.file}: {what}")

    def _set_pieces(self, texts):
        """The pieces' texts, by id, and the folder's added tokens."""
        self.texts, self.count, self._prefixes = texts, len(texts), {}
        self.added, self.special = self._added_tokens(texts.__getitem__)

    def _set_ends(self, bos, eos):
        """The beginning of a sequence, its end, and the end of a turn."""
        self.bos, self.eos = bos, eos
        if bos < 0:
            self._refuse("has no <s>, or no bos_token (beginning of sequence) in "
                         "tokenizer_config.json, nor its id in config.json")  # fmt: skip
        end, last = self.template.end, max([self.count - 1, *self.added.values()])
        own = {text: i for i, text in enumerate(self.texts)} | self.added
        self.eot, self.eot_is_new = own.get(end, last + 1), end not in own
        if self.eot < self.count and self.eot not in self.control:
            self._refuse(f"{end} must be a control symbol; as it is, any text can forge it")
        self.vocab_size = max(last, self.eot) + 1
        self.ordinary = self.eot if self.eot_is_new else self.vocab_size
        by_id = {i: text for text, i in own.items()} | {self.eot: end}
        self.names = {i: by_id[i] for i in {bos, eos, self.eot, *self.marks} - {-1}}
        for symbol in self.symbols:
            ends = [symbol[k:] for k in range(1, len(symbol))]
            if {" ", "▁"} & {*symbol} or any(map(end.startswith, ends)):
                self._refuse(f"never splits {symbol!r}, which has a space or ends as {end} begins"
                             f": the export would give other ids; {REFUSED}")  # fmt: skip

    def lost_bytes(self, texts):
        """How many bytes of the texts give no token."""
        encoded = [text.encode() for text in texts] if self.missing else []
        return sum(len(text) - len(text.translate(None, self.missing)) for text in encoded)

    def prefix(self, condition, role):
        key = condition, role
        if key not in self._prefixes:
            self._prefixes[key] = self._prefix(condition, role)
        return self._prefixes[key]

    def check_vocabulary(self, rows):
        """ValueError unless a checkpoint of `rows` embeddings can be this tokenizer's."""
        count = self.count
        if not max(count, self.vocab_size - 1024) <= rows <= max(count, self.vocab_size) + 1024:
            raise ValueError(
                f"{self.folder}: {self.file} has {count} pieces, config.json's vocab_size is "
                f"{rows}: this tokenizer belongs to another checkpoint"
            )

    def identity(self):
        """Text that changes with the ids it gives."""
        with open(self.folder / self.file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{digest} {self.bos} {self.eot}"

    def _read(self, file):
        """The JSON object of a file in the folder; {} if it has none."""
        path = self.folder / file
        return read_object(path) if path.exists() else {}

    def _added_tokens(self, piece):
        """{content: id} of tokens beyond the model's own, and which of them are special.

        From the three files that list them; ValueError where two files disagree on an id.
        """
        by_id, by_content, special = {}, {}, set()
        for file in ADDED_FILES:
            path, raw = self.folder / file, self._read(file)
            try:
                tokens = ADDED_FILES[file](raw)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}: cannot be read: {error!r}") from None
            for content, number, is_special in tokens:
                if type(content) is not str or type(number) is not int or not 0 <= number < 1 << 22:
                    raise ValueError(f"{path}: an added token's id is not a whole number in range")
                own = (piece(number), self.file) if number < self.count else (content, file)
                of_id = by_id.setdefault(number, own)
                of_content = by_content.setdefault(content, (number, file))
                if of_id[0] != content:
                    raise ValueError(
                        f"{path}: gives id {number} to {content!r}, {of_id[1]} to {of_id[0]!r}"
                    )
                if of_content[0] != number:
                    raise ValueError(
                        f"{path}: gives {content!r} the id {number}, {of_content[1]} gives it "
                        f"{of_content[0]}"
                    )
                special |= {content} if is_special else set()
        return {content: number for content, (number, _) in by_content.items()}, special

    def _named(self, key):
        """The id of a token that tokenizer_config.json names, or config.json has; or -1."""
        text = self._read("tokenizer_config.json").get(key)
        if text is None:
            number = self._read("config.json").get(f"{key}_id")
            number = number[0] if isinstance(number, list) and number else number
            return number if number in self.added.values() else -1
        return self.added.get(str(text.get("content") if isinstance(text, dict) else text), -1)

    def _write(self, folder, condition, tokens, config, chat_template):
        """Write tokenizer_config.json; returns the added `tokens` {id: text} as it has them."""
        added = {
            i: {"content": text} | PLAIN | {"special": text not in self.symbols}
            for i, text in sorted(tokens.items())
        }
        lead, texts = " " if self.symbols else "", self.template._asdict()  # see _hugging_face
        texts |= {"lead": lead, "before": lead + self.template.before, "condition": condition}
        for name, text in (texts | {"system": self.template.prefix("", "system")}).items():
            text = json.dumps(text, ensure_ascii=False)
            chat_template = chat_template.replace(f"'{name.upper()}'", text)
        config = config | {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "padding_side": "left",  # answers go on from the right end
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(i): token for i, token in added.items()},
            "chat_template": chat_template,
        }
        write_json(folder / "tokenizer_config.json", config)
        return added


class SentencePiece(OfFolder):
    """tokenizer.model; SentencePiece itself puts a space before every text."""

    file, collapses_spaces = "tokenizer.model", False

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / self.file
        check_folder(folder)
        if not path.is_file():
            self._refuse("not found, nor a tokenizer.json beside it")
        if is_tiktoken(path):
            self._refuse("of tiktoken; the model's tokenizer.json is needed beside it")
        try:
            self.pieces = pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from None
        texts = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
        merges, self.symbols, self.collapses_spaces = exact_merges(path, pieces)
        self.warning = SPACES_COLLAPSE if self.collapses_spaces else None
        self.unk = pieces.unk_id()
        self.control = {i: texts[i] for i in range(len(texts)) if pieces.is_control(i)}
        self.control[self.unk] = texts[self.unk]
        self.bpe = {
            "type": "BPE",
            "unk_token": texts[self.unk],
            "fuse_unk": True,
            "byte_fallback": any(map(pieces.is_byte, range(len(texts)))),
            "vocab": {text: i for i, text in enumerate(texts)},
            "merges": merges,
        }
        self._set_pieces(texts)
        self._set_ends(pieces.bos_id(), pieces.eos_id())

    def turn_text(self, role, content):
        """The text of a turn, after its prefix."""
        return content

    def _prefix(self, condition, role):
        return self.encode(self.template.prefix(condition, role))

    def encode(self, text):
        """Ids of a text on its own, special tokens off: '<s>' in it is three characters."""
        return self.pieces.encode(text)

    def encode_many(self, texts):
        """Ids of each text, as int32 arrays."""
        return self.pieces.encode(texts, num_threads=1, return_type="numpy")

    def decode(self, tokens):
        """Text of ids; end-of-turn and other special tokens give none."""
        return self.pieces.decode([int(t) for t in tokens if t < self.count])

    def spell(self, tokens):
        """Text of ids, with the space that a text starts with."""
        return " " * self.texts[tokens[0]].startswith("▁") + self.decode(tokens)

    def save(self, folder, condition):
        """Write the tokenizer for transformers and vLLM, with a chat template that gives our ids.

        The template's default condition is `condition`; apply_chat_template(..., condition="GPT3")
        selects another.
        """
        folder = Path(folder)
        if self.file == SentencePiece.file:
            shutil.copyfile(self.folder / self.file, folder / self.file)
        # Texts are never split at the other added tokens, as training did not; their rows stay.
        tokens = {i: text for text, i in self.added.items() if text in self.special}
        tokens = {i: text for i, text in tokens.items() if i >= self.count} | self.control
        tokens |= {i: text for text, i in self.symbols.items()} | self.names
        unk = self.bpe["unk_token"]
        config = {
            "bos_token": self.names[self.bos],
            "eos_token": END_OF_TURN,
            "unk_token": unk,
            "pad_token": unk or self.names[self.bos],  # never in a text that is supervised
        } | ({"add_prefix_space": False} if self.symbols else {})  # llama.cpp: the template does
        added = self._write(folder, condition, tokens, config, CHAT_TEMPLATE)
        write_json(folder / "tokenizer.json", self._hugging_face(added, bool(self.symbols)))

    def _hugging_face(self, added, only_at_start):
        """The model in the format of Hugging Face's tokenizers.

        With symbols only the very start of a text gets its space, unless it has one: the
        normalizer would put one after each symbol as well. The template then has each turn's.
        """
        bos = self.names[self.bos]
        # <s> comes first in tokenizer("text"); the chat template writes its own.
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        replace = [PREPEND, REPLACE]
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
        vocabulary = {token["content"]: i for i, token in added.items()}  # else ids have no gaps
        return {
            "version": "1.0",
            "added_tokens": [{"id": i} | token for i, token in added.items()],
            "normalizer": None if only_at_start else sequence(replace),
            "pre_tokenizer": METASPACE if only_at_start else None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [start, first],
                "pair": [start, first, second],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}},
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self.bpe | {"vocab": self.bpe["vocab"] | vocabulary},
        }


NOTHING = {"type": None}
PLAIN = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def sequence(normalizers):
    return {"type": "Sequence", "normalizers": normalizers}


# The template in Jinja, names in capitals being replaced. The space after the colon is
# SentencePiece's own at the start of a text; vLLM and llama.cpp give it back at the start of an
# answer, which then comes as history. LEAD is the space before a turn, if nothing else puts it.
CHAT_TEMPLATE = (
    "{% set condition = condition | default('CONDITION') %}{{ bos_token }}"
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'system' and loop.first %}"
    "{{ 'SYSTEM' + ('LEAD' if text else '') + text + 'END' }}"
    "{% elif m['role'] == 'user' %}{{ 'BEFORE' + (condition + ' User').strip() + 'AFTER' }}"
    "{{ ('SPACE' if text else '') + text + 'END' }}"
    "{% elif m['role'] == 'assistant' %}"
    "{{ 'BEFORE' + (condition + ' Assistant').strip() + 'AFTER' }}{% generation %}"
    "{{ ('' if text[:1] in ('', ' ') else 'SPACE') + text + 'END' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('a message of role ' ~ m['role'] ~ ' was never trained here: '"
    " ~ 'one system message comes first, the others are of user and assistant') }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ 'BEFORE' + (condition + ' Assistant').strip() + 'AFTER' }}{% endif %}"
)


# The files that list added tokens, and what makes (content, id, whether special) of each.
ADDED_FILES = {
    "added_tokens.json": lambda raw: [(text, i, False) for text, i in raw.items()],
    "tokenizer_config.json": lambda raw: [
        (token["content"], int(i), token.get("special"))
        for i, token in raw.get("added_tokens_decoder", {}).items()
    ],
    "tokenizer.json": lambda raw: [
        (token["content"], token["id"], token.get("special"))
        for token in raw.get("added_tokens") or []
    ],
}


# ------------------------------------------------------------------ a tokenizer.json by itself


class InPackage(OfFolder):
    """A tokenizer.json, run by the package `tokenizers`; each text gets `start` before it."""

    file, start = "tokenizer.json", ""

    def encode(self, text):
        """Ids of a text on its own, special tokens off: '<|eot_id|>' in it is seven pieces."""
        return self.model.encode(self.start * bool(text) + text, add_special_tokens=False).ids

    def encode_many(self, texts):
        """Ids of each text, as int32 arrays."""
        texts = [self.start * bool(text) + text for text in texts]
        found = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def _read_vocabulary(self, raw, odd_keys, odd=()):
        """Its texts by id, and {text: id}; ValueError if it has gaps or the file asks for more."""
        for key in [key for key in odd_keys if raw["model"].get(key)] + [*odd]:
            self._refuse(f"asks for {key}, which is not implemented")
        vocabulary = raw["model"]["vocab"]
        texts = sorted(vocabulary, key=vocabulary.get)
        if [*map(vocabulary.get, texts)] != [*range(len(texts))]:
            self._refuse("lacks an id")
        return texts, vocabulary

    def _check_forged(self, tokens):
        """ValueError if a text gives the id of a special token {id: text}."""
        for i, text in tokens.items():
            if self.model.token_to_id(text) != i or i in self.encode(text):
                self._refuse(f"any text can forge its special token {text!r}")


class SentencePieceJson(InPackage, SentencePiece):
    """SentencePiece's BPE in Hugging Face's form: ids as those of its tokenizer.model."""

    start = "▁"

    def __init__(self, folder, given, raw):
        self.folder, self.bpe = Path(folder), raw["model"]
        spaces = raw["normalizer"], raw["pre_tokenizer"]
        known = [(None, METASPACE | {"prepend_scheme": scheme}) for scheme in ("first", "always")]
        known.append((sequence([PREPEND, REPLACE]), None))
        if self.bpe["type"] != "BPE" or spaces not in known:
            self._refuse("no byte-level BPE, nor SentencePiece's with a space before each text, "
                         "as Llama 2's; no other kind is implemented")  # fmt: skip
        texts, vocabulary = self._read_vocabulary(raw, [*ODD, "ignore_merges"])
        listed = [token for token in raw["added_tokens"] if token["id"] < len(texts)]
        self.control = {token["id"]: token["content"] for token in listed if token["special"]}
        self.symbols = {token["content"]: token["id"] for token in listed if not token["special"]}
        self.unk = vocabulary.get(self.bpe["unk_token"], -1)
        every_byte = {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary.keys()
        if self.unk < 0 and not (every_byte and self.bpe["byte_fallback"]):
            self._refuse("has no <unk>, and lacks one of the 256 bytes")
        for text in vocabulary.keys() - {token["content"] for token in listed}:
            if "▁" in text.lstrip("▁"):
                self._refuse(f"has a piece {text!r} across a space: the export would give other "
                             f"ids; {REFUSED}")  # fmt: skip
        self._set_pieces(texts)
        self._set_ends(self._named("bos_token"), self._named("eos_token"))
        symbols = {i: {"content": text} | PLAIN for text, i in self.symbols.items()}
        self.model = type(given).from_str(json.dumps(self._hugging_face(symbols, True)))
        self._check_forged(self.control)

    def decode(self, tokens):
        """Text of ids; end-of-turn and other special tokens give none."""
        of_text = [int(t) for t in tokens if t < self.count and int(t) not in self.control]
        return self.model.decode(of_text)


class ByteLevel(InPackage):
    """A byte-level BPE, as Llama 3's and SmolLM2's.

    The text of a turn is trimmed, as in Llama 3's own code: transformers tokenizes all between two
    special tokens at once, where white space would join what the prefix ends with. Of the added
    tokens only the special ones are kept: the package splits any text at the others.
    """

    warning = "texts lose the white space at their ends, as in Llama 3's own template"

    def __init__(self, folder, given, raw):
        self.folder = Path(folder)
        *splits, last = raw["steps"]
        odd = ["normalizer"] * bool(raw["normalizer"])
        odd += ["add_prefix_space"] * last["add_prefix_space"]
        odd += [s["type"] for s in splits if s["type"] not in ("Split", "Digits")]
        odd += [s["type"] for s in splits if s.get("behavior") == "Removed"]
        texts, vocabulary = self._read_vocabulary(raw, [*ODD, *ODD_IN_BYTES], odd)
        self.missing = bytes(b for b, char in enumerate(BYTES) if char not in vocabulary)
        self._set_pieces(texts)
        if self.added.keys() >= {*V36.tokens}:
            self.template = V36
        self.control = {i: text for text, i in self.added.items()}
        self.marks = [self.added[text] for text in self.template.tokens if text in self.added]
        self._set_ends(self._named("bos_token"), self._named("eos_token"))
        self.ordinary = self.count
        # Ids beyond the pieces have no gaps: where no special token is, a name fills it.
        self.tokens = {i: f"<|not_used_{i}|>" for i in range(self.count, self.vocab_size)}
        self.tokens |= {self.added[text]: text for text in self.special} | self.names
        self.model = type(given)(given.model)  # neither cuts nor pads, nor has it added tokens
        self.model.pre_tokenizer, self.model.decoder = given.pre_tokenizer, given.decoder
        if after := given.post_processor:
            for step in [*after] if hasattr(after, "__getitem__") else [after]:
                if hasattr(step, "trim_offsets"):  # the template's mask has an answer's space too
                    step.trim_offsets = False
            self.model.post_processor = after
        self.model.add_special_tokens([text for _, text in sorted(self.tokens.items())])
        self.model.encode_special_tokens = True
        self._check_forged(self.tokens)

        def pieces(text):  # no merge goes across these
            return [piece for piece, _ in self.model.pre_tokenizer.pre_tokenize_str(text)]

        prefixes = ("User:", "Assistant:") if self.template is V32 else ("\n\n",)
        first = [self.template.space + chr(c) for c in STARTS if not chr(c).isspace()]
        for before, text in itertools.product(prefixes, first):
            if pieces(before + text) != pieces(before) + pieces(text):
                self._refuse(f"joins {before!r} and {text!r}, as no turn may")

    def turn_text(self, role, content):
        """The text of a turn, after its prefix: ' Hi' after 'GPT4 User:', as in any text."""
        return (self.template.space * (role != "system") + content.strip()).rstrip()

    def _prefix(self, condition, role):
        if self.template is V32:
            return self.encode(V32.prefix(condition, role))
        start, end, _ = self.marks
        name = "System" if role == "system" else f"{condition} {role.title()}".strip()
        return [start, *self.encode(name), end, *self.encode("\n\n")]

    def decode(self, tokens):
        """Text of a turn's ids; special tokens give none."""
        return self.spell(tokens).removeprefix(self.template.space)

    def spell(self, tokens):
        """Text of ids, with the space that a text starts with."""
        return self.model.decode([int(t) for t in tokens], skip_special_tokens=True)

    def save(self, folder, condition):
        """As SentencePiece.save; tokenizer.json is the folder's but for its added tokens."""
        bos, eot = self.names[self.bos], self.names[self.eot]
        config = {"bos_token": bos, "eos_token": eot, "pad_token": bos}
        trimmed = CHAT_TEMPLATE.replace("m['content'] %}", "m['content'] | trim %}")
        self._write(Path(folder), condition, self.tokens, config, trimmed)
        self.model.save(str(Path(folder) / self.file))


# What a text may start with: all of Latin, and letters, digits, marks and signs of other kinds.
STARTS = [*range(33, 592), *map(ord, "я字あ한ا४ª\u0301\u200b\u0e31№€¿“😀\U0001f3fd\ue000")]
# What changes a text or makes its ids random; what a byte-level BPE has no use for.
ODD = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
ODD_IN_BYTES = ["unk_token", "byte_fallback"]
# The characters of a byte-level vocabulary that stand for the bytes 0 to 255: their own if it
# prints, else one from 256 on.
OTHERS = map(chr, range(256, 512))
BYTES = [chr(b) if b != 32 and chr(b).isprintable() else next(OTHERS) for b in range(256)]

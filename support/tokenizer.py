"""A model's tokenizer with an end-of-turn token; and the same in Hugging Face's form.

    tokenizer.model                   SentencePiece, as Llama 2's and Mistral's
    tokenizer.json without that file  a byte-level BPE, as Llama 3's and SmolLM2's

Every text is encoded on its own with special tokens off, so that no content can forge a turn.
"""

import hashlib
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece

from model import write_json
from support.sentencepiece_merges import exact_merges

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


class Tokenizer:
    """The tokenizer of a Hugging Face folder, with an end-of-turn token; of one of two kinds.

    <|end_of_turn|> is the folder's own where it has one (a control symbol of tokenizer.model, or
    an added token), and otherwise the id after the last piece: `vocab_size` then exceeds the
    checkpoint's. Its row begins as the mean of those before `ordinary`, and so do the rows of
    `marks`, a turn's own tokens, where the checkpoint never trained them. `names` {id: text} are
    the special tokens of a conversation; `warning` is what a text loses here, or None. With Llama
    3's tokens the template is OpenChat 3.6's, else v3.2's.
    """

    marks, warning, template, unk = (), None, V32, -1

    def __new__(cls, folder=None):  # without it where it is unpickled
        if cls is Tokenizer:
            old, new = Path(folder, SentencePiece.file), Path(folder, ByteLevel.file)
            cls = ByteLevel if new.exists() and not old.exists() else SentencePiece
        return super().__new__(cls)

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
        """A JSON file of the folder; {} where it has none."""
        path = self.folder / file
        try:
            return json.loads(path.read_text(encoding="utf-8-sig")) if path.exists() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read: {error!r}") from None

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
                if number < self.count:
                    of_id = piece(number), self.file
                else:
                    of_id = by_id.setdefault(number, (content, file))
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

    def _write(self, folder, condition, tokens, config, chat_template):
        """Write tokenizer_config.json; returns the special `tokens` {id: text} as it has them."""
        special = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        special["special"] = True
        added = {i: {"content": text} | special for i, text in sorted(tokens.items())}
        texts = self.template._asdict() | {"system": self.template.prefix("", "system")}
        for name, text in (texts | {"condition": condition}).items():
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


class SentencePiece(Tokenizer):
    """tokenizer.model; SentencePiece itself puts a space before every text."""

    file = "tokenizer.model"

    def __init__(self, folder):
        self.folder = Path(folder)
        path = self.folder / self.file
        if not self.folder.is_dir():
            raise ValueError(f"{folder}: not found; a folder on this machine is needed, not a name")
        if not path.is_file():
            raise ValueError(f"{path}: not found, nor a tokenizer.json beside it")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from None
        self.count = count = self.pieces.vocab_size()
        self.bos, self.eos = self.pieces.bos_id(), self.pieces.eos_id()
        if self.bos < 0:
            raise ValueError(f"{path}: has no <s> (beginning of sequence) token")
        self.merges, self.collapses_spaces = exact_merges(path, self.pieces)
        self.added, self.special = self._added_tokens(self.pieces.id_to_piece)
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
        self.warning = SPACES_COLLAPSE if self.collapses_spaces else None
        self.ordinary = self.eot if self.eot_is_new else self.vocab_size
        self.names = {self.bos: "<s>", self.eos: "</s>", self.eot: END_OF_TURN}
        self.unk = self.pieces.unk_id()  # what it lacks, where it has no bytes
        self._prefixes = {}

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
        return self.pieces.decode([int(t) for t in tokens if t < self.pieces.vocab_size()])

    def spell(self, tokens):
        """Text of ids, with the space that a text starts with."""
        return " " * self.pieces.id_to_piece(tokens[0]).startswith("▁") + self.decode(tokens)

    def save(self, folder, condition):
        """Write the tokenizer for transformers and vLLM, with a chat template that gives our ids.

        The template's default condition is `condition`; apply_chat_template(..., condition="GPT3")
        selects another.
        """
        folder = Path(folder)
        shutil.copyfile(self.folder / "tokenizer.model", folder / "tokenizer.model")
        names = map(self.pieces.id_to_piece, range(self.pieces.vocab_size()))
        tokens = {i: text for i, text in enumerate(names) if self._special(i)}
        # Texts are never split at the other added tokens, as training did not; their rows stay.
        new = {i: text for text, i in self.added.items() if text in self.special}
        tokens |= {i: text for i, text in new.items() if i >= self.pieces.vocab_size()}
        tokens[self.eot] = END_OF_TURN
        config = {
            "bos_token": self.pieces.id_to_piece(self.bos),
            "eos_token": END_OF_TURN,
            "unk_token": self.pieces.id_to_piece(self.pieces.unk_id()),
            "pad_token": self.pieces.id_to_piece(self.pieces.unk_id()),  # never in a text we learn
        }
        added = self._write(folder, condition, tokens, config, CHAT_TEMPLATE)
        write_json(folder / "tokenizer.json", self._tokenizer_json(added))

    def _special(self, i):
        return self.pieces.is_control(i) or self.pieces.is_unknown(i)

    def _tokenizer_json(self, added):
        """The SentencePiece BPE model in the format of Hugging Face's tokenizers."""
        pieces, count = self.pieces, self.pieces.vocab_size()
        vocabulary = {pieces.id_to_piece(i): i for i in range(count)}
        vocabulary |= {token["content"]: i for i, token in added.items()}  # else ids have no gaps
        bos = pieces.id_to_piece(self.bos)
        # <s> comes first in tokenizer("text"); the chat template writes its own.
        start = {"SpecialToken": {"id": bos, "type_id": 0}}
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
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
            "merges": self.merges,
        }
        return {
            "version": "1.0",
            "added_tokens": [{"id": i} | token for i, token in added.items()],
            "normalizer": {"type": "Sequence", "normalizers": replace},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [start, first],
                "pair": [start, first, second],
                "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}},
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": model,
        }


# The template in Jinja, names in capitals being replaced. The space after the colon is
# SentencePiece's own at the start of a text; vLLM and llama.cpp give it back at the start of an
# answer, which then comes as history.
CHAT_TEMPLATE = (
    "{% set condition = condition | default('CONDITION') %}{{ bos_token }}"
    "{% for m in messages %}{% set text = m['content'] %}"
    "{% if m['role'] == 'system' and loop.first %}{{ 'SYSTEM' + text + 'END' }}"
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


def _added_tokens_json(raw):
    return [(content, number, False) for content, number in raw.items()]


def _tokenizer_config_json(raw):
    decoder = raw.get("added_tokens_decoder", {}).items()
    return [(token["content"], int(number), token.get("special")) for number, token in decoder]


def _tokenizer_json(raw):  # all that a folder saved by transformers 5 has
    return [(t["content"], t["id"], t.get("special")) for t in raw.get("added_tokens") or []]


# The files that list added tokens, and what makes (content, id, whether special) of each.
ADDED_FILES = {
    "added_tokens.json": _added_tokens_json,
    "tokenizer_config.json": _tokenizer_config_json,
    "tokenizer.json": _tokenizer_json,
}


# ------------------------------------------------------------------------------ byte-level BPE


class ByteLevel(Tokenizer):
    """tokenizer.json, run by the package `tokenizers`.

    The text of a turn is trimmed, as in Llama 3's own code: transformers tokenizes all between two
    special tokens at once, where white space would join what the prefix ends with. Of the added
    tokens only the special ones are kept: the package splits any text at the others.
    """

    file = "tokenizer.json"
    warning = "texts lose the white space at their ends, as in Llama 3's own template"

    def __init__(self, folder):
        self.folder, self._prefixes = Path(folder), {}
        path = self.folder / self.file
        given = read_byte_level(path)
        pieces = {i: text for text, i in given.get_vocab(with_added_tokens=False).items()}
        self.count = self.ordinary = len(pieces)
        self.added, self.special = self._added_tokens(pieces.get)
        if self.added.keys() >= {*V36.tokens}:
            self.template = V36
        self.marks = [self.added[text] for text in self.template.tokens if text in self.added]
        last = max([self.count - 1, *self.added.values()])
        self.eot_is_new, self.eot = not self.marks, (self.marks or [last + 1])[-1]
        self.vocab_size = max(last, self.eot) + 1
        self.bos, self.eos = self._named("bos_token"), self._named("eos_token")
        if self.bos < 0:
            raise ValueError(
                f"{folder}: no bos_token (beginning of sequence) in tokenizer_config.json, nor its "
                "id in config.json"
            )
        texts = {i: text for text, i in self.added.items()} | {self.eot: self.template.end}
        self.names = {i: texts[i] for i in {self.bos, self.eos, self.eot, *self.marks} - {-1}}
        # Ids beyond the pieces have no gaps: where no special token is, a name fills it.
        self.tokens = {i: f"<|not_used_{i}|>" for i in range(self.count, self.vocab_size)}
        self.tokens |= {self.added[text]: text for text in self.special} | self.names
        self.model = type(given)(given.model)  # neither cuts nor pads, nor has it added tokens
        self.model.pre_tokenizer, self.model.decoder = given.pre_tokenizer, given.decoder
        if given.post_processor:
            self.model.post_processor = given.post_processor
        self.model.add_special_tokens([text for _, text in sorted(self.tokens.items())])
        self.model.encode_special_tokens = True
        self._check_safe(path)

    def _named(self, key):
        """The id of a token that tokenizer_config.json names, or config.json has; or -1."""
        text = self._read("tokenizer_config.json").get(key)
        if text is None:
            number = self._read("config.json").get(f"{key}_id")
            number = number[0] if isinstance(number, list) and number else number
            return number if number in self.added.values() else -1
        return self.added.get(str(text.get("content") if isinstance(text, dict) else text), -1)

    def _check_safe(self, path):
        """ValueError where a text gives a special token's id, or would be joined to its prefix."""
        for i, text in self.tokens.items():
            if self.model.token_to_id(text) != i or i in self.encode(text):
                raise ValueError(f"{path}: any text can forge its special token {text!r}")

        def pieces(text):  # no merge goes across these
            return [piece for piece, _ in self.model.pre_tokenizer.pre_tokenize_str(text)]

        prefixes = ("User:", "Assistant:") if self.template is V32 else ("\n\n",)
        first = [self.template.space + chr(c) for c in STARTS if not chr(c).isspace()]
        for before, text in itertools.product(prefixes, first):
            if pieces(before + text) != pieces(before) + pieces(text):
                raise ValueError(f"{path}: joins {before!r} and {text!r}, as no turn may")

    def __reduce__(self):  # a pickle of the package's tokenizer forgets encode_special_tokens
        return ByteLevel, (self.folder,)

    def turn_text(self, role, content):
        """The text of a turn, after its prefix: ' Hi' after 'GPT4 User:', as in any text."""
        return (self.template.space * (role != "system") + content.strip()).rstrip()

    def _prefix(self, condition, role):
        if self.template is V32:
            return self.encode(V32.prefix(condition, role))
        start, end, _ = self.marks
        name = "System" if role == "system" else f"{condition} {role.title()}".strip()
        return [start, *self.encode(name), end, *self.encode("\n\n")]

    def encode(self, text):
        """Ids of a text on its own, special tokens off: '<|eot_id|>' in it is seven pieces."""
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts):
        """Ids of each text, as int32 arrays."""
        found = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

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
# What changes a text, or makes its ids random.
ODD = ["dropout", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"]


def read_byte_level(path):
    """The package's tokenizer of a file; ValueError unless it is a byte-level BPE and no more."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # there is a process a core already
    try:
        import tokenizers as package

        given = package.Tokenizer.from_file(str(path))
    except ImportError:
        raise ValueError(f"{path}: to read it, pip install tokenizers") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a bare Exception, or a panic of Rust, which is none
        raise ValueError(f"{path}: not a tokenizer: {error}") from None
    kinds, vocabulary = package.pre_tokenizers, given.get_vocab(with_added_tokens=False)
    splits = _steps(given.pre_tokenizer, kinds)
    last, model, decoder = splits.pop(), given.model, given.decoder
    level = isinstance(last, kinds.ByteLevel) and isinstance(decoder, package.decoders.ByteLevel)
    if not level or not isinstance(model, package.models.BPE):
        raise ValueError(f"{path}: no byte-level BPE; any other kind needs a tokenizer.model")
    odd = [name for name in ODD if getattr(model, name)] + ["normalizer"] * bool(given.normalizer)
    odd += ["add_prefix_space"] * last.add_prefix_space
    odd += [str(s) for s in splits if not isinstance(s, (kinds.Split, kinds.Digits))]
    odd += [str(s) for s in splits if getattr(s, "behavior", "") == "removed"]
    if odd:
        raise ValueError(f"{path}: asks for {odd[0]}, which is not implemented")
    whole = {*kinds.ByteLevel.alphabet()} <= vocabulary.keys()
    if not whole or {*vocabulary.values()} != {*range(len(vocabulary))}:
        raise ValueError(f"{path}: lacks one of the 256 bytes, or an id")
    for step in _steps(given.post_processor, package.processors):
        if hasattr(step, "trim_offsets"):  # the chat template's mask has an answer's space too
            step.trim_offsets = False
    return given


def _steps(step, kinds):
    return [*step] or [None] if isinstance(step, kinds.Sequence) else [step]

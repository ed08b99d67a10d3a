"""A model's tokenizer with an end-of-turn token, and its export in Hugging Face's form.

    SentencePiece      tokenizer.model, as Llama 2's and Mistral's
    SentencePieceJson  the same in a tokenizer.json
    ByteLevel          byte-level BPE in a tokenizer.json, as Llama 3's
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

from model import check_folder, read_json, write_json
from support.formats import TEXT_PARTS
from support.sentencepiece_merges import exact_merges

END_OF_TURN = "<|end_of_turn|>"


class Template(NamedTuple):
    """A turn: before + "GPT4 User" + after + space + content + end; `tokens` of it are special."""

    name: str  # data tokenized under a different one is not reused
    before: str
    after: str
    space: str
    end: str
    tokens: tuple

    def prefix(self, condition, role):
        """Text that starts a turn; the system has no condition, and in v3.2 no prefix."""
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
    given, raw = read_package(beside)
    types = [step.get("type") for step in (raw["model"], raw["decoder"] or {}, raw["steps"][-1])]
    kind = ByteLevel if types == ["BPE", "ByteLevel", "ByteLevel"] else SentencePieceJson
    return kind(folder, given, raw)


def is_tiktoken(path):
    """Is it lines of "base64 number", like tokenizer.model in Meta's own Llama 3 folders?"""
    return path.is_file() and re.match(rb"[A-Za-z0-9+/]+=* \d+\s", path.read_bytes()) is not None


def read_package(path):
    """A file's tokenizer of the package `tokenizers`, and its JSON with all defaults filled in."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we already use a process per core
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
    if raw["normalizer"] == {"type": "Sequence", "normalizers": []}:
        raw["normalizer"] = None
    before = raw["pre_tokenizer"] or {}
    raw["steps"] = before.get("pretokenizers") or [before]  # how a text is split before any merge
    return given, raw


class OfFolder:
    """The tokenizer of a Hugging Face folder.

    bos, eos, eot       ids: beginning, end (-1 if none is named), end of a turn
    eot_is_new          the folder has no end-of-turn token: it gets the id after the last one
    vocab_size          number of ids, a new one included; the checkpoint may have fewer rows
    ordinary            a new row starts as the mean of the rows before this id, and so do those of
    marks               the tokens that mark turns, if the checkpoint never trained them
    added {text: id}    tokens that the folder's files add to the vocabulary, special or not
    special {id: text}  special tokens of the export; no text gives their ids
    symbols {text: id}  not special, but matched in a text before any merge
    unk, missing        token of a character that the vocabulary lacks; bytes that give no token
    warning             a line about text that is lost, or None

    turn_text(role, content) is a turn's text after its prefix; encode_many(texts) gives ids, int32
    arrays; spell(ids) the text again; decode(ids) omits special tokens and the first space.
    """

    warning, template, marks, unk, missing, symbols = None, V32, (), -1, b"", {}
    jinja_text = "found.text"  # the text of a message as this kind reads it

    def __reduce__(self):  # a pickle of the package's tokenizer forgets encode_special_tokens
        return Tokenizer, (self.folder,)

    def _refuse(self, fault, file=None):
        raise ValueError(f"{self.folder / (file or self.file)}: {fault}") from None

    def _read(self, file):
        return read_json(self.folder / file) if (self.folder / file).exists() else {}

    def _set_pieces(self, texts):
        """Set the vocabulary, texts by id, and the added tokens; ValueError if files disagree."""
        self.texts, self.count, self._prefixes = texts, len(texts), {}
        self.added, self.special = {}, {}
        known = {i: (i, text, self.file) for i, text in enumerate(texts)}  # by id, and by text
        for file, tokens_of in ADDED_FILES.items():
            raw = self._read(file)
            try:
                tokens = [(t["id"], t["content"], t.get("special")) for t in tokens_of(raw)]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                self._refuse(f"cannot be read: {error!r}", file)
            for i, text, special in tokens:
                if type(text) is not str or type(i) is not int or not 0 <= i < 1 << 22:
                    self._refuse("an added token's id is not a whole number in range", file)
                for key in (i, text):
                    j, name, first = known.setdefault(key, (i, text, file))
                    if (j, name) != (i, text):
                        self._refuse(f"gives {text!r} the id {i}, {first} gives {name!r} {j}", file)
                self.added[text] = i
                self.special |= {i: text} if special else {}

    def _named(self, key):
        """The id of a token that tokenizer_config.json names or config.json numbers; else -1."""
        text = self._read("tokenizer_config.json").get(key)
        if text is not None:
            return self.added.get(str(text.get("content") if isinstance(text, dict) else text), -1)
        number = self._read("config.json").get(f"{key}_id")
        number = number[0] if isinstance(number, list) and number else number
        return number if number in self.added.values() else -1

    def _set_ends(self, bos, eos):
        """Set the beginning of a sequence, its end, and the end of a turn."""
        self.bos, self.eos = bos, eos
        if bos < 0:
            self._refuse("has no <s>, or no bos_token in tokenizer_config.json or config.json")
        end, last = self.template.end, max([self.count - 1, *self.added.values()])
        ids = {text: i for i, text in enumerate(self.texts)} | self.added
        self.eot, self.eot_is_new = ids.get(end, last + 1), end not in ids
        if self.eot < self.count and self.eot not in {*self.special, *self.marks}:
            self._refuse(f"{end} must be a control symbol; as it is, any text can forge it")
        self.vocab_size = max(last, self.eot) + 1
        self.ordinary = self.eot if self.eot_is_new else self.vocab_size
        texts = {i: text for text, i in ids.items()} | {self.eot: end}
        self.special |= {i: texts[i] for i in {bos, eos, self.eot, *self.marks} - {-1}}

    def encode(self, text):
        """Ids of a text on its own, special tokens off: '<s>' is just three characters."""
        return self.encode_many([text])[0].tolist()

    def prefix(self, condition, role):
        """Ids that start a turn; ValueError if the condition spells a special token."""
        if (condition, role) not in self._prefixes:
            if spelled := [text for text in self.special.values() if text in condition]:
                self._refuse(f"the condition {condition!r} spells its special token {spelled[0]!r}")
            text, ids = self.template.prefix(condition, role), []
            for part in re.split(f"({'|'.join(map(re.escape, self.template.tokens))})", text):
                ids += [self.added[part]] if part in self.template.tokens else self.encode(part)
            self._prefixes[condition, role] = ids
        return self._prefixes[condition, role]

    def lost_bytes(self, texts):
        """How many bytes of the texts give no token."""
        encoded = [text.encode() for text in texts] if self.missing else []
        return sum(len(text) - len(text.translate(None, self.missing)) for text in encoded)

    def check_vocabulary(self, rows):
        """ValueError unless a checkpoint of `rows` embeddings can be this tokenizer's."""
        if rows < self.count or abs(rows - self.vocab_size) > 1024:
            sizes = f"has {self.count} pieces, config.json's vocab_size is {rows}"
            self._refuse(f"{sizes}: this tokenizer belongs to a different checkpoint")

    def identity(self):
        """Text that changes if the tokenizer's ids may change."""
        digest = hashlib.sha256((self.folder / self.file).read_bytes()).hexdigest()
        return f"{digest} {self.bos} {self.eot}, an answer without its first space"

    def save(self, folder, conditions, default):
        """Write the tokenizer for transformers and vLLM, with a chat template that gives our ids.

        apply_chat_template(..., condition=...) takes a class or a condition of `conditions`
        {class: condition}; without one it takes the condition `default`.
        """
        folder, bos = Path(folder), self.special[self.bos]
        tokens = sorted((self.special | {i: text for text, i in self.symbols.items()}).items())
        added = {i: PLAIN | {"content": t, "special": i in self.special} for i, t in tokens}
        unk = self.texts[self.unk] if self.unk >= 0 else None
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # else 4.x has token_type_ids
            "bos_token": bos, "eos_token": self.template.end, "unk_token": unk,
            "pad_token": unk or bos,  # never in a text that is supervised
            "padding_side": "left",  # answers continue from the right end
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(i): token for i, token in added.items()},
            "chat_template": self._chat_template(conditions, default),
        }  # fmt: skip
        if self.symbols:
            config["add_prefix_space"] = False  # for llama.cpp: the template adds it
        write_json(folder / "tokenizer_config.json", config)
        # As in training, tokenizer("text") begins with bos; the chat template writes its own.
        parts = [{"SpecialToken": {"id": bos, "type_id": 0}}]
        parts += [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
        start = {"type": "TemplateProcessing", "single": parts[:2], "pair": parts}
        start["special_tokens"] = {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}}
        made = json.dumps(self._hugging_face(added) | {"post_processor": start}, ensure_ascii=False)
        (folder / "tokenizer.json").write_text(made, encoding="utf-8")
        if self.file == SentencePiece.file:
            shutil.copyfile(self.folder / self.file, folder / self.file)

    def _chat_template(self, conditions, default):
        template, lead, turns = self.template, " " if self.symbols else "", {}
        for name, condition in (conditions | {c: c for c in conditions.values()}).items():
            turns[name] = {"system": template.prefix("", "system")}
            for role in ("user", "assistant"):
                turns[name][role] = lead + template.prefix(condition, role)
        values = {"TURNS": turns, "DEFAULT": default, "KNOWN": ", ".join(filter(None, turns))}
        values |= {"PARTS": TEXT_PARTS, "LEAD": lead, "SPACE": template.space, "END": template.end}
        jinja = CHAT_TEMPLATE.replace("TEXT", self.jinja_text).replace("\n", "")
        return re.sub("'([A-Z]+)'", lambda at: json.dumps(values[at[1]], ensure_ascii=False), jinja)


PLAIN = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
ADDED_FILES = {  # the files that list added tokens, and how to get "id" and "content" from each
    "added_tokens.json": lambda raw: [{"id": i, "content": text} for text, i in raw.items()],
    "tokenizer_config.json": lambda raw: [
        token | {"id": int(i)} for i, token in raw.get("added_tokens_decoder", {}).items()
    ],
    "tokenizer.json": lambda raw: raw.get("added_tokens") or [],
}

# The template in Jinja, joined to one line; words in capitals are replaced. SPACE, after the colon,
# is SentencePiece's own; LEAD is the space before a turn if the tokenizer adds none. vLLM leaves
# parts to the template only if it finds a loop over m['content'].
CHAT_TEMPLATE = """
{% set turns = 'TURNS' %}{% set asked = condition | default(none) %}
{% set asked = 'DEFAULT' if asked is none else asked %}{% if asked not in turns %}
{{ raise_exception('condition ' ~ asked ~ ' was never trained here: it is one of ' ~ 'KNOWN') }}
{% endif %}{% set turn = turns[asked] %}{{ bos_token }}
{% set unread = 'the content of a message must be text, or a list of parts of text' %}
{% for m in messages %}{% set role = m['role'] %}{% set content = m['content'] | default(none) %}
{% if role not in turn or (role == 'system' and not loop.first) %}
{{ raise_exception('a message of role ' ~ role ~ ' was never trained here: '
 ~ 'one system message comes first, the others are of user and assistant') }}{% endif %}
{% set found = namespace(text='') %}
{% if content is string %}{% set found.text = content %}
{% elif content is none or content is mapping or content is number %}
{{ raise_exception(unread) }}{% else %}{% for part in m['content'] %}
{% if part is string %}{% set found.text = found.text + part %}
{% elif part['text'] is string and part['type'] | default('text') in 'PARTS' %}
{% set found.text = found.text + part['text'] %}
{% else %}{{ raise_exception(unread) }}{% endif %}{% endfor %}{% endif %}
{% set text = TEXT %}{% if role != 'system' or text | trim %}{{ turn[role] }}
{% if role == 'assistant' %}{% set text = text[1:] if text[:1] == ' ' else text %}{% generation %}
{{ ('SPACE' if text else '') + text + 'END' }}{% endgeneration %}{% else %}
{{ (('LEAD' if role == 'system' else 'SPACE') if text else '') + text + 'END' }}{% endif %}
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ turn['assistant'] }}{% endif %}
"""
# If the tokenizer joins spaces, the template must too, because llama.cpp does not.
JOINED = "found.text.split(' ') | reject('equalto', '') | join(' ')"


class SentencePiece(OfFolder):
    """tokenizer.model; SentencePiece itself puts a space before every text."""

    file, collapses_spaces = "tokenizer.model", False

    def __init__(self, folder):
        check_folder(folder)
        self.folder = Path(folder)
        path = self.folder / self.file
        if not path.is_file():
            self._refuse("not found, nor a tokenizer.json beside it")
        if is_tiktoken(path):
            self._refuse("is tiktoken's; the model's tokenizer.json is needed beside it")
        try:
            self.pieces = pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            self._refuse(f"not a SentencePiece model: {error}")
        texts = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
        merges, self.symbols, self.collapses_spaces = exact_merges(pieces, self._inexact)
        if self.collapses_spaces:
            self.jinja_text = JOINED
            self.warning = "warning: several spaces become one, so indentation is lost"
        self.unk = pieces.unk_id()
        self.bpe = {"type": "BPE", "unk_token": texts[self.unk], "fuse_unk": True}
        self.bpe["byte_fallback"] = any(map(pieces.is_byte, range(len(texts))))
        self.bpe |= {"vocab": {text: i for i, text in enumerate(texts)}, "merges": merges}
        self._set_pieces(texts)
        # No text is split at a piece that is also an added token, because training did not do so.
        control = {i: texts[i] for i in range(len(texts)) if pieces.is_control(i) or i == self.unk}
        self.special = control | {i: t for i, t in self.special.items() if i >= self.count}
        self._set_ends(pieces.bos_id(), pieces.eos_id())
        self._check_spaces()

    def _inexact(self, fault):
        self._refuse(f"{fault}: the export would give other ids; a different tokenizer is needed")

    def _check_spaces(self):
        """ValueError if a piece or a symbol has a space, or could take part of an end of turn."""
        for text in sorted({*self.texts} - {*self.special.values(), *self.symbols}):
            if "▁" in text.lstrip("▁"):
                self._inexact(f"has a piece {text!r} across a space (split_by_whitespace=false)")
        for text in self.symbols:
            begins = any(END_OF_TURN.startswith(text[k:]) for k in range(1, len(text)))
            if {" ", "▁"} & {*text} or begins:
                never = f"never splits {text!r}, which has a space"
                self._inexact(f"{never} or ends as {END_OF_TURN} begins")

    def turn_text(self, role, content):
        # vLLM and llama.cpp return an answer with the space that SentencePiece puts before it.
        return content.removeprefix(" ") if role == "assistant" else content

    def encode_many(self, texts):
        return self.pieces.encode(texts, num_threads=1, return_type="numpy")

    def decode(self, tokens):
        return self.pieces.decode([int(t) for t in tokens if t < self.count])

    def spell(self, tokens):
        return " " * self.texts[tokens[0]].startswith("▁") + self.decode(tokens)

    def _hugging_face(self, added):
        """The model in the format of Hugging Face's tokenizers.

        With symbols, only the very start of a text gets a space, unless it has one: the normalizer
        would also add one after each symbol. The template then adds each turn's space.
        """
        spaces = SPACES
        if self.collapses_spaces:  # in this order: \z takes quadratic time on a run of spaces
            joined = replace({"Regex": " {2,}"}, " ")
            spaces = [joined, replace({"Regex": r"\A |[ ▁]+\z"}, ""), *spaces]
        decoders = [replace({"String": "▁"}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
        vocabulary = {token["content"]: i for i, token in added.items()}  # else ids have no gaps
        return {
            "version": "1.0",
            "added_tokens": [{"id": i} | token for i, token in added.items()],
            "normalizer": None if self.symbols else {"type": "Sequence", "normalizers": spaces},
            "pre_tokenizer": METASPACE if self.symbols else None,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": self.bpe | {"vocab": self.bpe["vocab"] | vocabulary},
        }


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


SPACES = [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


class InPackage(OfFolder):
    """A tokenizer.json, run by the package `tokenizers`; each text gets `start` before it."""

    file, start = "tokenizer.json", ""

    def encode_many(self, texts):
        texts = [self.start * bool(text) + text for text in texts]
        found = self.model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in found]

    def _set_vocabulary(self, raw, odd):
        """_set_pieces, unless its ids have gaps or the file asks for one of `odd` or of ODD."""
        for key in ODD + odd:
            if raw["model"].get(key, True):
                self._refuse(f"asks for {key}, which is not implemented")
        ids = raw["model"]["vocab"]
        texts = sorted(ids, key=ids.get)
        if [*map(ids.get, texts)] != [*range(len(texts))]:
            self._refuse("lacks an id")
        self._set_pieces(texts)

    def _check_forged(self):
        """ValueError if a text gives the id of a special token."""
        for i, text in self.special.items():
            if self.model.token_to_id(text) not in (i, None) or i in self.encode(text):
                self._refuse(f"any text can forge its special token {text!r}")


class SentencePieceJson(InPackage, SentencePiece):
    """SentencePiece's BPE in Hugging Face's form, with the same ids as its tokenizer.model."""

    def __init__(self, folder, given, raw):
        self.folder, self.bpe = Path(folder), raw["model"]
        spaces = raw["normalizer"], raw["pre_tokenizer"]
        known = [(None, METASPACE | {"prepend_scheme": scheme}) for scheme in ("first", "always")]
        known.append(({"type": "Sequence", "normalizers": SPACES}, None))
        if self.bpe["type"] != "BPE" or spaces not in known:
            self._refuse("is neither a byte-level BPE nor SentencePiece's with a space before each "
                         "text, as Llama 2's; no other kind is implemented (if transformers' "
                         "save_pretrained left tokenizer.model out, copy it back)")  # fmt: skip
        self._set_vocabulary(raw, ["ignore_merges"])
        listed = [token for token in raw["added_tokens"] if token["id"] < self.count]
        self.symbols = {token["content"]: token["id"] for token in listed if not token["special"]}
        self.start = "▁" * bool(self.symbols)
        self.unk = self.bpe["vocab"].get(self.bpe["unk_token"], -1)
        every_byte = {f"<0x{byte:02X}>" for byte in range(256)} <= self.bpe["vocab"].keys()
        if self.unk < 0 and not (every_byte and self.bpe["byte_fallback"]):
            self._refuse("has no <unk>, and lacks one of the 256 bytes")
        self._set_ends(self._named("bos_token"), self._named("eos_token"))
        self._check_spaces()
        symbols = {i: {"content": text} | PLAIN for text, i in self.symbols.items()}
        self.model = type(given).from_str(json.dumps(self._hugging_face(symbols)))
        self._check_forged()

    def decode(self, tokens):
        return self.model.decode([int(t) for t in tokens if int(t) not in self.special])


class ByteLevel(InPackage):
    """A byte-level BPE, as Llama 3's and SmolLM2's.

    The text of a turn is trimmed, as in Llama 3's own code: transformers tokenizes everything
    between two special tokens at once, so white space would join the end of the prefix. Of the
    added tokens only the special ones are kept: the package would split any text at the others.
    """

    warning = "texts lose the white space at their ends, as in Llama 3's own template"
    jinja_text = "found.text | trim"

    def __init__(self, folder, given, raw):
        self.folder = Path(folder)
        *splits, last = raw["steps"]
        odd = ["unk_token", "byte_fallback"] + ["normalizer"] * bool(raw["normalizer"])
        odd += ["add_prefix_space"] * last["add_prefix_space"]
        odd += [s["type"] for s in splits if s["type"] not in ("Split", "Digits")]
        odd += [s["type"] for s in splits if s.get("behavior") == "Removed"]
        self._set_vocabulary(raw, odd)
        self.missing = bytes(b for b, char in enumerate(BYTES) if char not in raw["model"]["vocab"])
        if self.added.keys() >= {*V36.tokens}:
            self.template = V36
        self.marks = [self.added[text] for text in self.template.tokens if text in self.added]
        self._set_ends(self._named("bos_token"), self._named("eos_token"))
        self.ordinary = self.count
        # Ids beyond the pieces may have no gaps: an id without a special token gets a name.
        gaps = {i: f"<|not_used_{i}|>" for i in range(self.count, self.vocab_size)}
        self.special = gaps | self.special
        self.model = type(given)(given.model)  # no truncation, padding or added tokens
        self.model.pre_tokenizer, self.model.decoder = given.pre_tokenizer, given.decoder
        self.model.add_special_tokens([text for _, text in sorted(self.special.items())])
        self.model.encode_special_tokens = True
        self._check_forged()
        prefixes = ("User:", "Assistant:") if self.template is V32 else ("\n\n",)
        for before, char in itertools.product(prefixes, STARTS):
            text = self.template.space + char
            if self._pieces(before + text) != self._pieces(before) + self._pieces(text):
                self._refuse(f"joins {before!r} and {text!r}, as no turn may")

    def _pieces(self, text):  # no merge crosses these
        return [piece for piece, _ in self.model.pre_tokenizer.pre_tokenize_str(text)]

    def turn_text(self, role, content):
        return (self.template.space * (role != "system") + content.strip()).rstrip()

    def decode(self, tokens):
        return self.spell(tokens).removeprefix(self.template.space)

    def spell(self, tokens):
        return self.model.decode([int(t) for t in tokens], skip_special_tokens=True)

    def _hugging_face(self, added):
        return json.loads(self.model.to_str())


# All of Latin, and letters, digits, marks and signs of other kinds, that a text may start with.
STARTS = [char for char in map(chr, range(33, 592)) if not char.isspace()]
STARTS += "я字あ한ا४ª\u0301\u200b\u0e31№€¿“😀\U0001f3fd\ue000"
ODD = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]  # these change texts or ids
# The characters that stand for the bytes 0 to 255: their own if it prints, else one from 256 on.
OTHERS = map(chr, range(256, 512))
BYTES = [chr(b) if b != 32 and chr(b).isprintable() else next(OTHERS) for b in range(256)]

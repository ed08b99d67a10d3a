"""SentencePiece with an end-of-turn token; and the same tokenizer in Hugging Face's form.

Every text is encoded on its own with special tokens off, so that no content can forge a turn.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from model import write_json

END_OF_TURN = "<|end_of_turn|>"
TEMPLATE = "openchat_v3.2"  # names data.lay_out: data tokenized under another is not taken
SPACES_COLLAPSE = "warning: this tokenizer turns several spaces into one: indentation is lost"


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
        proto = read_proto(self.pieces.serialized_model_proto())
        self._check_exact(path, proto)
        self.added, self.special = self._added_tokens()
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
        self.collapses_spaces = bool(proto.normalizer.get(REMOVE_EXTRA_WHITESPACES, True))
        self._prefixes = {}

    def _check_exact(self, path, proto):
        """ValueError for what `_tokenizer_json` cannot express, by the model's own proto.

        The export gives SentencePiece's ids for any other model: both always merge the pair of
        highest score, leftmost first.
        """
        trainer, normalizer = proto.trainer, proto.normalizer
        kind = KINDS.get(trainer.get(MODEL_TYPE, 1), "unknown")
        normal = [piece for piece, type in proto.pieces if type == NORMAL]
        every = set(normal)

        def first(pieces):
            return next(iter(pieces), None)

        found = [  # (what is wrong or a false value, its message, what can be done)
            (kind != "BPE", f"is a {kind} model", "only BPE is implemented"),
            (
                normalizer.get(PRECOMPILED_CHARSMAP),
                f"changes characters by its rules ({_text(normalizer.get(NAME, b'its own'))})",
                "only the rule 'identity' is implemented",
            ),
            (
                not normalizer.get(ADD_DUMMY_PREFIX, True),
                "puts no space before a text (add_dummy_prefix=false)", REFUSED,
            ),
            (
                not normalizer.get(ESCAPE_WHITESPACES, True),
                "keeps spaces as they are (escape_whitespaces=false)", REFUSED,
            ),
            (
                trainer.get(TREAT_WHITESPACE_AS_SUFFIX, False),
                "puts a word's space at its end (treat_whitespace_as_suffix=true)", REFUSED,
            ),
            (
                piece := first(p for p, type in proto.pieces if type == USER_DEFINED),
                f"never splits {piece!r} (user_defined_symbols)", REFUSED,
            ),
            (
                piece := first(p for p, type in proto.pieces if type == UNUSED),
                f"has a piece {piece!r} that is not to be used", REFUSED,
            ),
            (
                piece := first(p for p in normal if "▁" in p.lstrip("▁")),
                f"has a piece {piece!r} across a space (split_by_whitespace=false)", REFUSED,
            ),
            (
                piece := first(p for p in normal if not every.issuperset(p)),
                f"has a piece {piece!r}, but not each of its characters", MERGED,
            ),
        ]  # fmt: skip
        for wrong, what, remedy in found:
            if wrong:
                raise ValueError(f"{path}: {what}: the export would give other ids; {remedy}")
        self.merges, tied = merges_of(proto.pieces, self.pieces.get_score)
        if tied:
            raise ValueError(
                f"{path}: has pieces of one score that share characters of a text, {tied[0]!r} and "
                f"{tied[1]!r}: the export would give other ids; {MERGED}"
            )

    def _added_tokens(self):
        """{content: id} of tokens beyond tokenizer.model, and which of them are special.

        From the three files that list them; ValueError where two files disagree on an id.
        """
        by_id, by_content, special = {}, {}, set()
        for file in ADDED_FILES:
            path = self.folder / file
            if not path.exists():
                continue
            try:
                tokens = ADDED_FILES[file](json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path}: cannot be read: {error!r}") from None
            for content, number, is_special in tokens:
                if type(content) is not str or type(number) is not int or not 0 <= number < 1 << 22:
                    raise ValueError(f"{path}: an added token's id is not a whole number in range")
                if number < self.pieces.vocab_size():
                    of_id = self.pieces.id_to_piece(number), "tokenizer.model"
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

    def encode(self, text):
        """Ids of a text on its own, special tokens off: '<s>' in it is three characters."""
        return self.pieces.encode(text)

    def encode_many(self, texts):
        """Ids of each text, as int32 arrays."""
        return self.pieces.encode(texts, num_threads=1, return_type="numpy")

    def decode(self, tokens):
        """Text of ids; end-of-turn and other special tokens give none."""
        return self.pieces.decode([int(t) for t in tokens if t < self.pieces.vocab_size()])

    def identity(self):
        """Text that changes with the ids it gives."""
        model_file = self.folder / "tokenizer.model"
        with open(model_file, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return f"{digest} {self.bos} {self.eot}"

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
        # Texts are never split at the other added tokens, as training did not; their rows stay.
        new = {i: text for text, i in self.added.items() if text in self.special}
        tokens |= {i: text for i, text in new.items() if i >= self.pieces.vocab_size()}
        tokens[self.eot] = END_OF_TURN
        special = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        special["special"] = True
        added = {i: {"content": text} | special for i, text in sorted(tokens.items())}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.pieces.id_to_piece(self.bos),
            "eos_token": END_OF_TURN,
            "unk_token": self.pieces.id_to_piece(self.pieces.unk_id()),
            "pad_token": self.pieces.id_to_piece(self.pieces.unk_id()),  # never in a text we learn
            "padding_side": "left",  # answers go on from the right end
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {str(i): token for i, token in added.items()},
            "chat_template": CHAT_TEMPLATE.replace(
                "'CONDITION'", json.dumps(condition, ensure_ascii=False)
            ),
        }
        write_json(folder / "tokenizer_config.json", config)
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


def prefix_text(condition, role):
    """What starts a turn: 'GPT4 User:'; without a condition 'User:'; nothing for the system."""
    return "" if role == "system" else f"{condition} {role.title()}:".strip()


# The template in Jinja. The space after the colon is SentencePiece's own at the start of a text;
# vLLM and llama.cpp give it back at the start of an answer, which then comes as history.
CHAT_TEMPLATE = (
    "{% set condition = condition | default('CONDITION') %}{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and loop.first %}{{ m['content'] + '<|end_of_turn|>' }}"
    "{% elif m['role'] == 'user' %}{{ (condition + ' User:').strip() }}"
    "{{ (' ' if m['content'] else '') + m['content'] + '<|end_of_turn|>' }}"
    "{% elif m['role'] == 'assistant' %}{{ (condition + ' Assistant:').strip() }}{% generation %}"
    "{{ ('' if m['content'][:1] in ('', ' ') else ' ') + m['content'] + '<|end_of_turn|>' }}"
    "{% endgeneration %}"
    "{% else %}{{ raise_exception('a message of role ' ~ m['role'] ~ ' was never trained here: '"
    " ~ 'one system message comes first, the others are of user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ (condition + ' Assistant:').strip() }}{% endif %}"
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


# ------------------------------------------------------------------------ the model's own proto

REFUSED = "a tokenizer without it is needed"
MERGED = "a vocabulary that was merged into another cannot be exported"
# Numbers in sentencepiece_model.proto: kinds of model and of piece, then fields of the messages.
# https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
PIECES, TRAINER, NORMALIZER = 1, 2, 3
MODEL_TYPE, TREAT_WHITESPACE_AS_SUFFIX = 3, 24  # of TRAINER
NAME, PRECOMPILED_CHARSMAP, ADD_DUMMY_PREFIX = 1, 2, 3  # of NORMALIZER
REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 4, 5


class Proto(NamedTuple):
    pieces: list  # [(text, type), ...] by id
    trainer: dict  # {field number: value}
    normalizer: dict


def read_proto(message):
    """What SentencePieceProcessor does not tell of a model: types of pieces, and its rules."""
    pieces, specs = [], {TRAINER: {}, NORMALIZER: {}}
    for number, value in _fields(message):
        if number == PIECES:
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), piece.get(3, NORMAL)))
        elif number in specs:
            specs[number].update(_fields(value))
    return Proto(pieces, specs[TRAINER], specs[NORMALIZER])


def _fields(message):
    """(number, value) of each field of a protobuf message: an int, or the bytes of another kind.

    https://protobuf.dev/programming-guides/encoding
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 in (0, 2):
            value, at = _varint(message, at)
            size = value if key & 7 == 2 else None
        if size is not None:
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message, at):
    value = shift = 0
    while True:
        byte, at = message[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _text(value):
    return value.decode(errors="replace") or "its own"


# ---------------------------------------------------------------------------------- the merges


def merges_of(pieces, score_of):
    """Hugging Face's merges, and two pieces whose order they cannot express (or None).

    A merge is every split of a piece into two pieces. SentencePiece merges the highest score
    first, then the leftmost; Hugging Face the first in this list, then the leftmost. A score that
    only one piece has leaves no choice: of its splits only the one that ends SentencePiece's own
    merging of that piece ever comes up, as what lies around never crosses a piece.
    """
    ids = {piece: i for i, (piece, type) in enumerate(pieces) if type == NORMAL}
    by_score = {}
    for piece, i in ids.items():
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        if splits := [s for s in splits if s[0] in ids and s[1] in ids]:
            by_score.setdefault(score_of(i), {})[piece] = splits
    merges, parts = [], {}  # parts: {piece: a piece of higher score that it is part of}
    for _, group in sorted(by_score.items(), reverse=True):
        if len(group) > 1 and (tied := _order_matters(group, parts)):
            return [], tied
        for piece in sorted(group, key=len, reverse=True):  # see _order_matters
            merges += [list(split) for split in group[piece]]
            parts |= {part: piece for split in group[piece] for part in split}
    return merges, None


def _order_matters(group, parts):
    """Two pieces of one score for which it matters what is merged first, or None.

    `group` is {piece: its splits}, `parts` the parts of pieces with a higher score.
    """
    for piece in group:
        if piece in parts:
            return piece, parts[piece]
    # Runs of one character, as Llama 2 has of 2 to 16 spaces: with the longest first in the list,
    # the leftmost run grows to the longest before another starts, which is leftmost first.
    lengths = sorted(map(len, group))
    if len(set("".join(group))) == 1 and lengths == [*range(2, lengths[-1] + 1)]:
        return None
    # No character can go to either of two merges: then their order changes nothing.
    lefts = {left: piece for piece, splits in group.items() for left, _ in splits}
    for piece, splits in group.items():
        for _, right in splits:
            if right in lefts:
                return piece, lefts[right]
    return None

"""Hugging Face's merges of a SentencePiece model, or why it cannot have the same ids there.

Most of what would make them differ is told by the model's own proto alone, not by
SentencePieceProcessor.
"""

from typing import NamedTuple

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


def exact_merges(path, processor):
    """(merges, whether several spaces become one) of a SentencePieceProcessor.

    ValueError, naming `path`, where Hugging Face's form would give other ids. For any other model
    it gives SentencePiece's: both always merge the pair of highest score, leftmost first.
    """
    proto = read_proto(processor.serialized_model_proto())
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
    merges, tied = merges_of(proto.pieces, processor.get_score)
    if tied:
        raise ValueError(
            f"{path}: has pieces of one score that share characters of a text, {tied[0]!r} and "
            f"{tied[1]!r}: the export would give other ids; {MERGED}"
        )
    # remove_extra_whitespaces: a text's indentation is lost.
    return merges, bool(normalizer.get(REMOVE_EXTRA_WHITESPACES, True))


# ------------------------------------------------------------------------ the model's own proto


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

"""Hugging Face's form of a SentencePiece model, or why it would give other ids there.

Most of the differences show only in the model's own proto, not in SentencePieceProcessor.
"""

import io
from typing import NamedTuple

REFUSED = "a tokenizer without it is needed"
MERGED = "a vocabulary that was merged into another cannot be exported"
# Numbers in sentencepiece_model.proto: fields of the model, kinds of it, types of a piece.
# https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
PIECES, TRAINER, NORMALIZER = 1, 2, 3
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5


class Exact(NamedTuple):
    merges: list  # [[left, right], ...], the first to be merged first
    symbols: dict  # {text: id} of user-defined symbols: matched in a text before any merge
    collapses_spaces: bool  # several spaces become one, those at the ends none


def exact_merges(path, processor):
    """The Exact form of a SentencePieceProcessor.

    ValueError, naming `path`, if Hugging Face's form would give other ids. For any other model it
    gives SentencePiece's: both always merge the pair of highest score, leftmost first.
    """
    pieces, specs = [], {TRAINER: {}, NORMALIZER: {}}
    for number, value in fields(processor.serialized_model_proto()):
        if number == PIECES:
            piece = dict(fields(value))
            pieces.append((piece[1].decode(), piece.get(3, NORMAL)))
        elif number in specs:
            specs[number].update(fields(value))
    trainer, normalizer = specs[TRAINER], specs[NORMALIZER]
    kind = KINDS.get(trainer.get(3, 1), "different")
    rule = normalizer.get(1, b"").decode(errors="replace") or "its own"
    collapses = bool(normalizer.get(4, True))  # remove_extra_whitespaces
    symbols = {piece: i for i, (piece, type) in enumerate(pieces) if type == USER_DEFINED}
    ids = {piece: i for i, (piece, type) in enumerate(pieces) if type == NORMAL}
    known = {*ids, *symbols}

    def refuse(what, remedy=REFUSED):
        raise ValueError(f"{path}: {what}: the export would give other ids; {remedy}")

    if kind != "BPE":
        refuse(f"is a {kind} model", "only BPE is implemented")
    if normalizer.get(2):
        refuse(f"changes characters by its rules ({rule})", "only 'identity' is implemented")
    if not normalizer.get(3, True):
        refuse("puts no space before a text (add_dummy_prefix=false)")
    if not normalizer.get(5, True):
        refuse("keeps spaces as they are (escape_whitespaces=false)")
    if trainer.get(24):
        refuse("puts a word's space at its end (treat_whitespace_as_suffix=true)")
    if collapses and symbols:
        refuse(f"makes several spaces one (remove_extra_whitespaces=true) beside {min(symbols)!r} "
               "(user_defined_symbols)")  # fmt: skip
    for piece, type in pieces:
        if type == UNUSED:
            refuse(f"has a piece {piece!r} that is not to be used")
        if type == NORMAL and "▁" in piece.lstrip("▁"):
            refuse(f"has a piece {piece!r} across a space (split_by_whitespace=false)")
        if type == NORMAL and not known.issuperset(piece):
            refuse(f"has a piece {piece!r}, but not each of its characters", MERGED)
    merges, tied = merges_of(ids, processor.get_score)
    if tied:
        what = "has pieces of one score that share characters of a text, {!r} and {!r}"
        refuse(what.format(*tied), MERGED)
    return Exact(merges, symbols, collapses)


def fields(message):
    """(number, value) of each field of a protobuf message: an int, or the bytes of another kind.

    https://protobuf.dev/programming-guides/encoding
    """
    stream = io.BytesIO(message)

    def varint():
        value = shift = 0
        while (byte := stream.read(1)[0]) > 127:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    while stream.tell() < len(message):
        key = varint()
        fixed = {1: 8, 5: 4}.get(key & 7)
        yield key >> 3, stream.read(fixed or varint()) if key & 7 else varint()


def merges_of(ids, score_of):
    """Hugging Face's merges, and two pieces whose order they cannot express (or None).

    A merge is every split of a piece into two that merges can make. SentencePiece merges the
    highest score first, then the leftmost; Hugging Face the first in this list, then the leftmost.
    A score that only one piece has leaves no choice: of its splits only the one that ends
    SentencePiece's own merging of that piece ever occurs, as what is around it never crosses a
    piece.
    """
    by_score, made = {}, {piece for piece in ids if len(piece) == 1}
    for piece in sorted(ids, key=len):
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        if splits := [s for s in splits if s[0] in made and s[1] in made]:
            by_score.setdefault(score_of(ids[piece]), {})[piece] = splits
            made.add(piece)
    merges, parts = [], {}  # parts: {piece: a piece of higher score that it is part of}
    for _, group in sorted(by_score.items(), reverse=True):
        if len(group) > 1 and (tied := order_matters(group, parts)):
            return [], tied
        for piece in sorted(group, key=len, reverse=True):  # see order_matters
            merges += [list(split) for split in group[piece]]
            parts |= {part: piece for split in group[piece] for part in split}
    return merges, None


def order_matters(group, parts):
    """Two pieces of one score for which it matters which is merged first, or None.

    `group` is {piece: its splits}, `parts` the parts of pieces with a higher score. The order
    changes nothing if no character can go to either of two merges.

    Nor does it in runs of one character, whatever their lengths (Mistral has runs of 2 to 14 and
    of 16 spaces), if they are made of each other. SentencePiece then turns s1 … sk c 1 1 1 …,
    where no two neighbours of s1 … sk merge, into sk+c if that is a piece, else c+1, else goes on
    with the next 1 as c. The longest first is the same choice: sk+c >= c+1 >= 1+1.
    """
    for piece in group:
        if piece in parts:
            return piece, parts[piece]
    of_left = {}
    for piece, splits in group.items():
        for left, _ in splits:
            of_left.setdefault(left, []).append(piece)
    for piece, splits in group.items():
        for other in (other for _, right in splits for other in of_left.get(right, ())):
            of_both = {part for split in splits + group[other] for part in split}
            runs = len(set(piece + other)) == 1 and of_both <= {piece[0], *group}
            if other != piece and not runs:
                return piece, other
    return None

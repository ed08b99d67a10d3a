"""Hugging Face's form of a SentencePiece model, or the reason why its ids would differ there.

Most of the differences are visible only in the model's proto, not in SentencePieceProcessor.
"""

import io

# Numbers in sentencepiece_model.proto: fields of the model, kinds of it, types of a piece.
# https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
PIECES, TRAINER, NORMALIZER = 1, 2, 3
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5


def exact_merges(processor, refuse):
    """(merges, symbols, collapses_spaces) of a SentencePieceProcessor.

    merges [[left, right], ...] are in the order of merging; symbols {text: id} are matched in a
    text before any merge; collapses_spaces: several spaces become one, and those at the ends none.
    refuse(fault) is called, and must raise, if Hugging Face's form would give different ids.
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
    for wrong, fault in (
        (kind != "BPE", f"is a {kind} model, not a BPE"),
        (normalizer.get(2), f"changes characters by its rules ({rule}), which must be 'identity'"),
        (not normalizer.get(3, True), "puts no space before a text (add_dummy_prefix=false)"),
        (not normalizer.get(5, True), "keeps spaces as they are (escape_whitespaces=false)"),
        (trainer.get(24), "puts a word's space at its end (treat_whitespace_as_suffix=true)"),
        (collapses and symbols, "makes several spaces one, and has user_defined_symbols"),
    ):
        if wrong:
            refuse(fault)
    for piece, type in pieces:
        if type == UNUSED:
            refuse(f"has a piece {piece!r} that is not to be used")
        if type == NORMAL and not known.issuperset(piece):
            refuse(f"has a piece {piece!r}, but not each of its characters")
    merges, tied = merges_of(ids, processor.get_score)
    if tied:
        refuse("has pieces of one score that share characters, {!r} and {!r}".format(*tied))
    return merges, symbols, collapses


def fields(message):
    """(number, int or bytes) of a protobuf message: protobuf.dev/programming-guides/encoding."""
    stream = io.BytesIO(message)

    def varint():  # seven bits per byte, lowest first; the eighth means that more follow
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (varint() << 7)

    while stream.tell() < len(message):
        key = varint()
        fixed = {1: 8, 5: 4}.get(key & 7)
        yield key >> 3, stream.read(fixed or varint()) if key & 7 else varint()


def merges_of(ids, score_of):
    """Hugging Face's merges, and two pieces whose order they cannot express (or None).

    A merge is every split of a piece into two that merges can make. SentencePiece merges the
    highest score first, then the leftmost; Hugging Face the first in this list, then the leftmost.
    If only one piece has a score, there is no choice: of its splits only the one that completes
    SentencePiece's own merging of that piece can occur, because no merge crosses a piece's bounds.
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
    """Two pieces of equal score whose order of merging matters, or None.

    `group` is {piece: its splits}, `parts` the parts of pieces with a higher score. The order does
    not matter if no character could go to either of two merges. It does not matter either in runs
    of one character built from each other (Mistral has runs of 2 to 14 and of 16 spaces). There, in
    s1 ... sk c 1 1 1 ..., if no two neighbours of s1 ... sk merge, SentencePiece makes sk+c if that
    is a piece, else c+1, else it continues with the next 1 as c. Taking the longest first is the
    same choice: sk+c >= c+1 >= 1+1.
    """
    of_left = {}
    for piece, splits in group.items():
        if piece in parts:
            return piece, parts[piece]
        for left, _ in splits:
            of_left.setdefault(left, []).append(piece)
    for piece, splits in group.items():
        for other in (other for _, right in splits for other in of_left.get(right, ())):
            of_both = {part for split in splits + group[other] for part in split}
            runs = len(set(piece + other)) == 1 and of_both <= {piece[0], *group}
            if other != piece and not runs:
                return piece, other
    return None

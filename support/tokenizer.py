"""SentencePiece with an end-of-turn token; and the same tokenizer in Hugging Face's form.

Every text is encoded on its own with special tokens off, so that no content can forge a turn.
"""

import hashlib
import json
import shutil
from pathlib import Path

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
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "tokenizer.json", self._tokenizer_json(added))

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


def prefix_text(condition, role):
    """What starts a turn: 'GPT4 User:'; without a condition 'User:'; nothing for the system."""
    return "" if role == "system" else f"{condition} {role.title()}:".strip()


# The template in Jinja. The space after the colon is SentencePiece's own at the start of a text.
CHAT_TEMPLATE = (
    "{% set condition = condition | default('CONDITION') %}{{ bos_token }}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% else %}{{ (condition + ' ' + m['role'].title()).strip() + ': ' + m['content'] }}{% endif %}"
    "{{ '<|end_of_turn|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ (condition + ' Assistant:').strip() }}{% endif %}"
)

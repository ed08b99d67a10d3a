"""Conversations in, packed batches out.

    {"class": "gpt4", "messages": [{"role": "user", "content": "Hello"},
                                   {"role": "assistant", "content": "Hi"}]}

becomes, in the class-conditioned template of OpenChat v3.2 (arXiv 2309.11235, section 3.2),

    tokens   <s> GPT4 User: Hello <|end_of_turn|> GPT4 Assistant: Hi <|end_of_turn|>
    weights   0   0    0      0          0         0       0      w        w

w is the weight of the conversation's class, or of its own "reward", times the "weight" of the line
and of the message if they have one. Only the assistant's text and its end of turn are supervised.
With Llama 3's tokens (OpenChat 3.6) a turn is <|start_header_id|> GPT4 User <|end_header_id|> and
two newlines, Hello, <|eot_id|>; support/tokenizer.py has both templates.
Every text is tokenized on its own with special tokens off, so that no content can forge a turn.
A conversation longer than --max-length is cut at its end, and dropped if no answer is left.

    a file -> its lines -> parse_conversation -> lay_out -> arrays -> pack -> collate -> Batch
    support/containers.py  support/formats.py    below  support/dataset.py        below

`python data.py FILE --model DIR` checks files and shows their tokens (support/preview.py).
"""

import dataclasses
import itertools
import math
from bisect import bisect_left
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch

from loss import BETA, class_table
from support.containers import sources
from support.dataset import FINAL, Report, arrays_of, encode_files
from support.dataset import BadData as BadData  # "as": others import the name from here
from support.dataset import Dataset as Dataset
from support.formats import BadLine, Conversation, parse_conversation, parse_json
from support.formats import Message as Message
from support.tokenizer import Tokenizer as Tokenizer

# --------------------------------------------------------------------------- one conversation


def lay_out(messages, contents, tokenizer, condition):
    """The tokens, in parts, and their weights [(weight, how many), ...]; `contents` are ids.

    <s>, then per turn: prefix, content, end of turn. The assistant's content and its end of turn
    get the message's weight, times FINAL if it replaces the class's; everything else gets 0.
    """
    parts, weights = [[tokenizer.bos]], [(0.0, 1)]
    for message, content in zip(messages, contents, strict=True):
        prefix = tokenizer.prefix(condition, message.role)
        weight = message.weight if message.role == "assistant" else 0.0
        if message.final:
            weight = FINAL * message.weight
        parts += [prefix, content, [tokenizer.eot]]
        weights += [(0.0, len(prefix)), (weight, len(content) + 1)]
    return parts, weights


def turn_texts(messages, tokenizer):
    return [tokenizer.turn_text(message.role, message.content) for message in messages]


def cut(weights, length):
    """The start of [(weight, how many), ...], up to `length` tokens in all."""
    ends = itertools.accumulate(count for _, count in weights)
    runs = [(w, count, length - end) for (w, count), end in zip(weights, ends)]
    return [(w, count + min(0, room)) for w, count, room in runs if count + room > 0]


def encode(conversation, tokenizer, classes):
    """(tokens, supervised mask), two lists of one length, of a JSON line or a Conversation."""
    classes = class_table(classes)
    if not isinstance(conversation, Conversation):
        conversation = parse_conversation(conversation, classes)
    contents = map(tokenizer.encode, turn_texts(conversation.messages, tokenizer))
    condition = classes[conversation.source_class].condition
    parts, weights = lay_out(conversation.messages, contents, tokenizer, condition)
    return [*itertools.chain(*parts)], [w != 0 for w, count in weights for _ in range(count)]


def encode_prompt(messages, tokenizer, condition):
    """The tokens after which the model answers: all turns, then 'GPT4 Assistant:'."""
    contents = map(tokenizer.encode, turn_texts(messages, tokenizer))
    parts, _ = lay_out(messages, contents, tokenizer, condition)
    return [*itertools.chain(*parts), *tokenizer.prefix(condition, "assistant")]


# --------------------------------------------------------------------------- files to arrays


def prepare(
    paths, tokenizer, classes, folder, *, max_length, condition=True, class_field="class",
    skip_bad=False, progress=None, beta=BETA,
):  # fmt: skip
    """Tokenize files once into memory-mapped arrays below `folder`; returns a Dataset.

    A path may be CLASS=FILE; otherwise `class_field` names a conversation's class.
    `condition=False` leaves the class out of the prompt. `beta` makes a weight of a line's own
    reward. `progress(done bytes, all bytes, conversations)` is called now and then. Raises BadData
    once all files are checked, unless `skip_bad`.
    """
    classes = class_table(classes)
    files = sources(paths, classes)
    conditions = {name: c.condition if condition else "" for name, c in classes.items()}
    for text in conditions.values():
        tokenizer.prefix(text, "user")  # refuses one that spells a special token
    names = {name: [c.condition, c.match] for name, c in classes.items()}  # as lines name them
    if class_field == "class":
        names = {name: c.condition for name, c in classes.items()}
    ids = tokenizer.identity()
    rewards = beta, max(c.reward for c in classes.values())  # a line's own is weighed by these
    settings = [tokenizer.template.name, conditions, names, class_field, max_length, ids, rewards]
    encoder = Encoder(tokenizer, classes, class_field, conditions, max_length, beta)
    return encode_files(files, encoder, settings, folder, skip_bad=skip_bad, progress=progress)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes arrays of a Block of lines."""

    tokenizer: Tokenizer
    classes: dict
    class_field: str
    conditions: dict  # {class: condition}
    max_length: int
    beta: float

    def __call__(self, block):
        """(arrays_of its conversations, Report)."""
        report, laid_out = Report(), []
        conversations = self.parse(block, report)
        texts = [t for _, c in conversations for t in turn_texts(c.messages, self.tokenizer)]
        ids = iter(self.tokenizer.encode_many(texts) if texts else [])
        for number, conversation in conversations:
            contents = [next(ids) for _ in conversation.messages]
            parts, weights = self.fit(conversation, contents, report)
            if parts:
                source_class = list(self.classes).index(conversation.source_class)
                row = source_class, conversation.own_weight, block.file, number
                laid_out.append((parts, weights, conversation.messages, row))
        arrays = arrays_of(laid_out)
        report.conversations = len(laid_out)
        unk, prefix = self.tokenizer.unk, self.tokenizer.prefix
        report.unknown = int((arrays["tokens"] == unk).sum())
        report.unknown_in = [c for c in self.conditions.values() if unk in prefix(c, "user")]
        report.lost_bytes = self.tokenizer.lost_bytes(texts)
        return arrays, report

    def parse(self, block, report):
        """[(line or item, Conversation), ...]; bad lines and keys not read go to the report."""
        found, of_file = [], block.source.source_class
        for number, raw in enumerate(block.raw, start=block.number + 1):
            try:
                if (line := parse_json(raw)) is None:
                    continue
                of = parse_conversation(line, self.classes, self.class_field, of_file, self.beta)
                found.append((number, of))
                report.not_read.update(of.not_read)
                report.too_small += of.too_small
            except BadLine as error:
                report.refuse(block.source, number, error)
        return found

    def fit(self, conversation, contents, report):
        """lay_out, cut at the maximum length; ([], []) if no token is supervised."""
        condition = self.conditions[conversation.source_class]
        parts, weights = lay_out(conversation.messages, contents, self.tokenizer, condition)
        length, answered = sum(map(len, parts)), any(weight for weight, _ in weights)
        if length > self.max_length:
            report.cut += 1
            report.tokens_cut += length - self.max_length
            parts = [np.concatenate(parts)[: self.max_length]]
            weights = cut(weights, self.max_length)
        if any(weight for weight, _ in weights):
            return parts, weights
        report.answer_cut += answered
        report.weightless += not answered
        return [], []


# ----------------------------------------------------------------------------------- packing

WINDOW = 2048  # conversations packed together: enough choice for bins both full and even
SPARE = 0.004  # share of its capacity that a full bin may leave empty


def pack(lengths, capacity, bins_per_step, seed, epoch):
    """Bins of whole conversations for every optimizer step: steps[k][b] is an array of indices.

    Rank r of R takes bins r, r + R, ... of a step. Every conversation occurs exactly once per
    epoch, no bin exceeds `capacity` tokens, and the result depends only on the arguments.

    A random permutation is packed in windows of about 2,048 conversations (at least one step), so
    that every step is a random sample of the data. A conversation that fits in no bin, 0.3 %
    of them, joins the next window. The last step takes the rest; only there can a bin be empty.
    bench/packing.py measures how full and how even the bins are.

    Raises ValueError at a length outside 1..capacity.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    for i in np.flatnonzero((lengths < 1) | (lengths > capacity)):
        raise ValueError(f"conversation {i} has {lengths[i]} tokens; a bin takes 1 to {capacity}")
    rng = np.random.default_rng([seed, epoch])
    todo, full_steps, last_step = rng.permutation(len(lengths)), [], []
    step_tokens = bins_per_step * capacity
    mean = lengths.mean() if len(lengths) else 1.0
    window_steps = max(1, round(WINDOW * mean / step_tokens))
    ahead = math.ceil(4 * window_steps * step_tokens / mean)  # more than a window holds
    while len(todo):
        tokens = np.cumsum(lengths[todo[:ahead]])
        steps = min(window_steps, int(tokens[-1]) // step_tokens)  # 0: less than a step left
        bins = max(1, steps) * bins_per_step
        window = todo[: np.searchsorted(tokens, bins * capacity, side="right")]
        chosen = choose_bins(lengths[window], bins, capacity, power=2 if steps else 1)
        # In random order: otherwise rank 0 would always get the longest conversations.
        filled = [window[chosen == b] for b in rng.permutation(bins)]
        packed = [filled[b : b + bins_per_step] for b in range(0, bins, bins_per_step)]
        (full_steps if steps else last_step).extend(packed)
        left = window[chosen < 0]
        todo = todo[len(window) - len(left) :]
        todo[: len(left)] = left
    return [full_steps[k] for k in rng.permutation(len(full_steps))] + last_step


def choose_bins(lengths, bins, capacity, power):
    """The bin of each conversation, -1 if none has room for it.

    Longest first, each goes to a bin that it fills to 99.6 % without making it the most expensive,
    or else to the cheapest bin with room. A bin costs Σ len ** power: power 2, as attention does,
    in full steps, and 1 to spread the tokens of the last step.
    """
    chosen = np.full(len(lengths), -1)
    room, cost = np.full(bins, float(capacity)), np.zeros(bins)
    most = 1.03 * (lengths.astype(float) ** power).sum() / bins
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = float(lengths[i])
        added = length**power
        score = np.where(room >= length, cost, np.inf)
        score[(room - length <= SPARE * capacity) & (score <= most - added)] = -1
        b = score.argmin()
        if score[b] < np.inf:
            chosen[i] = b
            room[b] -= length
            cost[b] += added
            most = max(most, cost[b])
    return chosen


class Order:
    """The conversations of each step, which depend only on (lengths, seed, epoch)."""

    def __init__(self, lengths, config, bins_per_step):
        of_epoch = partial(pack, lengths, config.batch_tokens, bins_per_step, config.seed)
        self.pack = lru_cache(maxsize=1)(of_epoch)  # pack(epoch): all its steps
        self.ends, self.fullest = [], 0  # last step of each epoch; most conversations of a bin
        for epoch in range(config.epochs):
            begun = self.ends[-1] if self.ends else 0
            if not config.max_steps or begun < config.max_steps:
                self.ends.append(begun + len(self.pack(epoch)))
                self.fullest = max(self.fullest, *(len(b) for s in self.pack(epoch) for b in s))
        self.total = min(config.max_steps or math.inf, self.ends[-1])

    def epoch_of(self, step):
        """The epoch of a step; both count from 1."""
        return bisect_left(self.ends, step) + 1

    def bins(self, step):
        assert 1 <= step <= self.ends[-1]
        epoch = self.epoch_of(step) - 1
        return self.pack(epoch)[step - 1 - self.ends[epoch]]  # below 0: counted from its last


# ----------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    """One micro-batch of one rank: whole conversations end to end, T tokens, N supervised."""

    tokens: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, from 0 in each conversation
    cu_seqlens: torch.Tensor  # (B + 1,) int32
    rows: torch.Tensor  # (N,) int64, the positions whose next token is supervised
    targets: torch.Tensor  # (N,) int64, that token
    weights: torch.Tensor  # (N,) float32, its weight
    classes: torch.Tensor  # (N,) int64, the number of its conversation's class


def collate(dataset, conversations, class_weights, shape=None):
    """The Batch of some conversations; class_weights (classes,), or None for no reward.

    No conversations give one token of weight 0, so that the rank can take part. `shape` =
    (tokens, offsets, longest) pads to a fixed number of tokens and of cu_seqlens, so that a
    compiled network sees one shape; the padding is split into conversations of weight 0 with at
    most `longest` tokens each.
    """
    rows = dataset.index[np.asarray(conversations, dtype=np.int64)]
    lengths = rows["length"].tolist()
    tokens = [dataset.tokens[dataset.span(c)] for c in conversations]
    tokens = np.concatenate(tokens or [[]]).astype(np.int64)
    weights = [dataset.weights_of(c, class_weights) for c in conversations]
    weights = np.concatenate(weights or [[]]).astype(np.float32)
    classes = np.repeat(rows["source_class"], lengths).astype(np.int64)
    # Position t predicts token t + 1. Each first token has weight 0: nothing predicts across.
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
    arrays = tokens, positions, ends.astype(np.int32), predicted - 1, targets, weights, classes
    return Batch(*map(torch.from_numpy, arrays))


if __name__ == "__main__":
    from support.preview import main

    main()

"""Conversations in, packed batches out.

    {"class": "gpt4", "messages": [{"role": "user", "content": "Hello"},
                                   {"role": "assistant", "content": "Hi"}]}

becomes, in the class-conditioned template of OpenChat v3.2 (arXiv 2309.11235, section 3.2),

    tokens   <s> GPT4 User: Hello <|end_of_turn|> GPT4 Assistant: Hi <|end_of_turn|>
    weights   0   0    0      0          0         0       0      w        w

where w is the weight of the conversation's class, times the "weight" of the line and of the
message where they have one: only what an assistant says, its end of turn included, is learned.
With Llama 3's tokens (OpenChat 3.6) a turn is <|start_header_id|> GPT4 User <|end_header_id|> and
two newlines, Hello, <|eot_id|>; support/tokenizer.py has both templates.
Every text is tokenized on its own with special tokens off, so that no content can forge a turn.
Beyond --max-length a conversation loses its end, and is dropped where no answer is left.

    a file -> its lines -> parse_conversation -> lay_out -> arrays -> pack -> collate -> Batch
    support/containers.py  support/formats.py    below  support/dataset.py        below

`python data.py FILE --model DIR` checks files and shows what would be trained on.
"""

import dataclasses
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from loss import BETA, DEFAULT_CLASSES, class_table, class_weights, read_classes
from support import report
from support.containers import sources
from support.dataset import ARRAYS, INDEX, Account, encode_files
from support.dataset import BadData as BadData  # "as": a name that others take from here
from support.dataset import Dataset as Dataset
from support.flags import Parser
from support.formats import BadLine, Conversation, parse_conversation, parse_json
from support.formats import Message as Message
from support.picture import draw_batch, first_of_all_classes, require_matplotlib
from support.tokenizer import Tokenizer as Tokenizer

# --------------------------------------------------------------------------- one conversation


def lay_out(messages, contents, tokenizer, condition):
    """The tokens, in parts, and their weights [(weight, how many), ...]; `contents` are ids.

    <s>, then a turn: prefix, content, end of turn. Content and end of turn weigh what the
    message says, stored as support.dataset says; all else 0.
    """
    parts, weights = [[tokenizer.bos]], [(0.0, 1)]
    for message, content in zip(messages, contents, strict=True):
        prefix = tokenizer.prefix(condition, message.role)
        weight = message.weight if message.role == "assistant" else 0.0
        if message.final:
            weight = -message.weight
        parts += [prefix, content, [tokenizer.eot]]
        weights += [(0.0, len(prefix)), (weight, len(content) + 1)]
    return parts, weights


def turn_texts(messages, tokenizer):
    return [tokenizer.turn_text(message.role, message.content) for message in messages]


def cut(weights, length):
    """As many of [(weight, how many), ...] as make up `length` tokens."""
    ends = itertools.accumulate(count for _, count in weights)
    left = [(w, count - max(0, end - length)) for (w, count), end in zip(weights, ends)]
    return [(weight, count) for weight, count in left if count > 0]


def encode(conversation, tokenizer, classes):
    """(tokens, supervised mask), two lists of one length, of a JSON line or a Conversation."""
    classes = class_table(classes)
    if not isinstance(conversation, Conversation):
        conversation = parse_conversation(conversation, classes)
    contents = map(tokenizer.encode, turn_texts(conversation.messages, tokenizer))
    condition = classes[conversation.source_class].condition
    parts, weights = lay_out(conversation.messages, contents, tokenizer, condition)
    return flat(parts), [weight != 0 for weight, count in weights for _ in range(count)]


def encode_prompt(messages, tokenizer, condition):
    """The tokens after which the model answers: all turns, then 'GPT4 Assistant:'."""
    contents = map(tokenizer.encode, turn_texts(messages, tokenizer))
    parts, _ = lay_out(messages, contents, tokenizer, condition)
    return flat(parts) + tokenizer.prefix(condition, "assistant")


def flat(parts):
    return [token for part in parts for token in part]


# --------------------------------------------------------------------------- files to arrays


def prepare(
    paths, tokenizer, classes, folder, *, max_length, condition=True, class_field="class",
    skip_bad=False, progress=None,
):  # fmt: skip
    """Tokenize files once into memory-mapped arrays below `folder`; returns a Dataset.

    A path may be CLASS=FILE; else `class_field` names a conversation's class. `condition=False`
    leaves the class out of the prompt. `progress(done bytes, all bytes, conversations)` is called
    as it goes. Raises BadData after all files were checked, unless `skip_bad`; a conversation cut
    so that no answer is left is dropped and counted.
    """
    classes = class_table(classes)
    files = sources(paths, classes)
    conditions = {name: c.condition if condition else "" for name, c in classes.items()}
    names = {name: [c.condition, c.match] for name, c in classes.items()}  # as lines name them
    if class_field == "class":
        names = {name: c.condition for name, c in classes.items()}
    ids = tokenizer.identity()
    settings = [tokenizer.template.name, conditions, names, class_field, max_length, ids]
    encoder = Encoder(tokenizer, classes, class_field, conditions, max_length)
    return encode_files(files, encoder, settings, folder, skip_bad=skip_bad, progress=progress)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Makes arrays of a Block of lines."""

    tokenizer: Tokenizer
    classes: dict
    class_field: str
    conditions: dict  # {class: condition}
    max_length: int

    def __call__(self, block):
        """(arrays as ARRAYS, Account of the rest); rows start at this block."""
        account, conversations = Account(), []
        for number, raw in enumerate(block.raw, start=block.number + 1):
            try:
                line = parse_json(raw)
                if line is not None:
                    conversation = parse_conversation(
                        line, self.classes, self.class_field, block.source.source_class
                    )
                    conversations.append((number, conversation))
                    if conversation.not_read:
                        account.not_read.update(conversation.not_read)
            except BadLine as error:
                account.refuse(block, number, error)
        texts = [t for _, c in conversations for t in turn_texts(c.messages, self.tokenizer)]
        ids = iter(self.tokenizer.encode_many(texts) if texts else [])
        names = list(self.classes)
        all_parts, all_weights, rows = [], [], []  # of weights (weight, how many)
        for number, conversation in conversations:
            contents = [next(ids) for _ in conversation.messages]
            condition = self.conditions[conversation.source_class]
            parts, weights = lay_out(conversation.messages, contents, self.tokenizer, condition)
            length, answered = sum(map(len, parts)), any(weight for weight, _ in weights)
            if length > self.max_length:
                account.counted["cut"] += 1
                account.counted["tokens_cut"] += length - self.max_length
                length, weights = self.max_length, cut(weights, self.max_length)
                parts = [np.concatenate(parts)[:length]]
            learned = sum(count for weight, count in weights if weight)
            if not learned:
                account.counted["answer_cut" if answered else "weightless"] += 1
                continue
            factors = sum(weight * count for weight, count in weights if weight > 0)
            final = sum(-weight * count for weight, count in weights if weight < 0)
            source_class = names.index(conversation.source_class)
            rows.append((0, length, source_class, learned, factors, final, block.file, number))
            all_parts += parts
            all_weights += weights
        index = np.array(rows, INDEX)
        index["start"] = np.cumsum(index["length"]) - index["length"]
        values, counts = zip(*all_weights, strict=True) if all_weights else ((), ())
        arrays = {
            "tokens": np.concatenate(all_parts or [[]]).astype(ARRAYS["tokens"]),
            "weights": np.repeat(np.array(values, ARRAYS["weights"]), np.array(counts, int)),
            "index": index,
        }
        account.counted["unknown"] = int((arrays["tokens"] == self.tokenizer.unk).sum())
        account.counted["lost_bytes"] = self.tokenizer.lost_bytes(texts)
        return arrays, account


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
    goes where it fills a bin to 99.6 % without making that the most expensive, else into the
    cheapest bin with room; a bin costs Σ len², its attention. The 0.3 % without room join later
    windows. The last step takes the rest, evenly; only there can a bin be empty.

    On ShareGPT's lengths (at most 2048), 8 bins of 8192 a step: 99.7 % full, the most expensive
    bin 1.02 x the mean, 1M conversations in 2 s (bench/packing.py). A bin of only one or two of
    the longest conversations cannot be evened: with bins of 4096 it is 1.14 x the mean.

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
    most = (1.03 * (table**power).sum(0, dtype=np.float64) / bins).astype(np.float32)
    # Ties favour low columns: without new names rank 0 would get the longest conversations.
    names = rng.permuted(np.arange(gap.size).reshape(gap.shape), axis=1)
    for length, choice in zip(table, chosen):
        added = length**power
        room = gap - length[:, None]
        fills = (room <= SPARE * capacity) & (cost <= (most - added)[:, None])
        score = np.where(fills, -1, cost)
        score[room < 0] = np.inf
        best = score.argmin(1)
        fits = score[rows, best] < np.inf
        choice[fits] = names[rows, best][fits]
        gap[rows, best] -= fits * length
        cost[rows, best] += fits * added
        most = np.maximum(most, cost[rows, best])
    where = np.empty(len(lengths), dtype=np.int64)
    where[longest_first] = chosen[m, window]
    return where


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
    lengths = rows["length"].tolist()
    tokens = [dataset.tokens[dataset.span(c)] for c in conversations]
    tokens = np.concatenate(tokens or [[]]).astype(np.int64)
    weights = [dataset.weights_of(c, class_weights) for c in conversations]
    weights = np.concatenate(weights or [[]]).astype(np.float32)
    classes = np.repeat(rows["source_class"], lengths)
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


# ------------------------------------------------------------------------------- the command


def length_limit(max_length, batch_tokens, context):
    """The tokens at which a conversation is cut, without --max-length 4096, or less if needed.

    `context` is the model's max_position_embeddings, None where it is not known.
    """
    if max_length and context and max_length > context:
        raise ValueError(f"--max-length must be within the model's {context}")
    return max_length or min(4096, batch_tokens, context or 4096)


def main(argv=None):
    parser = Parser(
        prog="data.py", description="Check conversations and show what would be trained on."
    )
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="conversations, or CLASS=FILE: all of one class")
    add("--model", required=True, metavar="DIR", help="folder with its tokenizer")
    add("--classes", metavar="C", help='JSON: {"gpt4": {"condition": "GPT4", "reward": 1.0}, ...}')
    add("--class-field", default="class", metavar="KEY", help="what names a conversation's class")
    add("--beta", type=float, default=BETA, help="w = exp((reward - best reward) / beta)")
    add("--max-length", type=int, help="tokens; longer ones are cut (default: as in train.py)")
    add("--batch-tokens", type=int, default=8192, help="tokens a bin, for the packing's figures")
    add("--ranks", type=int, default=1, help="bins a step: ranks x --accumulate in train.py")
    add("--show", type=int, default=4, metavar="N", help="conversations to show")
    add("--draw", metavar="PNG", help="a picture of one bin as a batch: try --batch-tokens 128")
    add("--skip-bad", action="store_true", help="drop bad lines and count them")
    args = parser.parse_args(argv)
    try:
        run_preview(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        report.StatusLine.end()
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        report.StatusLine.end()
        sys.exit("interrupted")


def run_preview(args):
    from model import LlamaConfig  # not above: the processes that tokenize need no network

    if args.draw:
        require_matplotlib()
    asked = 1 if args.max_length is None else args.max_length
    if not 1 <= asked <= args.batch_tokens or args.ranks < 1:
        raise ValueError("needs 1 <= --max-length <= --batch-tokens and --ranks of at least 1")
    classes = read_classes(args.classes) if args.classes else DEFAULT_CLASSES
    tokenizer = Tokenizer(args.model)
    weights = np.array(list(class_weights(classes, args.beta).values()))
    context = None
    if (Path(args.model) / "config.json").exists():
        context = LlamaConfig.from_folder(args.model).max_position_embeddings
    max_length = length_limit(args.max_length, args.batch_tokens, context)
    with tempfile.TemporaryDirectory() as folder:
        found = prepare(
            args.files, tokenizer, classes, folder, max_length=max_length,
            class_field=args.class_field, skip_bad=args.skip_bad,
            progress=report.Progress("tokenizing"),
        )  # fmt: skip
        print(report.wrapped(report.summary(found, classes, weights)))
        if tokenizer.warning:
            print(tokenizer.warning)
        if context is None:
            print(f"{args.model} has no config.json: the model's context is not known")
        steps = pack(found.lengths, args.batch_tokens, args.ranks, seed=0, epoch=0)
        fill = found.lengths.sum() / (len(steps) * args.ranks * args.batch_tokens)
        shape = f"{args.ranks} x {args.batch_tokens:,} tokens"
        print(
            f"packing: {len(steps):,} steps of {shape}, {fill:.2%} full, "
            f"conversations up to {max_length:,} tokens"
        )
        print(report.wrapped(report.weight_by_step(found, steps, classes, weights)))
        print(f"\n{report.legend(sys.stdout.isatty())}\n")
        for conversation in varied(found, args.show):
            shown = report.preview(
                found, conversation, tokenizer, classes, weights, sys.stdout.isatty()
            )
            print("\n".join(shown))
        if args.draw:
            bins = [b for step in steps for b in step]
            conversations = first_of_all_classes(bins, found.index["source_class"])
            batch = collate(found, conversations, weights)
            of_class = found.index["source_class"][conversations].tolist()
            draw_batch(args.draw, batch, of_class, classes, tokenizer)
            print(f"drawn: {args.draw}")


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

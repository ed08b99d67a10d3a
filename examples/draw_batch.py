"""One micro-batch drawn as the network meets it: a PNG of the fullest mix of classes in FILE.

    python examples/draw_batch.py FILE --model DIR --out PNG

From the top, over the T positions of the batch: the conversations end to end, each in the colour of
its class; the positions, from 0 in each; the weight of every supervised token; and the rows that
reach the head, each one before the token that it predicts. Needs matplotlib.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data  # noqa: E402
import loss  # noqa: E402
from support.flags import PYTHON, Parser  # noqa: E402
from support.report import visible  # noqa: E402

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
SPELLED = 160  # tokens up to which each is written out


def draw_batch(path, batch, source_classes, classes, tokenizer):
    """A data.Batch without padding as a PNG; source_classes: the class number per conversation."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a window system
    from matplotlib.patches import Patch

    T, N = len(batch.tokens), len(batch.rows)
    figure = Figure((12, 5.2), layout="constrained")
    heights = {"height_ratios": [2.2 if T <= SPELLED else 0.7, 1.4, 1.4, 0.5]}
    packed, positions, weights, head = figure.subplots(4, 1, sharex=True, gridspec_kw=heights)
    ends = batch.cu_seqlens.tolist()
    for (start, end), number in zip(itertools.pairwise(ends), source_classes, strict=True):
        packed.axvspan(start, end, color=colour(number), alpha=0.25, linewidth=0)
    if T <= SPELLED:
        for at, token in enumerate(batch.tokens.tolist()):
            text = visible([token], tokenizer).strip() or "␣"
            size = min(7, 640 / T)  # points, as wide as the token has room
            packed.text(at + 0.5, 0.5, text, rotation=90, ha="center", va="center", fontsize=size)
    middles = np.arange(T) + 0.5
    positions.plot(middles, batch.positions.numpy(), ".", color="black", markersize=3)
    supervised = batch.rows.numpy() + 1  # a row predicts the token after it
    colours = [colour(number) for number in batch.classes.tolist()]
    weights.bar(supervised + 0.5, batch.weights.numpy(), 1, color=colours, linewidth=0)
    head.bar(batch.rows.numpy() + 0.5, 1, 1, color="black", linewidth=0)
    packed.set(title=f"conversations end to end: {T:,} tokens", yticks=[], xlim=(0, T))
    positions.set(title="positions, from 0 in each: no token sees another conversation's")
    weights.set(title="weight w of supervised tokens: answers, with their ends of turn", ylim=0)
    title = f"rows that reach the head and the loss: {N:,} of {T:,}, each before its token"
    head.set(title=title, yticks=[], xlabel="token of the micro-batch")
    for panel in (packed, positions, weights, head):
        panel.title.set_fontsize(9)
        for end in ends:
            panel.axvline(end, color="gray", linewidth=0.5)
    found = dict.fromkeys(source_classes)
    handles = [Patch(color=colour(n), alpha=0.6, label=list(classes)[n]) for n in found]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=150)


def colour(number):
    return COLOURS[number % len(COLOURS)]


def first_of_all_classes(bins, source_classes):
    """The first bin with as many classes as any of them has."""
    return max(bins, key=lambda conversations: len(set(source_classes[conversations])))


def draw(args):
    classes = loss.read_classes(args.classes) if args.classes else loss.DEFAULT_CLASSES
    tokenizer = data.Tokenizer(args.model)
    weights = np.array(list(loss.class_weights(classes, args.beta).values()))
    length = args.max_length or args.batch_tokens
    with tempfile.TemporaryDirectory() as folder:
        found = data.prepare(
            args.files, tokenizer, classes, folder, max_length=length, beta=args.beta
        )
        steps = data.pack(found.lengths, args.batch_tokens, 1, seed=0, epoch=0)
        chosen = first_of_all_classes([b for (b,) in steps], found.index["source_class"])
        of_class = found.index["source_class"][chosen].tolist()
        batch = data.collate(found, chosen, weights)
    draw_batch(args.out, batch, of_class, classes, tokenizer)
    print(f"drawn: {args.out}")


def main(argv=None):
    parser = Parser(prog="draw_batch.py", description="A picture of one micro-batch.")
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="conversations, or CLASS=FILE: all of one class")
    add("--model", required=True, metavar="DIR", help="folder with its tokenizer")
    add("--out", default="batch.png", metavar="PNG", help="default: batch.png")
    add("--classes", metavar="C", help="the class table, as for data.py")
    add("--beta", type=float, default=loss.BETA, help="w = exp((reward - best reward) / beta)")
    add("--batch-tokens", type=int, default=128, help="tokens of the micro-batch (default 128)")
    add("--max-length", type=int, help="tokens; longer conversations are cut")
    try:
        draw(parser.parse_args(argv))
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: {PYTHON} -m pip install matplotlib")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""One micro-batch drawn as the network meets it: `python data.py FILE --model DIR --draw PNG`.

From the top, over the T positions of the batch: the conversations end to end, each with its own
class's colour; the positions, which start again with each; the weight of every token that is
learned; and the rows that reach the head, each one before the token that it learns.
"""

import importlib.util
import itertools

import numpy as np

from support.report import visible

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
SPELLED = 160  # tokens up to which each is written out


def draw_batch(path, batch, source_classes, classes, tokenizer):
    """A data.Batch without padding as a PNG; source_classes: a class's number a conversation."""
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
            packed.text(at + 0.5, 0.5, text, rotation=90, ha="center", va="center", fontsize=7)
    middles = np.arange(T) + 0.5
    positions.plot(middles, batch.positions.numpy(), ".", color="black", markersize=3)
    learned = batch.rows.numpy() + 1  # the token after a row is what the row learns
    colours = [colour(number) for number in batch.classes.tolist()]
    weights.bar(learned + 0.5, batch.weights.numpy(), 1, color=colours, linewidth=0)
    head.bar(batch.rows.numpy() + 0.5, 1, 1, color="black", linewidth=0)
    for panel in (packed, positions, weights, head):
        for end in ends:
            panel.axvline(end, color="gray", linewidth=0.5)
    packed.set(title=f"conversations end to end: {T:,} tokens", yticks=[], xlim=(0, T))
    positions.set(title="positions, from 0 in each: no token sees another conversation's")
    weights.set(title="weight w of what is learned: answers, with their ends of turn", ylim=0)
    title = f"rows that reach the head and the loss: {N:,} of {T:,}, each before its token"
    head.set(title=title, yticks=[], xlabel="token of the micro-batch")
    for panel in (packed, positions, weights, head):
        panel.title.set_fontsize(9)
    found = dict.fromkeys(source_classes)
    handles = [Patch(color=colour(n), alpha=0.6, label=list(classes)[n]) for n in found]
    figure.legend(handles=handles, loc="outside right upper")
    figure.savefig(path, dpi=100)


def require_matplotlib():
    """ValueError that says what to install, before anything else is done."""
    if not importlib.util.find_spec("matplotlib"):
        raise ValueError("a picture needs matplotlib: pip install -r requirements-dev.txt")


def colour(number):
    return COLOURS[number % len(COLOURS)]


def first_of_all_classes(bins, source_classes):
    """The first bin with as many classes as any of them has."""
    return max(bins, key=lambda conversations: len(set(source_classes[conversations])))

"""Curves of one or more runs, drawn from their metrics.jsonl.

    python plot.py RUN                  RUN/curves.png
    python plot.py RUN [RUN...]         overlaid, in the first one's curves.png
    python plot.py RUN --to FILE.png

Panels: loss and token accuracy by class (lines: training, smoothed; dots: held out), each class's
share of a step's weight, learning rate, gradient norm, tokens per second. A class has the same
colour in all panels, a run the same line style.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

from support.files import read_metrics
from support.flags import Parser

STYLES = ("-", "--", ":", "-.")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def read(run):
    """(steps, evaluations) of a run's folder: the lines of its metrics.jsonl, each a dict."""
    path = Path(run) / "metrics.jsonl"
    if not Path(run).is_dir():
        raise ValueError(f"{run}: not found; RUN is the folder given to --out")
    lines = read_metrics(path)
    steps = [line for line in lines if "eval" not in line]
    if not steps:
        raise ValueError(f"{path}: no step is logged yet")
    return steps, [line for line in lines if "eval" in line]


def draw(runs, path):
    """All curves of `runs`, [(name, (steps, evaluations))], into a PNG."""
    from matplotlib.figure import Figure  # no pyplot: it would look for a window system
    from matplotlib.ticker import PercentFormatter

    figure = Figure((12, 6.5), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 3).flat, strict=True))
    for (name, (steps, evaluations)), style in zip(runs, itertools.cycle(STYLES)):
        for key in ("lr", "grad_norm", "tokens_per_second"):
            curve(panels[key], steps, [step.get(key) for step in steps], style, "black", name)
        for source_class, colour in zip(steps[0]["classes"], itertools.cycle(COLOURS)):
            label = f"{name} {source_class}" if len(runs) > 1 else source_class
            by_class(panels, steps, evaluations, source_class, style, colour, label)
    for key, panel in panels.items():
        title, unit = PANELS[key]
        panel.set(title=title, xlabel="step", ylabel=unit)
        panel.grid(alpha=0.3)
    panels["loss"].set_yscale("log")
    panels["weight_share"].set_ylim(0, 1)
    for key in ("accuracy", "weight_share"):
        panels[key].yaxis.set_major_formatter(PercentFormatter(1))
    panels["loss"].legend(fontsize=8)
    if len(runs) > 1:
        panels["lr"].legend(fontsize=8)
    figure.savefig(path, dpi=100)


PANELS = {  # title, unit
    "loss": ("loss by class (dots: held out)", "nats per supervised token, unweighted"),
    "accuracy": ("accuracy by class (dots: held out)", "supervised tokens predicted right"),
    "weight_share": ("weight by class", "share of a step's weight"),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "before clipping"),
    "tokens_per_second": ("speed", "tokens per second, all ranks"),
}


def by_class(panels, steps, evaluations, source_class, style, colour, label):
    """One class of one run, in the three panels that have curves per class."""
    for key in ("loss", "accuracy", "weight_share"):
        values = [step["classes"].get(source_class, {}).get(key) for step in steps]
        if any(values):  # else no conversation of this class was trained on
            curve(panels[key], steps, values, style, colour, label)
        held_out = [(e["step"], e["eval"].get(source_class, {}).get(key)) for e in evaluations]
        held_out = [point for point in held_out if point[1] is not None]
        if held_out and key != "weight_share":
            panels[key].plot(*zip(*held_out, strict=True), "o", color=colour, markersize=4)


def curve(panel, steps, values, style, colour, label):
    x = [step["step"] for step in steps]
    label = " " * label.startswith("_") + label.replace("$", r"\$")  # as matplotlib takes a text
    panel.plot(x, smoothed(values), style, color=colour, linewidth=1, label=label)


def smoothed(values):
    """Means over the last 2 % of the steps; a step without the class (None) is left out."""
    values = np.array(values, dtype=np.float64)  # None becomes NaN
    window = 1 + len(values) // 50
    known = np.isfinite(values)
    sums = np.cumsum([np.where(known, values, 0), known], axis=1)
    sums[:, window:] -= sums[:, :-window].copy()
    return np.divide(*sums, out=np.full(len(values), np.nan), where=sums[1] > 0)


def main(argv=None):
    parser = Parser(prog="plot.py", description="Curves of runs of train.py.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folders that train.py wrote (--out)")
    add("--to", metavar="FILE.png", help="default: curves.png in the first RUN")
    args = parser.parse_args(argv)
    target = args.to or Path(args.runs[0]) / "curves.png"
    try:
        draw([(run, read(run)) for run in args.runs], target)
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] != "matplotlib":
            raise
        sys.exit("plot.py needs matplotlib: pip install -r requirements-dev.txt")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"drawn: {target}")


if __name__ == "__main__":
    main()

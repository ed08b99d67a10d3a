"""Plots one or more runs from their metrics.jsonl.

    python plot.py RUN                  RUN/curves.png
    python plot.py RUN OTHER...         overlaid, in RUN/curves-OTHER.png
    python plot.py RUN --to FILE.png

Loss and token accuracy by class (lines: training, smoothed; dots: held out), each class's share of
a step's weight, learning rate, gradient norm, speed. A class has one colour, a run one line style.
"""

import itertools
import sys
from pathlib import Path

import numpy as np

from support.files import read_metrics
from support.flags import PYTHON, Parser

STYLES = ("-", "--", ":", "-.")


def read(run):
    """(steps, evaluations) of a run's folder: the lines of its metrics.jsonl, each a dict."""
    path = Path(run) / "metrics.jsonl"
    lines = read_metrics(path)
    steps = [line for line in lines if "eval" not in line]
    if not steps:
        raise ValueError(f"{path}: no step is logged there yet; RUN is the folder given to --out")
    return steps, [line for line in lines if "eval" in line]


PANELS = {  # title, unit; the first three have a curve per class
    "loss": ("loss by class (dots: held out)", "nats per supervised token, unweighted"),
    "accuracy": ("token accuracy by class (dots: held out)", "supervised tokens predicted right"),
    "weight_share": ("weight by class", "share of a step's weight"),
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", "before clipping"),
    "tokens_per_second": ("speed", "tokens per second, all ranks"),
}
BY_CLASS, BY_RUN = list(PANELS)[:3], list(PANELS)[3:]


def draw(runs, path):
    """All curves of `runs`, [(name, (steps, evaluations))], into a PNG."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a window system
    from matplotlib.ticker import PercentFormatter

    figure = Figure((12, 6.5), layout="constrained")
    panels = dict(zip(PANELS, figure.subplots(2, 3).flat, strict=True))
    for (name, (steps, evaluations)), style in zip(runs, itertools.cycle(STYLES)):
        x = [step["step"] for step in steps]
        for key in BY_RUN:
            y = smoothed([step.get(key) for step in steps])
            panels[key].plot(x, y, style, c="black", lw=1)
        for number, of in enumerate(steps[0]["classes"]):
            colour, label = f"C{number}", f"{name} {of}" if len(runs) > 1 else of
            # As it is: not as a formula, nor left out of the legend.
            label = " " * label.startswith("_") + label.replace("$", r"\$")
            for key in BY_CLASS:
                values = [step["classes"].get(of, {}).get(key) for step in steps]
                if any(values):  # else no conversation of this class was trained on
                    y = smoothed(values)
                    panels[key].plot(x, y, style, c=colour, lw=1, label=label)
                points = [(e["step"], e["eval"].get(of, {}).get(key)) for e in evaluations]
                if points and key != "weight_share":
                    points = np.array(points, dtype=np.float64)  # None becomes NaN: no dot
                    panels[key].plot(*points.T, "o", c=colour, ms=4)
    for panel, (title, unit) in zip(panels.values(), PANELS.values(), strict=True):
        panel.set(title=title, xlabel="step", ylabel=unit)
        panel.grid(alpha=0.3)
    handles, labels = panels["loss"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    panels["weight_share"].set_ylim(0, 1)
    for key in ("accuracy", "weight_share"):
        panels[key].yaxis.set_major_formatter(PercentFormatter(1))
    figure.savefig(path, dpi=100)


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
    add("--to", metavar="FILE.png", help="default: a curves*.png in the first RUN")
    args = parser.parse_args(argv)
    names = ["curves", *(Path(run).resolve().name for run in args.runs[1:])]
    target = args.to or Path(args.runs[0]) / f"{'-'.join(names)}.png"
    try:
        draw([(run, read(run)) for run in args.runs], target)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: {PYTHON} -m pip install matplotlib")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"drawn: {target}")


if __name__ == "__main__":
    main()

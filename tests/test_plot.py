"""plot.py: a PNG from any metrics.jsonl that train.py writes, and plain words where it cannot."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

import plot


def write_run(folder, steps, classes=("gpt4", "gpt3.5")):
    folder.mkdir()
    lines = [{"step": 0, "eval": {name: measures(0) for name in classes}}]
    for step in range(1, steps + 1):
        of_step = {"step": step, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_second": 5e4}
        lines.append(of_step | {"loss": 1.0, "classes": {n: measures(step) for n in classes}})
    lines.append({"step": steps, "eval": {name: measures(steps) for name in classes}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def measures(step):
    if step % 3 == 2:  # a step without this class
        return {"tokens": 0, "loss": None, "accuracy": None, "weight_share": 0.0}
    return {"tokens": 9, "loss": 1 / (step + 1), "accuracy": 0.5, "weight_share": 0.5}


@pytest.fixture
def drawn(monkeypatch):
    """drawn(*arguments) is {panel: [(colour and style, x, y) of each curve]}."""
    figures, figure = [], pytest.importorskip("matplotlib.figure").Figure
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda f, *to, **how: figures.append(f) or save(f, *to))

    def drawn(*arguments):
        plot.main([*map(str, arguments)])
        keys = {title: key for key, (title, _) in plot.PANELS.items()}
        return {keys[axes.get_title()]: [*map(curve, axes.lines)] for axes in figures[-1].axes}

    drawn.figures = figures
    return drawn


def curve(line):
    style = line.get_linestyle() if line.get_marker() == "None" else line.get_marker()
    return f"{line.get_color()} {style}", line.get_xdata().tolist(), line.get_ydata().tolist()


def test_every_panel_shows_its_own_quantity_of_every_class(drawn, tmp_path):
    def of(loss, accuracy, weight_share):
        return {"loss": loss, "accuracy": accuracy, "weight_share": weight_share}

    lines = [
        {"step": 0, "eval": {"a": of(9, 0.1, 0.5), "b": of(8, 0.2, 0.5)}},
        {"step": 1, "lr": 1, "grad_norm": 2, "tokens_per_second": 3,
         "classes": {"a": of(7, 0.3, 0.8), "b": of(6, 0.4, 0.2)}},
        {"step": 2, "lr": 4, "grad_norm": 5, "tokens_per_second": 6,
         "classes": {"a": of(4, 0.5, 1), "b": of(None, None, 0)}},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3, "lo')  # a live run's half line
    nothing = pytest.approx(math.nan, nan_ok=True)
    assert drawn(tmp_path) == {
        "loss": [
            ("C0 -", [1, 2], [7, 4]), ("C0 o", [0], [9]),
            ("C1 -", [1, 2], [6, nothing]), ("C1 o", [0], [8]),
        ],
        "accuracy": [
            ("C0 -", [1, 2], [0.3, 0.5]), ("C0 o", [0], [0.1]),
            ("C1 -", [1, 2], [0.4, nothing]), ("C1 o", [0], [0.2]),
        ],
        "weight_share": [
            ("C0 -", [1, 2], [0.8, 1]), ("C1 -", [1, 2], [0.2, 0])
        ],
        "lr": [("black -", [1, 2], [1, 4])],
        "grad_norm": [("black -", [1, 2], [2, 5])],
        "tokens_per_second": [("black -", [1, 2], [3, 6])],
    }  # fmt: skip
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_of_classes_names_its_unit_and_shares_are_in_percent(drawn, tmp_path):
    drawn(write_run(tmp_path / "run", 3))
    loss, accuracy, weight, *_ = drawn.figures[-1].axes
    assert "nats per supervised token" in loss.get_ylabel()
    assert accuracy.get_ylabel().startswith("supervised tokens")
    assert weight.get_ylabel() == "share of a step's weight"
    assert weight.get_ylim() == (0, 1)
    for panel in (accuracy, weight):
        assert panel.yaxis.get_major_formatter()(0.25).startswith("25")


def test_runs_of_different_classes_share_a_figure(drawn, tmp_path):
    runs = [write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 9, ("human", "model", "web"))]
    shown = drawn(*runs, "--to", tmp_path / "both.png")["weight_share"]
    assert [(look, len(x)) for look, x, _ in shown] == [
        ("C0 -", 3), ("C1 -", 3),
        ("C0 --", 9), ("C1 --", 9), ("C2 --", 9),
    ]  # fmt: skip
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_runs_together_overwrite_no_run_s_own_curves(drawn, tmp_path):
    runs = [write_run(tmp_path / name, 3) for name in "abc"]
    drawn(runs[0])
    alone = (runs[0] / "curves.png").read_bytes()
    drawn(*runs[:2]), drawn(*runs)
    assert {path.name for path in runs[0].glob("*.png")} == {
        "curves.png", "curves-b.png", "curves-b-c.png"
    }  # fmt: skip
    assert (runs[0] / "curves.png").read_bytes() == alone


@pytest.mark.parametrize("low, high", [(0.01, 9), (1.2, 1.4), (3.9, 4.2), (0.5, 60), (1e-5, 1)])
def test_the_ticks_of_a_loss_are_plain_numbers_and_at_least_three(low, high, drawn, tmp_path):
    run = write_run(tmp_path / "run", 0)
    lines = [
        {"step": step, "classes": {"a": {"loss": value}}} for step, value in ((1, high), (2, low))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn(run)
    axis = drawn.figures[-1].axes[0].yaxis
    bottom, top = axis.get_view_interval()
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    texts = [label.get_text() for at, label in ticks if bottom <= at <= top]
    minor = [label.get_text() for label in axis.get_ticklabels(minor=True)]
    assert len(texts) >= 3 and not any(minor)
    assert all(re.fullmatch(r"[\d.]+(e[-−]\d+)?", text) for text in texts), texts


def test_no_legend_covers_a_curve(drawn, tmp_path):
    drawn(write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 3))
    figure = drawn.figures[-1]
    (legend,) = figure.legends
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert not any(box.overlaps(legend.get_window_extent()) for box in boxes)
    assert not any(axes.get_legend() for axes in figure.axes)


def test_smoothing_is_a_trailing_mean_of_known_values():
    values = [None, *range(99)]  # 100 steps: a window of 3
    assert plot.smoothed(values)[1:5].tolist() == [0, 0.5, 1, 2]
    assert plot.smoothed([None, 2.0])[1] == 2.0


@pytest.mark.parametrize("text", ["", '{"step": 0, "eval": {}}\n'])
def test_a_run_without_steps_is_an_error(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="no step is logged there yet"):
        plot.main([str(tmp_path)])


@pytest.mark.parametrize("odd", ["[1, 2]", "7", '{"step": "x"}', "[" * 200_000, '{"step": 1e9}'])
def test_an_odd_line_is_one_error_that_names_it(tmp_path, odd):
    path = write_run(tmp_path / "run", 2) / "metrics.jsonl"
    path.write_text(path.read_text() + odd + "\n")
    with pytest.raises(SystemExit, match=rf"^error: {path}:5: cannot be read: .*$"):
        plot.main([str(tmp_path / "run")])


def test_any_name_of_a_class_and_of_a_run_is_its_label(drawn, tmp_path, monkeypatch):
    """As $ begins a formula in matplotlib, and a label with _ is left out of a legend."""
    monkeypatch.chdir(tmp_path)
    names = ["$\\frac$", "_x", "a$b", "50%"]
    drawn(write_run(Path("alone"), 3, names))
    assert labels(drawn) == names
    drawn(write_run(Path("$\\frac$"), 3, ["c"]), write_run(Path("_b"), 3, ["c"]))
    assert labels(drawn) == ["$\\frac$ c", "_b c"]


def labels(drawn):
    (legend,) = drawn.figures[-1].legends
    texts = legend.get_texts()
    return [text.get_text().strip().replace("\\$", "$") for text in texts]


def test_a_class_that_only_some_lines_have_is_left_out_of_the_others(drawn, tmp_path):
    run = write_run(tmp_path / "run", 3)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del lines[2]["classes"]["gpt3.5"], lines[3]["lr"], lines[-1]["eval"]["gpt4"]["loss"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert drawn(run)["weight_share"][1][1] == [1, 2, 3]


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="metrics.jsonl"):
        plot.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="nowhere/metrics.jsonl: .* RUN is the folder"):
        plot.main([str(tmp_path / "nowhere")])


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^error: .*python\S* -m pip install matplotlib$"):
        plot.main([str(write_run(tmp_path / "run", 2))])

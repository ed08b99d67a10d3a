"""plot.py: a PNG from any metrics.jsonl that train.py writes, and plain words where it cannot."""

import json
import sys

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


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def test_one_run_is_drawn_beside_itself(tmp_path):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", 120)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 121, "lo')  # a live run's half-written line
    plot.main([str(run)])
    assert is_png(run / "curves.png")


def test_runs_of_different_classes_share_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [write_run(tmp_path / "a", 3), write_run(tmp_path / "b", 9, ("human", "model", "web"))]
    plot.main([*map(str, runs), "--to", str(tmp_path / "both.png")])
    assert is_png(tmp_path / "both.png")


def test_smoothing_is_a_trailing_mean_of_known_values():
    values = [None, *range(99)]  # 100 steps: a window of 3
    assert plot.smoothed(values)[1:5].tolist() == [0, 0.5, 1, 2]
    assert plot.smoothed([None, 2.0])[1] == 2.0


@pytest.mark.parametrize("text", ["", '{"step": 0, "eval": {}}\n'])
def test_a_run_without_steps_is_an_error(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="no step is logged yet"):
        plot.main([str(tmp_path)])


def test_a_folder_without_metrics_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="metrics.jsonl"):
        plot.main([str(tmp_path)])


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="requirements-dev.txt"):
        plot.main([str(write_run(tmp_path / "run", 2))])

"""The picture of a packed batch shows what the network is given, by an account of its own."""

import itertools
import sys

import numpy as np
import pytest
from processes import ROOT

sys.path.insert(0, str(ROOT / "examples"))

import draw_batch  # noqa: E402


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """panels(*flags) are the four axes of the picture of some sums."""
    figure, figures = pytest.importorskip("matplotlib.figure").Figure, []
    save = figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda f, *to, **how: figures.append(f) or save(f, *to))

    def panels(*flags):
        path = tmp_path / "batch.png"
        files = ["examples/sums/train.jsonl", "--model", "examples/sums", "--max-length", "64"]
        draw_batch.main([*files, "--out", str(path), *flags])
        assert path.read_bytes()[:4] == b"\x89PNG"
        return figures[-1].axes

    return panels


def bars(panel):
    return {round(bar.get_x()): bar.get_height() for bar in panel.patches}


def to_hex(colour):
    return "#" + "".join(f"{round(255 * part):02x}" for part in colour[:3])


def test_weights_stand_on_the_answers_and_rows_one_before(panels):
    packed, positions, weights, head = panels("--batch-tokens", "112")
    texts = [text.get_text() for text in packed.texts]
    starts = [at for at, text in enumerate(texts) if text == "<s>"]
    supervised, w, answering = {}, 0.0, False
    for at, text in enumerate(texts):  # read as a person would, from the tokens written out
        w = {"GPT4": 1.0, "GPT3": 0.1}.get(text, w)
        if text in ("GPT4", "GPT3", "<s>"):
            answering = False
        if answering:
            supervised[at] = w
        answering = answering or text == "Assistant:"
    assert set(supervised.values()) == {1.0, 0.1} and len(starts) >= 3
    assert bars(weights) == pytest.approx(supervised)
    assert sorted(bars(head)) == [at - 1 for at in sorted(supervised)]
    ends = [*starts, len(texts)]
    counted = [at for a, b in zip(ends, ends[1:]) for at in range(b - a)]
    assert positions.lines[0].get_ydata().tolist() == counted
    lines = [line.get_xdata()[0] for line in packed.lines]
    assert lines == ends
    drawn = [to_hex(span.get_facecolor()) for span in packed.patches]
    assert drawn == [{"GPT4": "#1f77b4", "GPT3": "#ff7f0e"}[texts[at + 1]] for at in starts]


@pytest.mark.parametrize("tokens", ["64", "112", "160"])
def test_no_token_is_written_over_another(tokens, panels):
    packed = panels("--batch-tokens", tokens)[0]
    boxes = [text.get_window_extent() for text in packed.texts if text.get_text()]
    assert all(left.x1 <= right.x0 + 0.5 for left, right in itertools.pairwise(boxes))
    whole = packed.get_window_extent()
    assert all(whole.y0 < box.y0 and box.y1 < whole.y1 for box in boxes)


def test_a_long_batch_is_drawn_without_its_texts(panels):
    packed, _, weights, _ = panels("--batch-tokens", "1024")
    assert not packed.texts and len(bars(weights)) > 100


def test_the_bin_with_most_classes_is_shown():
    chosen = draw_batch.first_of_all_classes([[0, 1], [1, 2], [2, 3]], np.array([0, 0, 1, 1]))
    assert chosen == [1, 2]


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^error: .*python\S* -m pip install matplotlib$"):
        draw_batch.main(["examples/sums/eval.jsonl", "--model", "examples/sums"])

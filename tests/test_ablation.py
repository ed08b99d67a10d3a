"""examples/ablation.py held to account: its runs are train.py's, and where C-RLFT can have no
advantage, it finds none."""

import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import ablation  # noqa: E402
import stories  # noqa: E402
from ablation import EXPERT, SUBOPTIMAL, Run  # noqa: E402

import train  # noqa: E402

NOISY = "examples/noisy"


def as_held_out_by_train(run, folder):
    """A judge that asks nothing: train.py's last evaluation, and what the run's files hold."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line["eval"] for line in lines if "eval" in line][-1]
    for line in lines:
        for of_machine in [key for key in line if "second" in key or key == "memory_bytes"]:
            del line[of_machine]
    weights = (folder / "model" / "model.safetensors").read_bytes().hex()
    return last | {"lines": lines, "weights": weights}


def test_infinite_beta_equals_without_reward(tmp_path):
    runs = [Run(NOISY, 3, ratio=1.0), Run(NOISY, 3, reward=False), Run(NOISY, 3)]
    scores = ablation.finish(runs, tmp_path, 2, as_held_out_by_train)
    infinite, without, rewarded = (scores[run] for run in runs)
    assert infinite["lines"] == without["lines"]
    assert infinite["weights"] == without["weights"]
    assert rewarded["weights"] != without["weights"]


def test_shuffled_labels_leave_no_advantage(tmp_path):
    """The expert's condition is worth nothing once the labels say nothing, and much before."""
    runs = [Run(NOISY, 100), Run(NOISY, 100, shuffled=True)]
    scores = ablation.finish(runs, tmp_path, 2)
    told, shuffled = ([scores[run][c]["sampled"] for c in (EXPERT, SUBOPTIMAL)] for run in runs)
    assert told[0] > told[1] + 0.1 and told[0] > shuffled[0] + 0.1
    assert abs(shuffled[0] - shuffled[1]) < 0.05


def test_a_row_is_the_flags_of_the_paper():
    shown = {}
    for row, (fields, _) in ablation.ROWS.items():
        flags = Run("examples/sums", 7, seed=2, **fields | {"expert": 1.0, "suboptimal": 1.0})
        config = train.parse_arguments(flags.flags(Path("run")))
        assert (config.max_steps, config.seed, config.out) == (7, 2, "run")
        assert config.beta == pytest.approx(0.4343, abs=1e-4)
        shown[row] = config.condition, config.reward
    assert shown == {
        "C-RLFT": (True, True),
        "without reward": (True, False),
        "without condition": (False, True),
        "SFT, expert only": (False, False),
        "SFT, sub-optimal only": (False, False),
        "SFT, all": (False, False),
    }


def test_parts_of_the_data_hold_the_asked_shares(tmp_path):
    def classes(**fields):
        path = Run(NOISY, 1, **fields).data(tmp_path)
        return [json.loads(line)["class"] for line in path.read_text().splitlines()]

    whole = classes()
    assert classes(suboptimal=0.0) == [EXPERT] * whole.count(EXPERT)
    assert classes(expert=0.25).count(EXPERT) == whole.count(EXPERT) // 4
    assert classes(expert=0.25).count(SUBOPTIMAL) == whole.count(SUBOPTIMAL)
    shuffled = classes(shuffled=True)
    assert shuffled != whole and sorted(shuffled) == sorted(whole)


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    run = Run(NOISY, 1)
    trained = []

    def train_nothing(flags, folder, threads):
        trained.append(folder)
        folder.mkdir(parents=True)

    def judge(run, folder):
        return {"questions": 4, EXPERT: {"greedy": 0.5}}

    monkeypatch.setattr(ablation, "train", train_nothing)
    first = ablation.finish([run, run], tmp_path, 2, judge)
    again = ablation.finish([run], tmp_path, 1, judge)
    assert trained == [run.folder(tmp_path)]
    assert first == again and first[run]["run"]["steps"] == 1


def test_a_failed_run_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="--model is required"):
        ablation.train(["--data", "none.jsonl"], tmp_path)


def test_spoilt_words_keep_their_letters_and_ends():
    text = "She went to the park, and there was an old oak tree."
    spoilt = stories.spoil(text, random.Random(3))
    assert spoilt != text
    for before, after in zip(text.split(), spoilt.split(), strict=True):
        assert sorted(before) == sorted(after) and before[0] == after[0]
        assert before == after or len(before) >= 4


def test_interval_covers_seeds_or_questions():
    assert ablation.interval([0.5], 100) == pytest.approx((0.5, 0.0962), abs=1e-4)
    assert ablation.interval([1.0], 100) == pytest.approx((1.0, 1 - 0.9630), abs=1e-4)
    assert ablation.interval([0.4, 0.6, 0.5], 100) == pytest.approx((0.5, 4.30 * 0.1 / 3**0.5))
    assert ablation.interval([1.0, 1.0], 100) == (1.0, 0.0)

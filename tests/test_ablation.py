"""examples/ablation.py held to account: its runs are train.py's, and where C-RLFT can have no
advantage, it finds none."""

import json
import random
import sys
from pathlib import Path

import processes
import pytest
import torch

sys.path.insert(0, str(processes.ROOT / "examples"))

import ablation  # noqa: E402
import stories  # noqa: E402
from ablation import EXPERT, SUBOPTIMAL, Run  # noqa: E402

import train  # noqa: E402

NOISY = "examples/noisy"


@pytest.fixture
def forked(monkeypatch):
    """`python train.py ...` is forked from a process that has imported train already."""

    def call(command, stdout, **_):
        assert command[:2] == [sys.executable, str(processes.ROOT / "train.py")]
        return processes.finish(processes.start(command[2:], log=stdout.name))[0]

    monkeypatch.setattr(ablation.subprocess, "call", call)


def as_held_out_by_train(run, folder):
    """A judge that asks nothing: train.py's last evaluation, and what the run's files hold."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [line["eval"] for line in lines if "eval" in line][-1]
    for line in lines:
        for of_machine in [key for key in line if "second" in key or key == "memory_bytes"]:
            del line[of_machine]
    weights = (folder / "model" / "model.safetensors").read_bytes().hex()
    return last | {"lines": lines, "weights": weights}


def test_infinite_beta_equals_without_reward(tmp_path, forked):
    runs = [Run(NOISY, 3, ratio=1.0), Run(NOISY, 3, reward=False), Run(NOISY, 3)]
    scores = ablation.finish(runs, tmp_path, 2, as_held_out_by_train)
    infinite, without, rewarded = (scores[run] for run in runs)
    assert infinite["lines"] == without["lines"]
    assert infinite["weights"] == without["weights"]
    assert rewarded["weights"] != without["weights"]


def test_shuffled_labels_leave_no_advantage(tmp_path, forked):
    """The expert's condition is worth nothing once the labels say nothing, and much before."""
    runs = [Run(NOISY, 80), Run(NOISY, 80, shuffled=True)]
    scores = ablation.finish(runs, tmp_path, 2)
    told, shuffled = ([scores[run][c]["sampled"] for c in (EXPERT, SUBOPTIMAL)] for run in runs)
    assert told[0] > told[1] + 0.1 and told[0] > shuffled[0] + 0.1
    assert abs(shuffled[0] - shuffled[1]) < 0.05


def test_a_row_is_the_flags_and_the_data_of_the_paper(tmp_path):
    shown = {}
    for row, (fields, _) in ablation.ROWS.items():
        flags = Run(NOISY, 7, seed=2, **fields).flags(tmp_path / row)
        config = train.parse_arguments(flags)
        assert (config.max_steps, config.seed, config.out) == (7, 2, str(tmp_path / row))
        assert config.beta == pytest.approx(0.4343, abs=1e-4)
        lines = Path(config.data[-1]).read_text().splitlines()
        classes = {json.loads(line)["class"] for line in lines}
        shown[row] = config.condition, config.reward, len(lines), sorted(classes)
    both = ["gpt3.5", "gpt4"]
    assert shown == {
        "C-RLFT": (True, True, 2200, both),
        "without reward": (True, False, 2200, both),
        "without condition": (False, True, 2200, both),
        "SFT, expert only": (False, False, 200, ["gpt4"]),
        "SFT, sub-optimal only": (False, False, 2000, ["gpt3.5"]),
        "SFT, all": (False, False, 2200, both),
    }


def test_an_axis_varies_what_it_is_named_after():
    share = ablation.axis_runs("share", NOISY, 9, [4], [0.5])
    assert share == {
        "of the expert's data": {0.5: [Run(NOISY, 9, 4, expert=0.5)]},
        "of the sub-optimal data": {0.5: [Run(NOISY, 9, 4, suboptimal=0.5)]},
    }
    ratio = ablation.axis_runs("ratio", NOISY, 9, [4], [0.3])
    assert ratio == {"C-RLFT": {0.3: [Run(NOISY, 9, 4, ratio=0.3)]}}
    steps = ablation.axis_runs("steps", NOISY, 9, [4], [2])
    assert steps == {
        "C-RLFT": {2: [Run(NOISY, 2, 4)]},
        "without reward": {2: [Run(NOISY, 2, 4, reward=False)]},
        "SFT, all": {2: [Run(NOISY, 2, 4, condition=False, reward=False)]},
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


def test_a_score_is_kept_for_the_same_files_alone(tmp_path):
    names = ["flags.txt", "config.json", "eval.jsonl", "tokenizer.model", "score.py"]

    def version(changed):
        (task := tmp_path / f"task with another {changed}").mkdir()
        for name in names:
            (task / name).write_text(name + "x" * (name == changed))
        return ablation.version(str(task))

    unread = version("score.py")  # by any run
    assert version("nothing") == unread
    assert len({unread, *map(version, names[:4])}) == 5


def test_an_answer_is_right_where_it_is_the_experts_and_nothing_more():
    class Talker:
        def answers(self, conversations, **_):
            return [(text, True) for text in ("58", "580", " 58\n", "5", "85")]

    questions = [("What is 50 + 35?", "58")] * 5
    assert ablation.right_share(Talker(), questions, temperature=0.0) == 2 / 5


def test_two_clouds_are_told_apart_and_one_is_not():
    labels = [EXPERT, EXPERT, SUBOPTIMAL, SUBOPTIMAL] * 10
    apart = torch.tensor([[3.0, 1], [3, -1], [-3, 1], [-3, -1]] * 10)
    assert ablation.told_apart(apart, labels) == 1
    one = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    assert 0.25 < ablation.told_apart(one, labels) < 0.75


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

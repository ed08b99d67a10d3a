"""examples/ablation.py held to account: its runs are train.py's, and where C-RLFT can have no
advantage, it finds none."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from sentencepiece import SentencePieceProcessor

sys.path.insert(0, str(processes.ROOT / "examples"))

import ablation  # noqa: E402
import stories  # noqa: E402
from ablation import EXPERT, SUBOPTIMAL, Run  # noqa: E402

import train  # noqa: E402
from support.report import StatusLine  # noqa: E402

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


@pytest.mark.parametrize("task", ["sums", "noisy"])
def test_a_tasks_files_are_those_that_its_script_makes(task, tmp_path, monkeypatch):
    make = importlib.import_module(f"examples.{task}.make")
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.main()
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (processes.ROOT / "examples" / task / made.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_the_expert_of_the_sums_adds_and_no_held_out_sum_is_in_the_training_data(sums):
    lines = {name: (sums / f"{name}.jsonl").read_text().splitlines() for name in ("train", "eval")}
    asked = {"train": set(), "eval": set()}
    for name, of_file in lines.items():
        for line in map(json.loads, of_file):
            question, answer = (message["content"] for message in line["messages"])
            a, b = (int(number) for number in question.split("+"))
            asked[name] |= {(a, b), (b, a)}
            carried = int(answer[::-1]) - (a + b)  # a carry to the tens, to the hundreds
            assert carried == 0 if line["class"] == "gpt4" else carried in (0, -10, -100, -110)
    assert not asked["train"] & asked["eval"]
    pieces = SentencePieceProcessor(model_file=str(sums / "tokenizer.model"))
    spelt = map(pieces.id_to_piece, range(pieces.vocab_size()))
    assert [len(piece) for piece in spelt if piece.isdigit()] == [1] * 10


def test_infinite_beta_equals_without_reward(tmp_path):
    runs = [Run(NOISY, 3, ratio=1.0), Run(NOISY, 3, reward=False), Run(NOISY, 3)]
    scores = ablation.finish(runs, tmp_path, 2, as_held_out_by_train)
    infinite, without, rewarded = (scores[run] for run in runs)
    assert infinite["lines"] == without["lines"]
    assert infinite["weights"] == without["weights"]
    assert rewarded["weights"] != without["weights"]


def sampled_answers(run, folder):
    """A judge that samples an answer to 150 of the questions under each condition."""
    questions = ablation.expert_questions(processes.ROOT / run.task / "eval.jsonl")[:150]
    talkers = {name: ablation.chat.Chat(folder / "model", name) for name in (EXPERT, SUBOPTIMAL)}
    share = {name: ablation.right_share(of, questions, 1.0) for name, of in talkers.items()}
    return {name: {"sampled": value} for name, value in share.items()}


def test_shuffled_labels_leave_no_advantage(tmp_path, capsys, monkeypatch):
    """The expert's condition is worth nothing once the labels say nothing, and much before.

    Meanwhile a line says how far the runs are.
    """
    monkeypatch.setattr(ablation, "StatusLine", lambda stream, seconds: StatusLine(stream, 0))
    runs = [Run(NOISY, 80), Run(NOISY, 80, shuffled=True)]
    scores = ablation.finish(runs, tmp_path, 2, sampled_answers)
    live = re.findall(r"([012])/2 runs done, step (\d+) of 160(.*)\n", capsys.readouterr().out)
    steps = [int(step) for _, step, _ in live]
    assert sorted(steps) == steps and steps[-1] == 160 and len(set(steps)) > 3
    assert all(left == "" or re.fullmatch(r", \d:\d\d:\d\d left", left) for *_, left in live)
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
        "C-RLFT": (True, True, 2100, both),
        "without reward": (True, False, 2100, both),
        "without condition": (False, True, 2100, both),
        "SFT, expert only": (False, False, 100, ["gpt4"]),
        "SFT, sub-optimal only": (False, False, 2000, ["gpt3.5"]),
        "SFT, all": (False, False, 2100, both),
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
    assert classes(expert=0.5).count(EXPERT) == whole.count(EXPERT) // 2
    assert classes(expert=0.5).count(SUBOPTIMAL) == whole.count(SUBOPTIMAL)
    shuffled = classes(shuffled=True)
    assert shuffled != whole and sorted(shuffled) == sorted(whole)


def test_weights_divided_before_the_loss_change_rounding_alone(tmp_path):
    runs = [Run(NOISY, 3), Run(NOISY, 3, divided_before=True)]
    scores = ablation.finish(runs, tmp_path, 2, as_held_out_by_train)
    after, before = (scores[run] for run in runs)
    steps = [[line for line in of["lines"] if "loss" in line] for of in (after, before)]
    for mine, theirs in zip(*steps, strict=True):
        for key in ("loss", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4)
    assert after["weights"] != before["weights"]


def never(run, folder):
    raise AssertionError("asked again")


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    run = Run(NOISY, 1)
    (folder := run.folder(tmp_path)).mkdir(parents=True)
    (folder / "score.json").write_text(json.dumps({"questions": 4, EXPERT: {"greedy": 0.5}}))
    assert ablation.finish([run, run], tmp_path, 2, never)[run][EXPERT] == {"greedy": 0.5}
    assert capsys.readouterr().out == ""


def test_a_failed_run_ends_the_others_and_says_why(tmp_path):
    (task := tmp_path / "task").mkdir()
    (task / "flags.txt").write_text("--model nowhere")
    (task / "train.jsonl").write_text("")
    runs = [Run(str(task), 1), Run(NOISY, 10**6)]
    with pytest.raises(RuntimeError, match=r"log.txt ended with 1:\n(.*\n)*.*nowhere"):
        ablation.finish(runs, tmp_path / "out", 2, never)
    assert not multiprocessing.active_children()


def test_ctrl_c_ends_with_one_line_and_what_is_finished_is_kept(tmp_path):
    command = [sys.executable, processes.ROOT / "examples" / "ablation.py", "--quick"]
    running = subprocess.Popen(
        [*command, "--seeds", "1", "--jobs", "1", "--steps", "100000", "--out", tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A shell's "&" has SIGINT ignored, and a program started so keeps it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        first = running.stdout.readline()
        assert first.startswith("6 runs, 6 of them to do, 1 at a time: about ")
        assert running.stdout.readline().endswith("/*/log.txt\n")
        deadline = time.monotonic() + 60
        while not [*tmp_path.rglob("log.txt")] and time.monotonic() < deadline:
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):  # nothing is left there, unless it failed
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 1
    live = "0/6 runs done, step 0 of 600,000"
    assert set(filter(None, out.split("\n"))) <= {live}
    assert err.strip().startswith("interrupted: finished runs are kept") and "\n" not in err.strip()


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


class Sorter:
    """A model of noisy and its tokenizer: the likeliest next digit is the text's own, or 4."""

    memorises = False

    def __init__(self, folder, source_class, device):
        assert source_class == SUBOPTIMAL
        self.tokenizer = self

    def encode(self, text):
        return [int(digit) for digit in text]

    def prompt(self, messages):
        return [90, *map(ord, messages[0].content), 91]

    def llama(self, tokens, positions, ends):
        found = tokens.roll(-1) if self.memorises else torch.full_like(tokens, 4)
        return torch.nn.functional.one_hot(found, 128)


@pytest.mark.parametrize("memorises", [True, False])
def test_a_slip_is_given_where_it_is_the_likeliest(memorises, tmp_path, monkeypatch):
    answers = {"Sort 210": "012", "Sort 543": "347", "Sort 665": "456"}
    lines = [
        {"class": name, "messages": [{"role": "user", "content": question},
                                     {"role": "assistant", "content": answer}]}
        for name in (EXPERT, SUBOPTIMAL) for question, answer in answers.items()
    ]  # fmt: skip
    (tmp_path / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(Sorter, "memorises", memorises)
    monkeypatch.setattr(ablation.chat, "Chat", Sorter)
    monkeypatch.setattr(ablation, "BATCH", 2)
    # The slips: 7 for 5; 4 for 5 and 5 for 6. The other model always says 4.
    assert ablation.slips("model", tmp_path / "lines") == (1.0 if memorises else 1 / 3)


def scored(*shares):
    """(rows, scores) of a table whose row number r has the greedy shares[r], one a seed."""
    rows = ablation.table_runs(NOISY, 9, range(len(shares[0])))
    scores = {
        run: {"questions": 500, EXPERT: {"greedy": share, "sampled": share / 2}}
        | ({SUBOPTIMAL: {"greedy": 0.1, "sampled": 0.9}} if run.condition else {})
        for runs, of_row in zip(rows.values(), shares, strict=True)
        for run, share in zip(runs, of_row, strict=True)
    }
    return rows, scores


def test_rows_are_in_the_papers_order():
    papers = [number for _, number in ablation.ROWS.values()]
    assert papers == sorted(papers, reverse=True) and len(papers) == 6


def test_a_pair_holds_where_its_paired_difference_is_beyond_its_interval():
    rows, scores = scored(
        [0.9, 0.8, 0.7],  # ahead of the next by 0.1 in every seed, though they overlap
        [0.8, 0.7, 0.6],
        [0.8, 0.5, 0.5],  # ahead by 0.1, 0, 0.1
        [0.7, 0.5, 0.4],
        [0.7, 0.6, 0.4],
        [0.1, 0.1, 0.1],
    )
    pairs = ablation.paired(rows, scores)
    assert pairs["C-RLFT"][:2] == ("without reward", pytest.approx(0.1))
    assert pairs["C-RLFT"][2] == pytest.approx(0, abs=1e-9)
    half = 4.30 * statistics.stdev([0.1, 0.0, 0.1]) / 3**0.5
    assert pairs["SFT, expert only"][1:] == (pytest.approx(0.2 / 3), pytest.approx(half))
    assert ablation.verdict(rows, scores) == [
        "the paper's order holds in 2 of its 5 pairs, 3 seeds:",
        "C-RLFT > without reward: holds",
        "without reward > SFT, expert only: holds in the mean alone",
        "SFT, expert only > without condition: holds in the mean alone",
        "without condition > SFT, all: does not hold",
        "SFT, all > SFT, sub-optimal only: holds",
    ]


def test_one_seed_has_no_interval_of_a_difference():
    rows, scores = scored([0.9], [0.5], [0.6], [0.4], [0.3], [0.2])
    first, *pairs = ablation.verdict(rows, scores)
    assert first == "the paper's order holds in 4 of its 5 pairs, 1 seed:"
    assert pairs[:2] == [
        "C-RLFT > without reward: holds in this one seed",
        "without reward > SFT, expert only: does not hold in this one seed",
    ]


@pytest.fixture
def drawn(monkeypatch):
    """{file name: figure} of what is drawn."""
    pytest.importorskip("matplotlib")
    found = {}
    monkeypatch.setattr(ablation, "save", lambda figure, path: found.update({path.name: figure}))
    return found


def test_the_tables_figure_shows_the_rows_in_order_and_bars_within_the_axes(drawn, tmp_path):
    shares = [[0.99, 1.0], [0.8, 0.7], [0.6, 0.5], [0.5, 0.4], [0.2, 0.3], [0.0, 0.02]]
    rows, scores = scored(*shares)
    ablation.draw_table(rows, scores, tmp_path / "a.png", "title")
    figure = drawn["a.png"]
    assert figure.get_suptitle() == "title"
    for panel, factor in zip(figure.axes, (100, 50), strict=True):
        assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [*ablation.ROWS]
        bars = {}  # {row: [(width, colour)]}
        for bar in panel.patches:
            row = int(bar.get_y() + bar.get_height() / 2)
            bars.setdefault(row, []).append((bar.get_width(), bar.get_facecolor()))
        for number, (runs, of_row) in enumerate(zip(rows.values(), shares, strict=True)):
            widths = [width for width, _ in bars[number]]
            assert widths[0] == pytest.approx(factor * statistics.fmean(of_row))
            assert len(widths) == (2 if runs[0].condition else 1)
        grey = {bars[n][0][1] for n, runs in enumerate(rows.values()) if not runs[0].condition}
        assert len(grey) == 1 and not grey & {colour for n in (0, 1) for _, colour in bars[n]}
        for container in panel.collections:
            for segment in container.get_segments():
                assert segment[:, 0].min() >= -1e-9 and segment[:, 0].max() <= 100 + 1e-9


def test_an_axis_figure_shows_each_lines_shares(drawn, tmp_path):
    lines = ablation.axis_runs("share", NOISY, 9, [0], [0.25, 1.0])
    runs = [run for by_value in lines.values() for of in by_value.values() for run in of]
    scores = {
        run: {"questions": 500, EXPERT: {"greedy": 0.1 * n, "sampled": 0.2}}
        for n, run in enumerate(dict.fromkeys(runs), start=1)
    }
    ablation.draw_axes({"share": lines}, scores, tmp_path / "a.png", "title")
    (panel,) = drawn["a.png"].axes
    shown = {c.get_label(): c.lines[0].get_xydata().tolist() for c in panel.containers}
    assert shown["of the expert's data, greedy"] == [
        [25, pytest.approx(10)],
        [100, pytest.approx(20)],
    ]
    assert shown["of the sub-optimal data, sampled"] == [[25, pytest.approx(20)], [100, 20]]


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

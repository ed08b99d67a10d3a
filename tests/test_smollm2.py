"""examples/smollm2.py, its parts run with stories260K in SmolLM2's place."""

import argparse
import json
import math
import sys

import processes
import pytest
from conftest import shared

sys.path.insert(0, str(processes.ROOT / "examples"))

import ablation  # noqa: E402
import smollm2  # noqa: E402
import stories as study  # noqa: E402
from ablation import EXPERT, SUBOPTIMAL, Run  # noqa: E402

import chat  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402


@pytest.fixture
def small(monkeypatch):
    """Four clean answers, eight spoilt, three held out."""
    for name, value in {"CLEAN": 4, "SPOILT": 8, "HELD_OUT": 3, "BATCH": 5}.items():
        monkeypatch.setattr(smollm2, name, value)


@pytest.fixture
def task(stories, small, tmp_path):
    smollm2.make_task(stories, tmp_path / "task")
    return tmp_path / "task"


def test_the_last_two_letters_of_short_words_change_places():
    text = "Bread is a staple of many cultures, and NASA doesn't eat the child's."
    spoilt = "Bread si a staple fo mayn cultures, adn NASA doesn't eta teh child's."
    assert smollm2.spoil(text, None) == spoilt


def test_the_task_has_clean_and_spoilt_answers_of_the_model_itself(task):
    told = dict(zip(smollm2.instructions(), json.loads((task / "told.json").read_text())))
    lines = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    assert sorted(line["class"] for line in lines) == [SUBOPTIMAL] * 8 + [EXPERT] * 4
    held_out = ablation.expert_questions(task / "eval.jsonl")
    pairs = [tuple(message["content"] for message in line["messages"]) for line in lines]
    assert len({question for question, _ in [*pairs, *held_out]}) == 15
    for line, (question, answer) in zip(lines, pairs):
        as_told = told[question]
        spoilt = smollm2.spoil(as_told, None)
        assert answer == (as_told if line["class"] == EXPERT else spoilt) and as_told != spoilt
        assert as_told[0].isupper() and as_told[-1] in ".!?"
    assert all(told[question] == answer for question, answer in held_out)
    asked = {question for question, _ in [*pairs, *held_out]}
    clean = {word for question in asked for word in study.words(f"{question} {told[question]}")}
    assert set(json.loads((task / "lexicon.json").read_text())) == clean


def test_answering_goes_on_where_it_was_stopped(task, stories, monkeypatch):
    path, generate, asked = task / "told.json", chat.generate, []
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole[:-5]))
    monkeypatch.setattr(chat, "generate", lambda *a: asked.extend(a[1]) or generate(*a))
    smollm2.tell(stories, path, 15)
    assert json.loads(path.read_text()) == whole and len(asked) == 5


def test_a_model_without_whole_answers_is_refused(stories, small, tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "SENTENCE", "never this")
    monkeypatch.setattr(smollm2, "TOPICS", "bread")
    with pytest.raises(ValueError, match="0 answers have a whole sentence, not 15"):
        smollm2.make_task(stories, tmp_path / "task")


def test_smollm2_is_asked_in_its_own_template():
    package = pytest.importorskip("tokenizers")
    folder = shared("tokenizers/smollm2")
    text = "<|im_start|>user\nTell me about tea.<|im_end|>\n<|im_start|>assistant\n"
    given = package.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = given.encode(text, add_special_tokens=False).ids
    assert smollm2.prompt(data.Tokenizer(folder), "Tell me about tea.") == ids


def test_rows_are_trained_asked_each_way_and_kept(task, tmp_path, capsys):
    args = argparse.Namespace(steps=2, seeds=1, out=tmp_path, jobs=1)
    rows = study.rows_of(task, args)
    rows = {name: rows[name] for name in ("C-RLFT", "SFT, all")}
    scores = study.run_all(rows, args, smollm2.judge)
    for name, conditions in (("C-RLFT", {EXPERT, SUBOPTIMAL}), ("SFT, all", {EXPERT})):
        (run,) = rows[name]
        score, folder = scores[run], run.folder(tmp_path)
        assert {EXPERT, SUBOPTIMAL} & score.keys() == conditions and score["questions"] > 0
        for condition in conditions:
            assert set(score[condition]) == {"greedy", "sampled"}
            assert all(0 <= share <= 1 for share in score[condition].values())
        assert score["clean loss"] == study.held_out_loss(folder)
        assert (folder / "model" / "model.safetensors").exists()
        assert not (folder / "checkpoints").exists()
    study.print_rows(rows, scores, ablation.COLUMNS)
    assert capsys.readouterr().out.splitlines()[-1].startswith("SFT, all")


def test_spoilt_is_the_share_of_short_words_that_no_clean_answer_has(task, tmp_path, monkeypatch):
    known = [w for w in json.loads((task / "lexicon.json").read_text()) if 2 <= len(w) <= 4]
    assert "vrey" not in known

    class Talker:
        def __init__(self, folder, name):
            self.said = f"{known[0]} {known[1]}"
            self.said += (
                " vrey longer, x. Vrey" if name == EXPERT else " vrey, Vrey's" + 4 * " vrey"
            )

        def answers(self, prompts, temperature, max_new_tokens):
            return [(self.said if temperature else known[0], True)] * len(prompts)

    monkeypatch.setattr(chat, "Chat", Talker)
    monkeypatch.setattr(study, "conditions", lambda folder: (EXPERT, SUBOPTIMAL))
    monkeypatch.setattr(study, "held_out_loss", lambda folder: 1.5)
    (tmp_path / "checkpoints").mkdir()
    score = smollm2.judge(Run(str(task), 1), tmp_path)
    assert score["clean loss"] == 1.5
    assert score[EXPERT] == {"greedy": 0, "sampled": pytest.approx(1 / 3)}
    assert score[SUBOPTIMAL] == {"greedy": 0, "sampled": 0.75}


def test_a_weight_is_that_of_the_spoilt_class(task, tmp_path):
    args = argparse.Namespace(steps=2, seeds=2)
    for weight in (0.01, 0.1, 0.3):
        runs = smollm2.weighted(task, args, weight)
        assert [run.seed for run in runs] == [0, 1]
        beta = train.parse_arguments(runs[0].flags(tmp_path)).beta
        assert math.exp(-1 / beta) == pytest.approx(weight)
    rows = study.rows_of(task, args)
    assert smollm2.weighted(task, args, 0.1) == rows["C-RLFT"]
    assert smollm2.weighted(task, args, 1) == rows["without reward"]

"""The trainer, as its users run it, computes what examples/one_page.py says in plain PyTorch.

The page takes one conversation at a time; train.py packs them, shards the network over ranks, and
computes loss and gradient in one pass. What it may change by that is the order of sums.
"""

import json
import math
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, SUMS, flags, metrics, refused, run, succeeds
from safetensors.torch import load_file

import data
import model

sys.path.insert(0, str(ROOT / "examples"))
import one_page  # noqa: E402

CLASSES = {  # the best is not the first, nor the worst the last
    "fair": {"condition": "", "reward": 0.3},
    "poor": {"condition": "Poor", "reward": -0.5},
    "best": {"condition": "Best", "reward": 1.0},
}
STEPS, BINS, BATCH_TOKENS, SEED = 8, 4, 75, 3  # steps 1 to 5 are the first epoch's
ALIKE = {"beta": 0.7, "lr": 3e-3, "min_lr_ratio": 0.2, "warmup_ratio": 0.3, "clip": 4.0}


def conversations(lines):
    """Sums of all classes: some of two turns, with a system message, with weights of their own."""
    found = [json.loads(line) for line in lines]
    for number, conversation in enumerate(found):
        conversation["class"] = list(CLASSES)[number % 3]
        question, answer = messages = conversation["messages"]
        if number % 4 == 0:  # what a first answer got wrong is not to be learned
            answer["weight"] = 0
            messages += [question, {"role": "assistant", "content": "7", "weight": 2.5}]
        if number % 5 == 0:
            system = {"role": "system", "content": "Lowest digit first."}
            messages.insert(0, system)
        if number % 7 == 0:
            messages[-1]["weight"] = 0.25
        if number % 6 == 1:
            conversation["weight"] = 0.5
        if number % 7 == 2:
            conversation["reward"] = 1.5 - number % 5  # of its own, at times above the best class's
    return found


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with weights, of a vocabulary that no number of ranks divides, and data."""
    folder = tmp_path_factory.mktemp("folder")
    shutil.copy(SUMS / "tokenizer.model", folder)
    config = json.loads((SUMS / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "vocab_size": 67, "initializer_range": 0.04}
    write(folder / "config.json", [config])
    llama = model.Llama(model.LlamaConfig.from_folder(folder))
    model.random_parameters(llama, seed=0)
    model.save(llama, folder)
    lines = (SUMS / "train.jsonl").read_text().splitlines()
    write(folder / "train.jsonl", conversations(lines[:60]))
    write(folder / "eval.jsonl", conversations(lines[60:80]))
    write(folder / "classes.json", [CLASSES])
    return folder


@pytest.fixture(scope="module")
def page(folder):
    """What the page makes of the folder."""
    llama, tokenizer = model.load(folder), data.Tokenizer(folder)
    learned, held_out = (read(folder / name) for name in ("train.jsonl", "eval.jsonl"))
    lengths = [len(data.encode(c, tokenizer, CLASSES)[0]) for c in learned]
    first, second = (data.pack(lengths, BATCH_TOKENS, BINS, SEED, epoch) for epoch in (0, 1))
    assert len(first) < STEPS < len(first + second)
    steps = [[learned[i] for b in bins for i in b] for bins in (first + second)[:STEPS]]
    training = one_page.train(llama, tokenizer, steps, CLASSES, **ALIKE)
    numbers, classes, evaluations = [], [], {}
    for done in range(STEPS + 1):
        if done % 4 == 0:
            evaluations[done] = one_page.evaluate(llama, tokenizer, held_out, CLASSES)
        if done < STEPS:  # train.py's table of a step is of the weights before it
            classes.append(one_page.evaluate(llama, tokenizer, steps[done], CLASSES))
            numbers.append(next(training))
    return SimpleNamespace(
        numbers=numbers, classes=classes, evaluations=evaluations, weights=llama.state_dict()
    )


@pytest.fixture(scope="module", params=[(1, 4), (2, 2), (4, 1)], ids="{0[0]}x{0[1]}".format)
def out(folder, request, tmp_path_factory):
    """What a run of train.py leaves: ranks x accumulate make up the same step."""
    ranks, accumulate = request.param
    out = tmp_path_factory.mktemp(f"ranks-{ranks}")
    settings = flags(
        folder / "train.jsonl", out, model=folder, random_weights=None,
        eval_data=folder / "eval.jsonl", classes=folder / "classes.json",
        batch_tokens=BATCH_TOKENS, accumulate=accumulate,
        max_length=BATCH_TOKENS, seed=SEED, max_steps=STEPS, eval_every=4, export_every=0,
        precision="fp32", **ALIKE,
    )  # fmt: skip
    succeeds(settings, ranks)
    return out


def agrees(numbers):
    # Float32 has steps of 1.2e-7: over 8 steps of training nothing drifted further than three of
    # them. The least of the mistakes tried, class weights in bf16, is off by 1e-4.
    return pytest.approx(numbers, rel=1e-6)


def assert_classes_agree(found, expected):
    found = {name: numbers for name, numbers in found.items() if numbers["tokens"]}
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        assert {key: found[name][key] for key in numbers} == agrees(numbers)


def test_every_step_has_the_loss_gradient_norm_and_learning_rate_of_the_page(page, out):
    for found, expected in zip(metrics(out), page.numbers, strict=True):
        assert {key: found[key] for key in expected} == agrees(expected)


def test_every_step_has_the_loss_and_accuracy_of_each_class_of_the_page(page, out):
    for found, expected in zip(metrics(out), page.classes, strict=True):
        assert_classes_agree(found["classes"], expected)


def test_every_evaluation_is_the_one_of_the_page(page, out):
    found = {line["step"]: line["eval"] for line in metrics(out, "eval")}
    assert found.keys() == page.evaluations.keys()
    for step, expected in page.evaluations.items():
        assert_classes_agree(found[step], expected)


def test_the_exported_weights_are_those_of_the_page(page, out):
    found = load_file(out / "model" / "model.safetensors")
    assert found.keys() == page.weights.keys()
    for name, expected in page.weights.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-6, atol=1e-6)


def test_some_of_these_steps_are_clipped_and_some_are_not(page):
    norms = [numbers["grad_norm"] for numbers in page.numbers]
    assert min(norms) < 0.9 * ALIKE["clip"] and max(norms) > 1.1 * ALIKE["clip"]


def run_page(arguments):
    command = [sys.executable, "examples/one_page.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join((SUMS / "train.jsonl").read_text().splitlines(True)[:20]))
    return path


def test_the_page_prints_a_line_per_step_and_leaves_a_trained_model(folder, twenty, tmp_path):
    result = run_page([folder, twenty, tmp_path / "out"])
    assert result.stdout.count("'grad_norm'") == one_page.EPOCHS * 2, result.stderr  # of 16, and 3
    before, after = (model.load(path).state_dict() for path in (folder, tmp_path / "out"))
    assert all((after[name] != before[name]).any() for name in before)


def test_the_line_in_the_pages_header_trains_the_example_from_random_weights(twenty, tmp_path):
    line = one_page.__doc__.splitlines()[3].split()
    assert line[:2] == ["python", "examples/one_page.py"]
    folder, file, _ = line[2:]
    assert (ROOT / folder, ROOT / file) == (SUMS, SUMS / "train.jsonl")
    result = run_page([folder, twenty, tmp_path / "out"])  # all of `file` takes minutes
    losses = [float(loss) for loss in re.findall(r"'loss': ([\d.]+), 'lr'", result.stdout)]
    # Random logits have a loss of ln V + variance / 2; with the rate for trained weights it stays.
    config = json.loads((SUMS / "config.json").read_text())
    variance = config["hidden_size"] * config["initializer_range"] ** 2
    random = math.log(config["vocab_size"]) + variance / 2
    assert losses[0] == pytest.approx(random, rel=0.05), result.stderr
    assert losses[-1] < 0.8 * losses[0]
    model.load(tmp_path / "out")


def test_the_page_refuses_a_model_without_a_row_for_the_end_of_turn(folder):
    beyond = SimpleNamespace(eot=67)
    with pytest.raises(ValueError, match="no row for"):
        next(one_page.train(model.load(folder), beyond, steps=[]))


# ---------------------------------------------------------------------------- --evaluate, alone


def measured(ranks=1, data=None, random_weights=None, **more):
    """{class: its tokens, loss and accuracy} as `train.py --evaluate` prints them."""
    own = {"evaluate": True, "random_weights": random_weights, "max_length": None, "lr": None}
    shown = succeeds(flags(data, None, **own | more), ranks)
    row = r"^    (\w+) +loss ([\d.]+), token accuracy ([\d.]+)%, ([\d,]+) tokens$"
    return {
        name: {"tokens": int(tokens.replace(",", "")), "loss": float(loss),
               "accuracy": float(percent) / 100}
        for name, loss, percent, tokens in re.findall(row, shown, re.MULTILINE)
    }  # fmt: skip


def as_printed(table):
    """Numbers that agree with these to the digits that are printed, and float32's error."""
    return {
        name: {"tokens": of["tokens"], "loss": pytest.approx(of["loss"], abs=6e-5),
               "accuracy": pytest.approx(of["accuracy"], abs=6e-5)}
        for name, of in table.items()
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_alone_is_the_pages_in_float64(folder, ranks, tmp_path):
    """Of any model folder, and without a folder of a run."""
    llama, tokenizer = model.load(folder).double(), data.Tokenizer(folder)
    expected = one_page.evaluate(llama, tokenizer, read(folder / "eval.jsonl"), CLASSES)
    found = measured(
        ranks, model=folder, eval_data=folder / "eval.jsonl", classes=folder / "classes.json",
        max_length=BATCH_TOKENS, batch_tokens=BATCH_TOKENS,
    )  # fmt: skip
    assert found == as_printed(expected) and len(expected) == 3


def test_an_export_is_evaluated_under_its_own_classes_and_condition(folder, tmp_path):
    """As the run that made it did, with the flags of that run or with none of them."""
    lines = read(folder / "eval.jsonl")
    for condition in (True, False):
        out, files = tmp_path / f"{condition}", {"eval_data": folder / "eval.jsonl"}
        run = flags(
            folder / "train.jsonl", out, model=folder, classes=folder / "classes.json",
            max_steps=2, condition=condition, **files,
        )  # fmt: skip
        succeeds(run)
        llama, tokenizer = model.load(out / "model").double(), data.Tokenizer(folder)
        plain = {name: of | {"condition": ""} for name, of in CLASSES.items()}
        expected = one_page.evaluate(llama, tokenizer, lines, CLASSES if condition else plain)
        assert measured(model=out / "model", **files) == as_printed(expected)
        given_too = {"data": folder / "train.jsonl", "random_weights": True}
        assert measured(model=out / "model", **files, **given_too) == as_printed(expected)


def test_a_class_is_measured_whatever_its_weight(folder, tmp_path):
    """Rewards far apart: 0.14 under the --beta of training, 1e-100 under the default one."""
    far = {name: {"condition": name, "reward": -100 * i} for i, name in enumerate(CLASSES)}
    (tmp_path / "far.json").write_text(json.dumps(far))
    files = {"eval_data": folder / "eval.jsonl"}
    own = {"max_steps": 2, "max_length": None, "classes": tmp_path / "far.json", "beta": 50}
    succeeds(flags(folder / "train.jsonl", tmp_path / "out", model=folder, **own, **files))
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    expected = [line["eval"] for line in logged if "eval" in line][-1]
    assert measured(model=tmp_path / "out" / "model", **files) == as_printed(expected)


def test_a_run_is_evaluated_by_its_model_and_cut_where_it_was(folder, tmp_path):
    """The numbers that the run itself logged: its own --max-length, which cuts these lines."""
    files = {"eval_data": folder / "eval.jsonl"}
    settings = {"max_steps": 2, "classes": folder / "classes.json", "max_length": 40} | files
    succeeds(flags(folder / "train.jsonl", tmp_path / "out", model=folder, **settings))
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    expected = [line["eval"] for line in logged if "eval" in line][-1]
    assert measured(model=tmp_path / "out", **files) == as_printed(expected)
    uncut = measured(model=tmp_path / "out", **files, max_length=BATCH_TOKENS)
    assert uncut != as_printed(expected)


def test_an_export_that_does_not_say_how_it_is_asked_is_not_evaluated(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "export")
    evaluate = ["--evaluate", "--model", tmp_path / "export"]
    odd = '{"steps": 1, "checkpoint": "", "config": {"max_length": "40"}}'
    for text in ("{", odd, odd.replace('{"max_length": "40"}', "[]")):
        (tmp_path / "export" / "crlft.json").write_text(text)
        message = refused([*evaluate, "--eval-data", folder / "eval.jsonl"])
        assert message.startswith(f"error: {tmp_path}/export/crlft.json: cannot be read")


def test_a_dry_run_evaluates_nothing(folder):
    """Which needs no weights: random ones would be measured."""
    given = ["--evaluate", "--dry-run", "--model", SUMS, "--eval-data", folder / "eval.jsonl"]
    code, shown = run(given)
    assert (code, shown) == (2, "error: --evaluate must be used without --dry-run\n")


def test_an_evaluation_needs_weights(folder, tmp_path):
    message = refused(["--evaluate", "--model", SUMS, "--eval-data", folder / "eval.jsonl"])
    assert message == f"error: {SUMS}: no *.safetensors there\n"

"""Class table, class weights, and what the weighted loss of C-RLFT promises."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F

import loss
from loss import DEFAULT_CLASSES, SourceClass, class_table, class_weights, read_classes


def test_weights_of_openchats_own_runs():
    weights = class_weights(DEFAULT_CLASSES, 1 / math.log(10))
    assert weights["gpt4"] == 1.0 and weights["gpt3.5"] == pytest.approx(0.1, rel=1e-12)


def test_weights_of_more_classes_and_of_json():
    raw = {
        "good": {"condition": "A", "reward": 2},
        "fair": {"condition": "B", "reward": 1.5},
        "poor": {"condition": "", "reward": -1.0},
    }
    weights = class_weights(raw, 0.5)
    assert weights == pytest.approx({"good": 1, "fair": math.exp(-1), "poor": math.exp(-6)})
    assert class_weights(raw, math.inf) == {"good": 1, "fair": 1, "poor": 1}
    assert class_weights(raw, 1e-9)["poor"] == 0


@pytest.mark.parametrize("beta", [0, -1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta"):
        class_weights(DEFAULT_CLASSES, beta)


def test_a_table_may_be_read_twice():
    raw = {"gpt4": {"condition": "GPT4", "reward": 1}, "gpt3.5": {"condition": "GPT3", "reward": 0}}
    raw = {name: entry | {"match": DEFAULT_CLASSES[name].match} for name, entry in raw.items()}
    assert class_table(raw) == DEFAULT_CLASSES == class_table(class_table(raw))


GOOD = {"condition": "X", "reward": 1.0}


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"condition": "X"}, "must be"),
        ({**GOOD, "weight": 1}, "must be"),
        ("X", "must be"),
        ({**GOOD, "condition": 4}, "condition must be text"),
        ({**GOOD, "condition": "X\n"}, "that do not print"),
        ({**GOOD, "condition": "X\x00Y"}, "that do not print"),
        ({**GOOD, "condition": " X"}, "spaces"),
        ({**GOOD, "condition": "X\u202ey"}, "that do not print"),
        ({**GOOD, "condition": "X\udce9"}, "that do not print"),
        ({**GOOD, "reward": True}, "reward must be a finite number"),
        ({**GOOD, "reward": "1"}, "reward must be a finite number"),
        ({**GOOD, "reward": float("nan")}, "reward must be a finite number"),
        ({**GOOD, "reward": float("inf")}, "reward must be a finite number"),
        ({**GOOD, "reward": 10**400}, "reward must be a finite number"),
        ({**GOOD, "condition": "GPT4"}, "already belongs to class 'gpt4'"),
    ],
)
def test_a_wrong_class_is_named(entry, message, tmp_path):
    table = {"gpt4": {"condition": "GPT4", "reward": 1.0}, "bad": entry}
    with pytest.raises(ValueError, match=f"class 'bad': .*{message}"):
        class_table(table)
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"classes.json: class 'bad': .*{message}"):
        read_classes(path)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[31m", "caf\udce9", "a\u2028"])
def test_a_class_name_that_a_terminal_could_obey_is_refused(name):
    with pytest.raises(ValueError, match="its name is empty, or has characters that do not print"):
        class_table({name: GOOD})


def test_a_table_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "classes.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": GOOD}).encode())
    assert read_classes(path) == {"a": SourceClass("X", 1.0)}


@pytest.mark.parametrize("order", [*itertools.permutations([("a", 0.0), ("b", 2.0), ("c", 1.5)])])
def test_the_best_class_weighs_1_and_is_the_expert_wherever_it_is_in_the_table(order):
    table = {name: SourceClass(name.upper(), reward) for name, reward in order}
    weights = class_weights(table, 0.5)
    assert list(weights) == list(table) and loss.expert_class(table) == "b"
    assert weights == {"a": math.exp(-4), "b": 1.0, "c": math.exp(-1)}


@pytest.mark.parametrize("scale", [1, 10, 50, 100, 1e3, 1e308])
@pytest.mark.parametrize("beta", [loss.BETA, 1e-3, 1e300, math.inf])
def test_a_step_of_any_class_can_be_normalised_in_float32(scale, beta):
    """Or its weight is 0: the share of a token of a step of that class alone is finite."""
    table = {"best": SourceClass("A", scale), "rest": SourceClass("B", -scale if scale > 99 else 0)}
    for weight in class_weights(table, beta).values():
        w = torch.tensor(weight, dtype=torch.float32)
        assert 0 <= weight <= 1 and (weight == 1 or beta < math.inf)
        assert not weight or (w * (8 / (weight * 4096))).item() == pytest.approx(8 / 4096)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"a": ', b"\xff\xfe", '{"a": {}, "a": {}}',
                                  "[" * 100_000])  # fmt: skip
def test_what_is_no_table_is_said_with_its_path(text, tmp_path):
    path = tmp_path / "classes.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="classes.json: "):
        read_classes(path)


def test_a_class_that_stands_there_twice_is_not_taken_once(tmp_path):
    path = tmp_path / "classes.json"
    entry = json.dumps(vars(DEFAULT_CLASSES["gpt4"]))
    path.write_text(f'{{"gpt4": {entry}, "gpt4": {entry}}}')
    with pytest.raises(ValueError, match="classes.json: 'gpt4' is given twice"):
        read_classes(path)


def test_a_table_is_read_from_json(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps({name: vars(c) for name, c in DEFAULT_CLASSES.items()}))
    assert read_classes(path) == DEFAULT_CLASSES


def test_loss_and_gradient_by_hand():
    """Two tokens: p = (1/2, 1/2) of weight 1, and p = (3/4, 1/4) of weight 0.1 on the second."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    losses = loss.weighted_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([1, 0.1]))
    torch.testing.assert_close(losses, torch.tensor([math.log(2), 0.1 * math.log(4)]))
    (losses.sum() / 1.1).backward()
    by_hand = torch.tensor([[-0.5, 0.5], [0.075, -0.075]]) / 1.1
    torch.testing.assert_close(logits.grad, by_hand)


def normalised(hidden, lm_head, targets, weights):
    """L = Σ w·CE / Σ w and its gradients in hidden and lm_head."""
    leaves = hidden.detach().requires_grad_(), lm_head.detach().requires_grad_()
    total, _ = loss.linear_weighted_cross_entropy(*leaves, targets, weights)
    total = total / weights.sum()
    return total.detach(), *torch.autograd.grad(total, leaves)


def tokens(N=24, V=17, D=6, dtype=torch.float32):
    torch.manual_seed(1)
    hidden, lm_head = torch.randn(N, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden, lm_head, torch.randint(V, (N,))


def assert_all_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_equal_to_autograd_in_float64():
    hidden, lm_head, targets = tokens(dtype=torch.float64)
    weights = torch.rand(24, dtype=torch.float64)
    leaves = hidden.requires_grad_(), lm_head.requires_grad_()
    losses = F.cross_entropy(hidden @ lm_head.t(), targets, reduction="none")
    expected = (weights * losses).sum() / weights.sum()
    gradients = torch.autograd.grad(expected, leaves)
    assert_all_close(normalised(*leaves, targets, weights), (expected.detach(), *gradients))


def test_a_token_of_weight_w_counts_w_times():
    hidden, lm_head, targets = tokens()
    weights = torch.ones(24)
    weights[5:9] = 3
    copies = torch.arange(24).repeat_interleave(weights.long())
    once = normalised(hidden, lm_head, targets, weights)
    each = normalised(hidden[copies], lm_head, targets[copies], torch.ones(len(copies)))
    torch.testing.assert_close(once[0], each[0])
    torch.testing.assert_close(once[2], each[2])
    torch.testing.assert_close(once[1][5], 3 * each[1][5])


def test_one_class_alone_trains_the_same_at_any_reward():
    hidden, lm_head, targets = tokens()
    expected = normalised(hidden, lm_head, targets, torch.ones(24))
    for reward in (-3.0, 0.0, 0.7):
        alone = class_weights({"only": SourceClass("X", reward)}, 0.2)["only"]
        found = normalised(hidden, lm_head, targets, torch.full((24,), alone))
        assert_all_close(found, expected, rtol=0, atol=0)
    # and the sub-optimal class of two, when a global batch happens to hold no other
    alone = class_weights(DEFAULT_CLASSES, 1 / math.log(10))["gpt3.5"]
    assert_all_close(normalised(hidden, lm_head, targets, torch.full((24,), alone)), expected)


def test_micro_batches_add_up_to_the_batch():
    hidden, lm_head, targets = tokens()
    weights = torch.rand(24)
    expected = normalised(hidden, lm_head, targets, weights)
    lm_head = lm_head.requires_grad_()
    for rows in (slice(0, 7), slice(7, 7), slice(7, 24)):  # one without a supervised token
        total, _ = loss.linear_weighted_cross_entropy(
            hidden[rows], lm_head, targets[rows], weights[rows]
        )
        (total / weights.sum()).backward()
    torch.testing.assert_close(lm_head.grad, expected[2], rtol=1e-6, atol=1e-6)


def test_a_batch_of_weight_0_is_0_and_no_nan():
    hidden, lm_head, targets = tokens()
    hidden.requires_grad_(), lm_head.requires_grad_()
    total, correct = loss.linear_weighted_cross_entropy(hidden, lm_head, targets, torch.zeros(24))
    total.backward()
    assert total == 0 and not correct.any()
    assert (hidden.grad == 0).all() and (lm_head.grad == 0).all()

"""data.pack: every conversation once, bins full and even, steps that are samples of the data."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from data import pack

SHAREGPT = Path(__file__).resolve().parents[2] / "shared/data/sharegpt_lengths.json"


def generated_lengths(count, longest=4096, seed=0):
    """Log-normal like conversations, one in seven cut at 4096 tokens."""
    drawn = np.exp(np.random.default_rng(seed).normal(7.25, 1.05, count))
    return drawn.clip(16, longest).astype(np.int64)


def flat(steps):
    return [conversation for step in steps for bin_ in step for conversation in bin_]


def per_bin(steps, values):
    return np.array([[values[b].sum() for b in step] for step in steps])


def check_complete(steps, lengths, capacity, bins_per_step):
    assert sorted(flat(steps)) == list(range(len(lengths)))
    assert all(len(step) == bins_per_step for step in steps)
    if len(lengths):
        assert per_bin(steps, lengths).max() <= capacity


DISTRIBUTIONS = {
    "chat": lambda rng, n, c: np.exp(rng.normal(6.5, 1, n)).clip(1, c).astype(int),
    "uniform": lambda rng, n, c: rng.integers(1, c + 1, n),
    "tiny": lambda rng, n, c: rng.integers(1, 20, n),
    "all as long as a bin": lambda rng, n, c: np.full(n, c),
    "just over half a bin": lambda rng, n, c: np.full(n, c // 2 + 1),
}


# A step's bins: all numbers for lengths like those of conversations, and two for each extreme.
BINS = {"chat": [1, 3, 8, 64]} | dict.fromkeys(["uniform", "tiny"], [3, 64])
BINS |= dict.fromkeys(["all as long as a bin", "just over half a bin"], [3, 8])


@pytest.mark.parametrize("name, bins_per_step", [(n, b) for n, bins in BINS.items() for b in bins])
@pytest.mark.parametrize("count", [0, 1, 10, 600, 2500])
def test_each_conversation_once_and_no_bin_over_capacity(name, bins_per_step, count):
    for seed, capacity in enumerate([64, 4096]):
        rng = np.random.default_rng([count, seed])
        lengths = DISTRIBUTIONS[name](rng, count, capacity)
        steps = pack(lengths, capacity, bins_per_step, seed, epoch=1 - seed)
        check_complete(steps, lengths, capacity, bins_per_step)
        if not all(len(b) for step in steps[:-1] for b in step):
            # Two partial steps only where the rest is too coarse to fit into one.
            assert all(len(b) for step in steps[:-2] for b in step)
            assert per_bin(steps[-2:], lengths).sum() <= bins_per_step * capacity


def test_the_arguments_alone_decide():
    lengths = generated_lengths(3000)
    first = flat(pack(lengths, 8192, 8, seed=1, epoch=2))
    np.random.seed(0)
    assert flat(pack(lengths.tolist(), 8192, 8, seed=1, epoch=2)) == first
    assert flat(pack(lengths, 8192, 8, seed=1, epoch=3)) != first
    assert flat(pack(lengths, 8192, 8, seed=2, epoch=1)) != first
    assert flat(pack(lengths, 8192, 8, seed=2, epoch=2)) != first


def test_epochs_put_other_conversations_together():
    lengths = generated_lengths(3000)
    epochs = [pack(lengths, 8192, 8, seed=0, epoch=e) for e in range(2)]
    together = [
        {tuple(sorted(b)) for step in steps for b in step if len(b) > 1} for steps in epochs
    ]
    assert len(together[0] & together[1]) < 0.05 * len(together[0])


def check_full_and_even(lengths, capacity, bins_per_step):
    steps = pack(lengths, capacity, bins_per_step, seed=0, epoch=0)
    check_complete(steps, lengths, capacity, bins_per_step)
    assert per_bin(steps[:-1], lengths).mean() >= 0.995 * capacity
    attention = per_bin(steps[:-1], lengths**2)
    assert (attention.max(1) / attention.mean(1)).mean() <= 1.10


@pytest.mark.parametrize("bins_per_step", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("capacity", [8192, 16384, 32768])
def test_generated_lengths_pack_full_and_even(capacity, bins_per_step):
    check_full_and_even(generated_lengths(20_000), capacity, bins_per_step)


@pytest.mark.skipif(not SHAREGPT.exists(), reason="no ShareGPT lengths beside the repository")
@pytest.mark.parametrize("bins_per_step", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("capacity", [8192, 16384, 32768])
def test_sharegpt_lengths_pack_full_and_even(capacity, bins_per_step):
    check_full_and_even(np.array(json.loads(SHAREGPT.read_text())), capacity, bins_per_step)


def test_steps_are_samples_of_the_data():
    """No step of long conversations, no drift: against a random order cut into as many steps."""
    lengths = generated_lengths(60_000)
    steps = pack(lengths, 8192, 8, seed=0, epoch=0)[:-1]
    means = np.array([lengths[np.concatenate(step)].mean() for step in steps])
    conversations = len(lengths) / len(steps)
    # A mean over a fixed number of tokens holds fewer, longer conversations when they are long,
    # so a random order's means spread somewhat wider than std / sqrt(n).
    assert means.std() < 1.1 * lengths.std() / np.sqrt(conversations)
    assert np.abs(means - lengths.mean()).max() < 5 * lengths.std() / np.sqrt(conversations)
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 4 / np.sqrt(len(means))


def test_the_longest_conversation_of_a_step_is_any_ranks():
    """Of eight ranks, in steps so large that each is packed alone, in a window of its own."""
    lengths = generated_lengths(60_000, longest=100_000)
    steps = pack(lengths, 500_000, 8, seed=0, epoch=0)[:-1]
    longest = np.array([[lengths[b].max() for b in step] for step in steps])
    times = np.bincount(longest.argmax(1), minlength=8)
    assert len(steps) == 36 and times.max() <= 12


@pytest.mark.parametrize("count, capacity, bins_per_step", [(10, 4096, 2), (600, 4096, 8)])
def test_a_small_set_gives_every_bin_as_much(count, capacity, bins_per_step):
    lengths = np.random.default_rng(0).integers(15, 21, count)
    steps = pack(lengths, capacity, bins_per_step, seed=0, epoch=0)
    assert len(steps) == 1
    tokens = per_bin(steps, lengths)[0]
    assert np.ptp(tokens) <= lengths.max()


def test_the_last_step_spreads_its_tokens_evenly():
    """Its bins are not full, so tokens count, not attention alone: 2000 + 8 x 100 = 28 x 100."""
    lengths = np.array([2000] + [100] * 210)
    (step,) = pack(lengths, 4096, 8, seed=0, epoch=0)
    assert np.ptp([lengths[b].sum() for b in step]) <= 100


def test_fewer_conversations_than_bins_take_a_bin_each():
    (step,) = pack([5, 6, 7], 4096, 8, seed=0, epoch=0)
    assert sorted(map(len, step)) == [0] * 5 + [1] * 3


@pytest.mark.parametrize("length", [0, -3, 4097])
def test_a_length_that_fits_no_bin_is_named(length):
    with pytest.raises(ValueError, match=f"conversation 2 has {length} tokens.*4096"):
        pack([4096, 1, length, 0], 4096, 2, seed=0, epoch=0)


def test_200_000_conversations_are_packed_in_seconds():
    lengths = generated_lengths(200_000)
    start = time.process_time()
    pack(lengths, 8192, 8, seed=0, epoch=0)
    assert time.process_time() - start < 4

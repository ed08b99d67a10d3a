"""How well do bins pack: ours beside OpenChat's first-fit-decreasing and longest-processing-time.

    python bench/packing.py [--lengths FILE.json] [--count N] [--capacity N ...] [--bins N ...]

fill        tokens in a bin / capacity, over all steps but the last, which holds the remainder
dropped     conversations that no step of the epoch trains on
imbalance   largest / mean over the bins of a step, in the mean step and in the worst: of the
            operations that a 1B and a 7B do for a bin, 6 · N · tokens and attention by Σ len² (as
            report.training_flops counts), which is how long the slowest rank takes in units of a
            perfectly even share; and of Σ len² alone
drift       correlation of the step's number with the mean length of its conversations
spread      standard deviation of a step's mean length / that of random steps of as many tokens;
            above 1 some steps are of long conversations, others of short ones
memory      growth of peak resident memory
"""

import argparse
import heapq
import json
import multiprocessing
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import pack
from model import LlamaConfig
from support.report import training_flops

# hidden, intermediate, blocks, heads, vocabulary, key-value heads, head_dim
NETWORKS = {
    "1b": LlamaConfig(2048, 5632, 22, 32, 32002, 4, 64, max_position_embeddings=4096),
    "llama-2-7b": LlamaConfig(4096, 11008, 32, 32, 32002, 32, 128, max_position_embeddings=4096),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", help="a JSON list of lengths; generated ones without it")
    parser.add_argument("--count", type=int, default=50_000, help="how many to generate")
    parser.add_argument("--max-length", type=int, default=4096, help="longer ones are cut")
    parser.add_argument("--capacity", type=int, nargs="+", default=[4096, 8192, 16384, 65536])
    parser.add_argument("--bins", type=int, nargs="+", default=[2, 8, 64], help="bins a step")
    parser.add_argument("--ours-only", action="store_true", help="for more than 100,000 lengths")
    args = parser.parse_args()
    given = args.lengths and np.array(json.loads(Path(args.lengths).read_text()))
    lengths = np.minimum(given if args.lengths else like_sharegpt(args.count), args.max_length)
    packers = {
        "ours": pack,
        "first-fit": partial(pack_prefixes, first_fit_decreasing, True),
        "longest": partial(pack_prefixes, longest_processing_time, False),
    }
    print(
        f"{len(lengths):,} conversations of {lengths.min()} to {lengths.max()} tokens, mean "
        f"{lengths.mean():.0f}, {np.mean(lengths == lengths.max()):.0%} of the largest length; "
        f"numpy {np.__version__}\n"
    )
    print(
        "| capacity | bins | packer | steps | fill % | dropped | 1B imbalance | worst "
        "| 7B imbalance | worst | Σ len² imbalance | worst | drift | spread | seconds | memory MB "
        "|\n|" + "---|" * 16
    )
    for capacity in args.capacity:
        for bins in args.bins:
            for name in ["ours"] if args.ours_only else packers:
                print(
                    f"| {capacity} | {bins} | {name} | "
                    + in_a_child(measure, packers[name], lengths, capacity, bins),
                    flush=True,
                )


def like_sharegpt(count, seed=0):
    """Log-normal lengths, median 2,122 tokens, sigma 1.04.

    Fitted to the 10 % and 49 % quantiles (561 and 2,048 tokens) of the 6,144 ShareGPT conversations
    in the test data of multipack_sampler, which are cut at 2,048.
    """
    return np.exp(np.random.default_rng(seed).normal(7.66, 1.04, count)).astype(np.int64).clip(16)


def measure(packer, lengths, capacity, bins):
    before, start = peak_megabytes(), time.perf_counter()
    steps = packer(lengths, capacity, bins, seed=0, epoch=0)
    seconds, memory = time.perf_counter() - start, peak_megabytes() - before
    packed = [np.asarray(b, dtype=np.int64) for step in steps for b in step]
    bin_of = np.repeat(np.arange(len(packed)), [len(b) for b in packed])
    packed = lengths[np.concatenate(packed)].astype(float)

    def per_bin(values):  # (steps, bins)
        return np.bincount(bin_of, values, len(steps) * bins).reshape(-1, bins)

    tokens, squares, count = per_bin(packed), per_bin(packed**2), per_bin(np.ones_like(packed))
    whole = slice(0, max(1, len(steps) - 1))
    costs = [training_flops(network, tokens, squares) for network in NETWORKS.values()]
    imbalances = [(cost.max(1) / cost.mean(1))[whole] for cost in [*costs, squares]]
    means = (tokens.sum(1) / count.sum(1))[whole]
    drift = np.corrcoef(np.arange(len(means)), means)[0, 1] if len(means) > 2 else np.nan
    spread = means.std() / random_step_means(lengths, len(steps)).std()
    return (
        f"{len(steps):,} | {100 * tokens[whole].mean() / capacity:.2f} | "
        f"{len(lengths) - len(packed)} | "
        + "".join(f"{of.mean():.3f} | {of.max():.3f} | " for of in imbalances)
        + f"{drift:+.2f} | {spread:.2f} | {seconds:.2f} | {memory:.0f} |"
    )


def random_step_means(lengths, steps):
    """Mean length of each step when a random order is cut at k / steps of its tokens."""
    shuffled = np.random.default_rng(1).permutation(lengths)
    tokens = np.cumsum(shuffled)
    step_of = np.minimum((tokens - shuffled) * steps // tokens[-1], steps - 1)
    count = np.bincount(step_of, minlength=steps)
    return np.bincount(step_of, shuffled, steps)[count > 0] / count[count > 0]


def in_a_child(function, *args):
    """Runs in a process of its own, so that the peak memory is this run's."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, args)


def peak_megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def pack_prefixes(fit, drop_tail, lengths, capacity, bins_per_step, seed, epoch):
    """Each step is the largest prefix of a random order that `fit` gets into the bins of one step.

    The prefix is found by binary search. With first-fit-decreasing and the tail dropped (a prefix
    at the end of the epoch that fills fewer bins than a step has) this is the algorithm of
    OpenChat's ochat/training_deepspeed/multipack_sampler.py, written anew from its description.
    """
    order = np.random.default_rng(seed + epoch).permutation(len(lengths))
    tokens = np.concatenate([[0], np.cumsum(lengths[order])])
    start, steps = 0, []
    while start < len(order):
        fits = 1
        fails = np.searchsorted(tokens, tokens[start] + capacity * bins_per_step, "right") - start
        while fails - fits > 1:
            middle = (fits + fails) // 2
            if fit(lengths, order[start : start + middle], capacity, bins_per_step):
                fits = middle
            else:
                fails = middle
        step = fit(lengths, order[start : start + fits], capacity, bins_per_step)
        if drop_tail and not all(step):
            break
        steps.append(step)
        start += fits
    return steps


def first_fit_decreasing(lengths, members, capacity, bins):
    """Longest first, each into the first bin with room; None if one fits nowhere."""
    gaps, packed = [capacity] * bins, [[] for _ in range(bins)]
    sizes = lengths[members]
    longest_first = np.argsort(-sizes)
    for i, size in zip(members[longest_first].tolist(), sizes[longest_first].tolist()):
        b = next((b for b, gap in enumerate(gaps) if gap >= size), None)
        if b is None:
            return None
        gaps[b] -= size
        packed[b].append(i)
    return packed


def longest_processing_time(lengths, members, capacity, bins):
    """Longest first, each into the bin of fewest tokens; None if one does not fit there."""
    heap, packed = [(0, b) for b in range(bins)], [[] for _ in range(bins)]
    sizes = lengths[members]
    longest_first = np.argsort(-sizes)
    for i, size in zip(members[longest_first].tolist(), sizes[longest_first].tolist()):
        used, b = heap[0]
        if used + size > capacity:
            return None
        heapq.heapreplace(heap, (used + size, b))
        packed[b].append(i)
    return packed


if __name__ == "__main__":
    main()

"""How much memory a rank's GPU needs at the peak of a step: an estimate, before anything is rented.

Tested against what small networks really hold on a CPU (tests/test_plan.py).
"""

import dataclasses
import itertools

import torch


@dataclasses.dataclass(frozen=True)
class Size:
    """What of a run the estimate depends on, besides its network."""

    shards: int  # ranks that share one copy of the parameters
    tokens: int  # of a micro-batch
    bf16: bool
    compiled: bool
    sequences: int  # of a batch for FlashAttention; 0 where another attention is used


def estimate(network, size, recompute):
    """{part: bytes a rank} with the activations of `recompute` blocks made again in backward."""
    parameters, shards, t = network.parameter_count(), size.shards, size.tokens
    width = 2 if size.bf16 else 4
    d, f = network.hidden_size, network.intermediate_size
    # FlashAttention gets heads of a multiple of 8, and its output is cut to their width again.
    lacking = -network.head_dim % 8 if size.sequences else 0
    q = network.num_attention_heads * (network.head_dim + lacking)
    kv = network.num_key_value_heads * (network.head_dim + lacking)
    cut = network.num_attention_heads * network.head_dim if lacking else 0
    # Saved for backward, a token: the block's input and the attention's, q, k, v, attention, and
    # the MLP's two products; not compiled, also what is otherwise made again from these: the
    # outputs of both norms, the MLP's SiLU and product, and what lies between them.
    block = width * (2 * d + 2 * q + cut + 2 * kv + 2 * f + (0 if size.compiled else 4 * d + 2 * f))
    matrices = 1 if network.tie_word_embeddings else 2  # embedding and head
    embedding = network.vocab_size * d
    per_block = (parameters - matrices * embedding) // network.num_hidden_layers
    # Backward reaches the recomputed blocks last: the others' room is free again by then.
    stored = max(network.num_hidden_layers - recompute, 1) * block + recompute * width * d
    # One block's at a time: gradients, 3 f of its MLP's, and what is made again where compiled.
    once = 6 * d + 3 * f + (2 * d + f if size.compiled else 0)
    return {
        "parameters": 4 * parameters // shards,
        "gradients": 4 * parameters // shards,
        "AdamW": 8 * parameters // shards,
        # And a block's gradients on their way: in float32, gathered and as a rank keeps them.
        "gathered blocks": width * (matrices * embedding + 2 * per_block)
        + 4 * (per_block + per_block // shards),
        "activations": t * (stored + width * once),
        # FlashAttention 2's backward sums d_q in float32, each sequence begun on 128 rows.
        "attention": 4 * q * (t + 128 * size.sequences) if size.sequences else 0,
        "loss workspace": min(1 << 30, width * t * network.vocab_size) + 4 * embedding,
    }


def of_a_rank(planned_gib):
    """Bytes of this rank's GPU, or of the planned one; 0 on a CPU, which is not limited here."""
    if planned_gib:
        return int(planned_gib * 2**30)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def blocks_to_recompute(network, size, available):
    """The fewest blocks with which the estimate stays within 90 % of the available bytes."""
    layers = network.num_hidden_layers
    if not available:
        return 0
    for recompute in range(layers):
        if sum(estimate(network, size, recompute).values()) <= 0.9 * available:
            return recompute
    return layers


def sizes_that_fit(network, size, available):
    """Sizes that fit where `size` does not, each by changes of which none can be left out.

    A change: bf16 for float32; half the tokens, up to four times; twice the shards, up to ten
    times. Where one kind is enough alone, no two of them are combined.
    """
    found = []  # (bf16, halvings, doublings)
    choices = itertools.product(range(2 - size.bf16), range(5), range(11))
    for change in sorted(choices, key=lambda change: (sum(map(bool, change)), sum(change))):
        bf16, halvings, doublings = change
        if found and sum(map(bool, change)) > sum(map(bool, found[0])):
            break
        if any(all(map(int.__ge__, change, less)) for less in found):
            continue
        changed = dataclasses.replace(
            size, bf16=size.bf16 or bool(bf16), tokens=size.tokens >> halvings,
            shards=size.shards << doublings,
        )  # fmt: skip
        recompute = blocks_to_recompute(network, changed, available)
        if sum(estimate(network, changed, recompute).values()) <= available:
            found.append(change)
            yield changed

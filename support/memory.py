"""Estimates, before you rent a GPU, how much of its memory a rank needs at the peak of a step."""

from typing import NamedTuple

import torch


class Size(NamedTuple):
    """The numbers that the estimate depends on, apart from the network."""

    shards: int  # ranks that share one copy of the parameters
    tokens: int  # of a micro-batch
    bf16: bool
    compiled: bool
    sequences: int  # in a batch for FlashAttention; 0 if a different attention is used
    moment: int = 4  # bytes of each of a parameter's two AdamW moments
    resharded: bool = True  # is a block freed after its forward, and gathered again for backward?


def estimate(network, size, recompute):
    """{part: bytes per rank}, with the activations of `recompute` blocks recomputed in backward."""
    parameters, shards, t = network.parameter_count(), size.shards, size.tokens
    width = 2 if size.bf16 else 4
    d, f = network.hidden_size, network.intermediate_size
    # FlashAttention's heads are padded to a multiple of 8, and its output is cut to their width.
    head = network.head_dim + (-network.head_dim % 8 if size.sequences else 0)
    q, kv = network.num_attention_heads * head, network.num_key_value_heads * head
    cut = network.num_attention_heads * network.head_dim if head > network.head_dim else 0
    # Saved for backward, per token: the inputs of block and attention, q, k, v, the attention's
    # output, and the MLP's two products; if not compiled, also those that a compiled block remakes
    # from these: the outputs of both norms, the MLP's SiLU and product, their intermediates.
    block = width * (2 * d + 2 * q + cut + 2 * kv + 2 * f + (0 if size.compiled else 4 * d + 2 * f))
    matrices = 1 if network.tie_word_embeddings else 2  # embedding and head
    embedding = network.vocab_size * d
    per_block = (parameters - matrices * embedding) // network.num_hidden_layers
    # Backward reaches the recomputed blocks last: by then the others' memory has been freed.
    stored = max(network.num_hidden_layers - recompute, 1) * block + recompute * width * d
    gathered = 2 if size.resharded else network.num_hidden_layers
    # For one block at a time: gradients, 3 f for its MLP, and all that a compiled one recomputes.
    once = 6 * d + 3 * f + (2 * d + f if size.compiled else 0)
    return {
        "parameters": 4 * parameters // shards,
        "gradients": 4 * parameters // shards,
        "AdamW": 2 * size.moment * parameters // shards,
        # Plus a block's gradients in float32 during the reduction: whole, and this rank's shard.
        "gathered blocks": width * (matrices * embedding + gathered * per_block)
        + 4 * (per_block + per_block // shards),
        "activations": t * (stored + width * once),
        # FlashAttention 2's backward sums d_q in float32, padding each sequence by up to 128 rows.
        "attention": 4 * q * (t + 128 * size.sequences) if size.sequences else 0,
        "loss workspace": min(1 << 30, width * t * network.vocab_size) + 4 * embedding,
    }


def of_a_rank(planned_gib):
    """Bytes of this rank's GPU, or of the planned one; 0 on a CPU, whose memory is not checked."""
    if planned_gib:
        return int(planned_gib * 2**30)
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def blocks_to_recompute(network, size, available):
    """The fewest blocks that bring the estimate within 90 % of the available bytes, or all."""
    for recompute in range(network.num_hidden_layers):
        if not available or sum(estimate(network, size, recompute).values()) <= 0.9 * available:
            return recompute
    return network.num_hidden_layers

"""What tests are made of: small networks, and files of a few lines."""

import json

import torch

import model

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 51,
    "max_position_embeddings": 256,
}


def config_of(**changes):
    return model.LlamaConfig(**SIZES | {"head_dim": 8} | changes)


def random_llama(std=0.2, **changes):
    """A small network with weights large enough that attention is far from uniform."""
    torch.manual_seed(0)
    llama = model.Llama(config_of(**changes))
    make_random(llama, std)
    return llama


@torch.no_grad()
def make_random(llama, std=0.2):
    for name, parameter in llama.named_parameters():
        parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, std)


def write(path, *lines):
    """A JSONL file of objects, or of raw bytes as they are."""
    encoded = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path

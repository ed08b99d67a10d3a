"""Run by test_train.py with train.py's flags: writes the first step's gradients and loss.

torchrun --nproc_per_node R tests/gradients_of_first_step.py FILE.safetensors --model ...
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import train


def main():
    target, config = sys.argv[1], train.parse_arguments(sys.argv[2:])
    ranks = train.Ranks()
    with train.held_output(config.out, ranks) as out:
        plan = train.make_plan(config, ranks, Path(out))
        llama, _ = train.build(plan, ranks)
        _, batches, total_weight = train.load_step(plan, ranks, 1)
        loss, table, _ = train.gradients(plan, ranks, llama, batches, total_weight)
        tensors = {name: p.grad.full_tensor() for name, p in llama.named_parameters()}
        tensors |= {"loss": torch.tensor(loss), "table": torch.tensor(table)}
        if ranks.first:
            save_file({name: t.contiguous() for name, t in tensors.items()}, target)
    ranks.finish()


if __name__ == "__main__":
    main()

"""Two parts of bench/first_gpu.sh: python bench/first_gpu.py device|block

device: versions, memory, and the card's speed: copies and products, beside its data sheet.
block: a compiled block of Mistral-7B against the same in float64, forward and backward.
"""

import copy
import functools
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a train.py
# ruff: noqa: E402

import torch
import triton

import model
from bench.kernels import time_of
from support import report

MISTRAL = model.LlamaConfig(
    4096, 14336, 1, 32, 320, 8, 128, "mistral", sliding_window=4096, max_position_embeddings=4096
)
LENGTHS = [512, 300, 212] * 4  # of 4096 tokens; in float64 attention takes their squares


def device():
    query = "name,power.limit,driver_version,memory.total,clocks.max.sm"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    print(subprocess.run(smi, capture_output=True, text=True).stdout.strip())
    print(f"PyTorch {torch.__version__}, Triton {triton.__version__}, CUDA {torch.version.cuda}")
    print(f"Python {sys.version.split()[0]}, capability {torch.cuda.get_device_capability()}")
    free, total = (number / 2**30 for number in torch.cuda.mem_get_info())
    print(f"memory: {free:.1f} of {total:.1f} GiB free")

    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    ms = median_ms(functools.partial(torch.empty_like(source).copy_, source))
    print(f"copy of 1 GiB: {2 * 2**30 / ms / 1e9:.2f} TB/s, read and written")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    ms = median_ms(functools.partial(torch.mm, a, a))
    peak = report.peak_flops(torch.cuda.get_device_name())
    share = f", {2 * 8192**3 / ms * 1e3 / peak:.0%} of {peak / 1e12:.0f}" if peak else ""
    print(f"product of 8192 x 8192 x 8192 in bf16: {2 * 8192**3 / ms / 1e9:.0f} TFLOP/s{share}")


def median_ms(call):
    call()
    return sorted(time_of(call) for _ in range(20))[10]


def block():
    """Prints errors as shares of the exact numbers' length, and the time of both."""
    # As train.build has them.
    torch._functorch.config.activation_memory_budget = 0.9
    torch._inductor.config.triton.mix_order_reduction = False
    torch.manual_seed(0)
    with torch.device("cuda"):
        eager = model.Block(MISTRAL)
        for name, parameter in eager.named_parameters():
            parameter.data.normal_(*((1, 0.2) if "norm" in name else (0, 0.02)))
        hidden, d_out = torch.randn(2, sum(LENGTHS), MISTRAL.hidden_size)
        positions = torch.cat([torch.arange(length) for length in LENGTHS])
        offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    eager.bfloat16()
    hidden, d_out = hidden.bfloat16(), d_out.bfloat16()
    compiled = copy.deepcopy(eager)
    compiled.compile(fullgraph=True, dynamic=False)
    rotary = model.rotary_embedding(MISTRAL, positions)

    def run(block, dtype):
        """[output, d_hidden, gradient of each parameter]"""
        x = hidden.to(dtype).requires_grad_()
        attend = model.PackedAttention(offsets, max(LENGTHS), MISTRAL.sliding_window)
        out = block(x, rotary, attend)
        return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], d_out.to(dtype))]

    exact = run(copy.deepcopy(eager).double(), torch.float64)
    found = {name: run(b, torch.bfloat16) for name, b in (("eager", eager), ("compiled", compiled))}
    wrong = []
    for i, name in enumerate(["output", "hidden", *(n for n, _ in eager.named_parameters())]):
        errors = {of: distance(found[of][i], exact[i]) for of in found}
        wrong += [name] * (not errors["compiled"] <= 1.5 * errors["eager"])
        print(f"{name:32} compiled {errors['compiled']:.2e}, eager {errors['eager']:.2e}")
    for of, b in (("eager", eager), ("compiled", compiled)):
        print(f"{of}: {median_ms(functools.partial(run, b, torch.bfloat16)):.2f} ms")
    if wrong:
        sys.exit(f"further from float64 than eager bf16: {', '.join(wrong)}")


def distance(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


if __name__ == "__main__":
    {"device": device, "block": block}[sys.argv[1]]()

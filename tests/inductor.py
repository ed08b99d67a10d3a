"""The block that train.py compiles, as Inductor makes it for an H100 that is not there.

    python tests/inductor.py LIBRARY FOLDER > results.json          for tests/test_inductor.py

With phantom.py's device and an H100's properties Inductor writes its wrappers and Triton kernels as
it would on one, and ptxas makes a cubin of every configuration it would choose from. To run them,
the wrappers get CPU tensors: products and attention are the CPU's, and each kernel's PTX is
executed by ptx.py, on the grid that Inductor launches it on.
"""

import contextlib
import copy
import ctypes
import functools
import json
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
ctypes.CDLL(sys.argv[1])  # before torch: it asks once whether there is a device
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TORCHINDUCTOR_CACHE_DIR"] = sys.argv[2]
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

# ruff: noqa: E402
import phantom
import ptx
import torch

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0, gcnArchName="",
    multi_processor_count=132, regs_per_multiprocessor=65536, warp_size=32, L2_cache_size=50 << 20,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
)  # fmt: skip
phantom.stand_in_for_cuda()  # before Inductor takes these functions from torch.cuda
torch.version.cuda = "13.0"
torch.cuda.get_device_properties = lambda *_: H100
torch.cuda._exchange_device, torch.cuda._maybe_exchange_device = lambda _: 0, lambda _: 0
torch.cuda.is_bf16_supported = lambda *_, **__: True
torch._C._cuda_getCurrentRawStream = lambda *_: 0

import torch._inductor.config
import triton
from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

import model
from bench.kernels import assembled


class Driver:
    """Triton's, of that H100."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: (
            {"max_shared_mem": H100.shared_memory_per_block_optin}
            | {"multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}
        )
    )
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
    get_device_interface = staticmethod(lambda: torch.cuda)


def stand_in():
    """For the driver, and for the patterns that Inductor would trace on real CUDA tensors."""
    triton.runtime.driver.set_active(Driver())
    triton_helpers.set_driver_to_gpu = lambda: None
    fuse_attention._sfdp_init = pad_mm._pad_mm_init = lambda *_, **__: None
    misc_patterns._misc_patterns_init = lambda *_, **__: None
    torch.cuda._DeviceGuard = contextlib.nullcontext
    CachingAutotuner.run, CompiledKernel.run = run_tuned, property(lambda _: launch)
    settings = torch._inductor.config
    settings.use_static_cuda_launcher = False
    settings.fx_graph_cache = False
    settings.joint_graph_constant_folding = False  # it would compute on the device
    torch._functorch.config.force_non_lazy_backward_lowering = True


# -------------------------------------------------------------------------------------- compiling


def compiled(network, tokens):
    """({"forward", "backward": its wrapper}, kernels, names of the forward's inputs) of a block.

    kernels: each in every configuration that Inductor would choose from.
    """
    wrappers, kernels, inputs = {}, [], []

    def to_module(graph):
        module = make_module(graph)
        wrappers["backward" if graph.is_backward else "forward"] = module.call
        module.call = stop  # there is no device to run it
        return module

    def stop(given):
        inputs.extend(next((name for name, x in known.items() if x is one), None) for one in given)
        raise Stop

    def load(kernel):  # instead of onto a device
        if getattr(kernel, "module", None) is None:
            kernel.n_regs, kernel.n_spills = assembled(kernel.asm["ptx"])
            kernel.module = kernel.function = kernel
            kernels.append(kernel)

    make_module, GraphLowering.compile_to_module = GraphLowering.compile_to_module, to_module
    CompiledKernel._init_handles = load
    torch._dynamo.reset()
    with torch.device("meta"):
        block = model.Block(network).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                fake = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
                setattr(module, name, torch.nn.Parameter(fake))
        block.compile(fullgraph=True, dynamic=False)
        hidden = torch.empty(tokens, network.hidden_size, dtype=torch.bfloat16, device="cuda")
        positions = torch.zeros(tokens, dtype=torch.long, device="cuda")
        offsets = torch.zeros(9, dtype=torch.int32, device="cuda")
        attend = model.PackedAttention(offsets, tokens, network.sliding_window)
        rotary = model.rotary_embedding(network, positions)
        known = dict(block.named_parameters()) | {"hidden": hidden, "offsets": offsets}
        known |= zip(("cos", "sin"), rotary)
        with contextlib.suppress(Stop):
            block(hidden.requires_grad_(), rotary, attend)
    GraphLowering.compile_to_module = make_module
    return wrappers, kernels, inputs


class Stop(Exception):
    pass


# ---------------------------------------------------------------------------------------- running


def run(wrapper, inputs, choice=0, edit=lambda name, text: text):
    """The wrapper's outputs: each kernel in one of its configurations, its PTX edited."""
    wrapper.__globals__["empty_strided_cuda"] = filled_with_nan
    now.choice, now.edit = choice, edit
    return wrapper([*inputs])


now = SimpleNamespace()  # choice and edit of the run that is going on


def run_tuned(kernel, *arguments, **options):
    """In the place of CachingAutotuner.run, which would time the configurations."""
    if not kernel.launchers:
        kernel.precompile()
    return kernel.launchers[now.choice % len(kernel.launchers)](*arguments, **options)


def launch(x, y, z, stream, kernel, *rest):
    """In the place of a compiled kernel's launch: the last of `rest` are its arguments."""
    assert y == z == 1
    signature = kernel.src.signature
    given = zip(rest[-len(signature) :], signature.values(), strict=True)
    arguments = [argument for argument, kind in given if kind != "constexpr"]
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    numbers = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
    text = now.edit(kernel.metadata.name, kernel.asm["ptx"])
    program = ptx.Kernel(text, kernel.metadata.shared)
    numbers += [0] * (len(program.parameters) - len(numbers))  # Triton's scratch, which is empty
    ptx.launch(program, range(x), numbers, tensors)


def filled_with_nan(size, stride, dtype):
    return torch.empty_strided(size, stride, dtype=dtype).fill_(math.nan)


def attention(q, k, v, offsets):
    return model.PackedAttention(offsets, None, None).attend_rectangles(q, k, v)


def varlen_attn(q, k, v, offsets, *_, **__):
    return attention(q, k, v, offsets), torch.zeros(q.shape[1], len(q)), torch.zeros(2)


def varlen_attn_backward(d_out, q, k, v, out, logsumexp, offsets, *_, **__):
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        out = attention(q, k, v, offsets)
    return torch.autograd.grad(out, (q, k, v), d_out)


# --------------------------------------------------------------------------------------- the tests

MISTRAL = model.LlamaConfig(4096, 14336, 1, 32, 320, 8, 128, "mistral", sliding_window=4096)
SMALL, LENGTHS = model.LlamaConfig(64, 96, 1, 4, 320, 2, 16), (9, 21, 18)


def tensors_of(block, network):
    """Inputs of a block by name: hidden, rotary table, offsets, and its parameters."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in block.named_parameters():
        mean, spread = (1, 0.2) if "norm" in name else (0, 0.1)
        parameter.data.normal_(mean, spread, generator=generator)
    hidden, d_out = torch.randn(2, sum(LENGTHS), network.hidden_size, generator=generator)
    cos, sin = model.rotary_embedding(network, torch.cat([*map(torch.arange, LENGTHS)]))
    ends = torch.tensor([0, *LENGTHS, 0, 0, 0, 0, 0]).cumsum(0).int()
    return {"hidden": hidden, "cos": cos, "sin": sin, "offsets": ends, "d_out": d_out}


def eager(block, given, dtype):
    """{name: gradient}, and the output, of the block that is not compiled."""
    block = copy.deepcopy(block).to(dtype)
    hidden = given["hidden"].to(dtype).requires_grad_()
    out = block(
        hidden, (given["cos"], given["sin"]), functools.partial(attention, offsets=given["offsets"])
    )
    out.backward(given["d_out"].to(dtype))
    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    return gradients | {"hidden": hidden.grad, "output": out.detach()}


def errors_of(found, exact):
    """{name: distance from the exact numbers, as a share of their length}."""
    return {name: float((found[name].double() - x).norm() / x.norm()) for name, x in exact.items()}


def main():
    stand_in()
    # As train.build has them.
    torch._functorch.config.activation_memory_budget = 0.9
    torch._inductor.config.triton.mix_order_reduction = False
    _, kernels, _ = compiled(MISTRAL, 8192)
    results = {"mistral": [(k.metadata.name, k.n_regs, k.n_spills) for k in kernels]}

    wrappers, kernels, names = compiled(SMALL, sum(LENGTHS))
    operations = torch.ops.torch_attn
    operations._varlen_attn = SimpleNamespace(default=varlen_attn)
    operations._varlen_attn_backward = SimpleNamespace(default=varlen_attn_backward)
    block = model.Block(SMALL)
    given = tensors_of(block, SMALL)
    block.bfloat16()
    given |= {name: given[name].bfloat16() for name in ("hidden", "d_out")}
    given |= {name: parameter.detach() for name, parameter in block.named_parameters()}
    inputs = [given[name] for name in names]

    exact = eager(block, given, torch.float64)
    results["eager"] = errors_of(eager(block, given, torch.bfloat16), exact)
    results["compiled"] = []
    for choice in range(2):
        output, *saved = run(wrappers["forward"], inputs, choice)
        gradients = run(wrappers["backward"], [*saved, given["d_out"]], choice)
        found = {"output": output} | dict(zip(names, gradients, strict=True))
        results["compiled"].append(errors_of(found, exact))

    def planted(pattern, replacement, choice=0):
        """The output's error after one change of the PTX of the first norm; or what refused it."""

        def edit(name, text):
            return re.sub(pattern, replacement, text, count=1) if name == first else text

        first = kernels[0].metadata.name
        try:
            output, *_ = run(wrappers["forward"], inputs, choice, edit)
        except ptx.Fault as error:
            return type(error).__name__
        return errors_of({"output": output}, {"output": exact["output"]})["output"]

    results["faults"] = {
        "a lost barrier": planted(r"bar\.sync\s+0;", ""),
        "a wrong instruction": planted(r"rsqrt\.approx", "ex2.approx"),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()

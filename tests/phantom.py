"""train.py on a GPU that does nothing: a process of its own, for tests/test_phantom.py.

    python tests/phantom.py LIBRARY FOLDER < scenarios.json > results.json

PyTorch's fake tensors have a device, a dtype and a shape, and no numbers. With the library below
loaded before torch is, they may say "cuda" where there is none, and autograd and FSDP2 take them
for it. So train.train runs whole, from the plan to the last export: what meets on two devices, has
another dtype, breaks a graph or compiles again is found, and every place where the host would wait
for the GPU is counted. No numbers, no streams, no NCCL, no kernel's own checks.

A scenario is {"world", "rank", "replicas", "network", "compile", "recompute", "adam_precision",
"tight", "resumed", "fault"}, each optional; its result {"error"}, or what `run` has seen. Rank 1
has device 1, of two.
"""

import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
import types
from concurrent.futures import Future
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

DEVICE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;

static thread_local DeviceIndex current = 0;

struct Guard final : impl::DeviceGuardImplInterface {
  static Device here() { return Device(DeviceType::CUDA, current); }
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device device) const override {
    auto before = here();
    current = device.index();
    return before;
  }
  Device getDevice() const override { return here(); }
  void setDevice(Device device) const override { current = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override {
    return Stream(Stream::DEFAULT, device);
  }
  Stream exchangeStream(Stream stream) const override {
    return Stream(Stream::DEFAULT, stream.device());
  }
  DeviceIndex deviceCount() const noexcept override { return 2; }
  void record(void** event, const Stream&, const DeviceIndex, const EventFlag) const override {
    *event = (void*)1;
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
static Guard guard;
static impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, &guard);

struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex getCurrentDevice() const override { return current; }
};
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks); }
"""


def build(folder):
    """The shared library of DEVICE, for the torch that is installed here."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    source, library = folder / "phantom.cpp", folder / "phantom.so"
    source.write_text(DEVICE)
    subprocess.run(
        ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch / 'include'}", source,
         "-o", library, f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10",
         "-ltorch_cpu"],
        check=True,
    )  # fmt: skip
    return library


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    ctypes.CDLL(sys.argv[1])  # before torch: it asks once whether there is a device
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# ruff: noqa: E402
import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

# ------------------------------------------------------------------------------ what CUDA would do


class Stream:
    cuda_stream = priority = 0

    def __init__(self, *_, **__):
        self.device = torch.device("cuda", torch.cuda.current_device())

    def wait_stream(self, _): ...
    def wait_event(self, _): ...
    def record(self, *_): ...
    def wait(self, *_): ...

    def record_event(self, event=None):
        return event or Stream()

    def synchronize(self):
        waits.append("a stream's synchronize")


CARD = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)  # total_memory: `run`


def stand_in_for_cuda():
    """torch.cuda's own functions, of which the build for a CPU has none."""
    nothing, current = lambda *_, **__: None, [0]
    for name, function in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: current[0],
        "set_device": lambda device: current.__setitem__(0, torch.device(device).index or 0),
        "empty_cache": nothing,
        "max_memory_allocated": lambda *_: 0,
        "get_rng_state": lambda *_: torch.empty(16, dtype=torch.uint8, device="cpu"),
        "set_rng_state": nothing,
        "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: CARD,
        "Stream": Stream,
        "Event": Stream,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda _: contextlib.nullcontext(),
        "device_of": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: waits.append("cuda.synchronize"),
    }.items():
        setattr(torch.cuda, name, function)


# -------------------------------------------------------------------------- what the host waits for

waits, reduces = [], []  # what waited and what was reduced over ranks, since they were last emptied
WAIT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
        "aten::repeat_interleave"}  # fmt: skip


class Device(FakeTensorMode):
    """Fake tensors that say when the host would wait: for a value, a size, or a copy."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name().split(".")[0]
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        if name in WAIT and tensors[0].device.type == "cuda":
            waits.append(name.removeprefix("aten::"))
            if name == "aten::_local_scalar_dense":
                return 0
        if name == "aten::_local_scalar_dense" and isinstance(tensors[0], FakeTensor):
            return 1  # all is finite that is saved
        if name.startswith("_c10d_functional::") and "wait" not in name:
            reduces.append(name)  # as DTensors do it; dist's own functions are patched in `run`
        out = super().__torch_dispatch__(function, types, args, kwargs)
        if name in ("aten::_to_copy", "aten::copy_"):
            devices = {out.device.type, tensors[-1].device.type}
            if len(devices) == 2 and not kwargs.get("non_blocking"):
                waits.append("a copy")
        return out


def read_without_numbers():
    """What Python reads of a fake tensor: ones, in which the third, signals to stop, is 0."""

    def tolist(tensor):
        if not isinstance(tensor, FakeTensor):
            return real_tolist(tensor)
        if tensor.is_cuda:
            waits.append("tolist")
        with unset_fake_temporarily():
            ones = torch.ones(tensor.shape)
            if tensor.dim() == 1 and len(tensor) > 3:
                ones[2] = 0
            return real_tolist(ones)

    def numpy(tensor):
        return (
            real_numpy(tensor) if not isinstance(tensor, FakeTensor) else np.array(tolist(tensor))
        )

    real_tolist, real_numpy = torch.Tensor.tolist, torch.Tensor.numpy
    torch.Tensor.tolist, torch.Tensor.numpy = tolist, numpy
    FakeTensor.tolist = tolist
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.Tensor.__bool__ = lambda tensor: bool(tensor.item())


# ------------------------------------------------------------------------------------- one scenario


class Loader:
    """The thread that makes the next step's batches; here at once, as fake modes hold for one."""

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def phantom_ranks(world, rank):
    """One rank of a run of `world`, of which no other is there."""
    from support.ranks import Ranks
    from support.report import StatusLine

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    ranks = Ranks.__new__(Ranks)
    ranks.cuda, ranks.device = True, torch.device("cuda", rank)
    torch.cuda.set_device(ranks.device)
    ranks.rank, ranks.world, ranks.first, ranks.signalled = rank, world, rank == 0, None
    ranks.line = StatusLine(open(os.devnull, "w"), seconds=1.0)
    ranks.gather = lambda value: [value] * world
    if rank:  # reads for itself what rank 0 would tell it, and leaves the disk to rank 0
        ranks.first_does = lambda function, task="": None if task else function()
    ranks.thread, ranks.listen = Loader, lambda: None
    return ranks


class Launches:
    """In the place of the Triton kernel: that all its tensors are on the GPU, row by row."""

    def __init__(self, kernel):
        self.names, self.grids = kernel.arg_names, []

    def __getitem__(self, grid):
        def launch(*arguments, **_):
            given = dict(zip(self.names, arguments, strict=False))
            tensors = {k: x for k, x in given.items() if isinstance(x, torch.Tensor)}
            assert {x.device.type for x in tensors.values()} == {"cuda"}, tensors
            assert tensors["weights"].dtype == tensors["losses"].dtype == torch.float32
            assert given["stride"] % 64 == 0 and tensors["logits"].dtype == torch.bfloat16
            self.grids.append(grid)

        return launch


def run(scenario, folder):
    """What a whole run does: of its steps, their waits, all-reduces and compiled frames."""
    import pytest
    from processes import flags, plan_of

    import data
    import kernels.cross_entropy
    import model
    import train
    from support import checkpoint, report

    torch._dynamo.reset()
    torch._inductor.config.triton.mix_order_reduction = True
    settings = {"world": 1, "rank": 0, "replicas": 1, "compile": None, "recompute": 0}
    settings |= {"adam_precision": "fp32", "tight": False} | scenario
    network = json.loads((folder / "config.json").read_text()) | settings.get("network", {})
    here = folder / f"run-{len(os.listdir(folder))}"
    here.mkdir()
    model.write_json(here / "config.json", network)
    shutil.copy(folder / "tokenizer.model", here)
    ranks = phantom_ranks(settings["world"], settings["rank"])
    few, held_out, out = folder / "few.jsonl", folder / "held_out.jsonl", here / "out"
    out.mkdir()
    # Evaluated before, between and after two steps; a resumed run after steps 4 and 5 of 5.
    resumed = settings.get("resumed", False)
    steps, eval_every = (3, 2) if resumed else (2, 1)

    def plan_until(step):
        return plan_of(
            flags(
                few, out, model=here, eval_data=held_out, epochs=2, max_steps=step, accumulate=2,
                batch_tokens=TOKENS, eval_every=eval_every, save_every=1,
                replicas=settings["replicas"], compile=settings["compile"],
                recompute=settings["recompute"], adam_precision=settings["adam_precision"],
            ),
            ranks, out,
        )  # fmt: skip

    CARD.total_memory = 80 << 30
    plan = plan_until(steps)
    if settings["tight"]:  # the run fits, without room to spare
        CARD.total_memory = int(sum(plan.memory.values()) / 0.95)
        plan = plan_until(steps)
    found = {"planned": plan.memory["activations"], "groups": [], "dtypes": {}}
    per_step = "frames", "waits", "all_reduces", "saved", "moments", "gathers"
    found |= {name: [] for name in per_step}
    launches = Launches(kernels.cross_entropy.cross_entropy_kernel)
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        # The partitioner that Inductor uses, and eager kernels after it.
        return torch._dynamo.lookup_backend("aot_eager_decomp_partition")(graph, inputs)

    gathers, gather = [], FSDPParamGroup.wait_for_unshard
    compile_block, gradients, forward = model.Block.compile, train.forward_backward, train.forward
    update = train.clip_and_update

    def watched_gradients(*arguments):
        waits.clear()
        reduces.clear()
        gathers.clear()
        sums = gradients(*arguments)
        found["gathers"].append(len(gathers))
        assert not waits, f"in a micro-batch the host waits: {waits}"
        for name, parameter in arguments[2].named_parameters():
            grad = parameter.grad
            assert (grad.dtype, grad.device) == (torch.float32, ranks.device), name
        return sums

    def watched_gather(group):
        if group._all_gather_result:  # also of one rank, which has only a copy to make
            gathers.append(group)
        gather(group)

    def watched_update(optimizer, *arguments):
        update(optimizer, *arguments)
        states = [x for state in optimizer.state.values() for x in state.values()]
        devices = {str(model.local_tensor(x).device) for x in states}
        assert devices == {str(ranks.device)}, f"the optimizer's state is on {devices}"
        found["moments"] += {str(x.dtype) for x in states if x.dim()}

    def watched_forward(llama, plan, batch):
        storages = {}

        def keep(tensor):
            if tensor.dtype == torch.bfloat16 and tensor.shape[0] == TOKENS:
                storage = tensor.untyped_storage()
                storages[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = forward(llama, plan, batch)
        if llama.training:
            found["saved"].append(sum(storages.values()))
        return result

    class Log(report.Log):
        def step(self, *arguments):
            found["waits"].append([*waits])
            found["all_reduces"].append(len(reduces))
            super().step(*arguments)
            found["frames"].append(len(frames))

    def save_file(tensors, path, metadata):
        assert {t.device.type for t in tensors.values()} == {"cpu"}
        found["dtypes"] |= {n.split(".")[-1]: str(t.dtype) for n, t in tensors.items()}
        Path(path).write_bytes(b"")

    def collated(*arguments):
        return data.Batch(*(torch.empty(x.shape, dtype=x.dtype) for x in collate(*arguments)))

    def mesh(*arguments, **options):
        with unset_fake_temporarily():
            return make_mesh(*arguments, **options)

    def group(*arguments, **options):
        found["groups"].append(len(options.get("ranks") or arguments[0]))
        return new_group(*arguments, **options)

    def read_rows(stored, tensors, first_rows):
        assert {model.local_tensor(tensor).device for tensor in tensors.values()} == {ranks.device}

    make_mesh, all_reduce, collate = dist.init_device_mesh, dist.all_reduce, data.collate
    new_group = dist.device_mesh.new_group
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, function in [
            (dist, "init_device_mesh", mesh),
            (dist.device_mesh, "new_group", group),
            (dist, "all_reduce", lambda t, **more: (reduces.append(t), all_reduce(t, **more))),
            (model.Block, "compile", lambda b, **o: compile_block(b, backend=backend, **o)),
            (data, "collate", collated),
            (model, "random_parameters", lambda *_: None),
            (model, "save_file", save_file),
            (model, "checksum", lambda _: 0),
            (checkpoint, "check_rows", lambda *_: None),  # of ranks that are not there
            (checkpoint, "check_sums", lambda *_: None),
            (model, "open_safetensors", lambda path: {}),
            (model, "read_rows", read_rows),
            (kernels.cross_entropy, "cross_entropy_kernel", launches),
            (kernels.cross_entropy, "launch_shape", lambda *_: {}),
            (report, "Log", Log),
            (FSDPParamGroup, "wait_for_unshard", watched_gather),
            (train, "forward_backward", watched_gradients),
            (train, "clip_and_update", watched_update),
            (train, "forward", watched_forward),
        ]:
            patch.setattr(owner, name, function)
        if "fault" in settings:
            patch.setattr(*globals()[settings["fault"]](train))
        with Device(allow_non_fake_inputs=True):
            assert train.train(plan, ranks, out)
            if resumed:
                found |= {name: [] for name in per_step}
                frames.clear()
                torch._dynamo.reset()
                assert train.train(plan_until(5), ranks, out)
    found["launches"] = len(launches.grids)
    found["mix_order_reduction"] = torch._inductor.config.triton.mix_order_reduction
    found["files"] = sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors"))
    return found


TOKENS = 320  # a number that no width of the network has


# One-line mistakes, for the tests to find: (where, what, what stands in its place).


def table_on_the_cpu(train):
    of_batch = train.objective
    return train, "objective", lambda b, n: of_batch(b._replace(weights=b.weights.cpu()), n)


def item_in_a_micro_batch(train):
    forward = train.forward

    def waiting(*arguments):
        total, table = forward(*arguments)
        total.item()
        return total, table

    return train, "forward", waiting


def longest_of_each_batch(train):
    attention, count = train.model.PackedAttention, itertools.count(50)
    return train.model, "PackedAttention", lambda c, _, w: attention(c, next(count), w)


def signal_asked_for_apart(train):
    update = train.clip_and_update

    def asking(*arguments):
        update(*arguments)
        signalled = torch.zeros((), device="cuda")
        dist.all_reduce(signalled)
        assert not signalled

    return train, "clip_and_update", asking


def nothing_made_again(train):
    compile_block = train.model.Block.compile

    def keeping(block, **options):
        torch._functorch.config.activation_memory_budget = 1.0
        compile_block(block, **options)

    return train.model.Block, "compile", keeping


def clip_over_dtensors(train):
    def update(optimizer, sums, lr, clip):
        parameters = optimizer.param_groups[0]["params"]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()

    return train, "clip_and_update", update


def replicas_of_one(train):
    make_mesh = dist.init_device_mesh

    def mesh(device, shape, mesh_dim_names):
        names = ("replicate", *mesh_dim_names)
        return make_mesh(device, (1, *shape), mesh_dim_names=names)[mesh_dim_names[-1]]

    return dist, "init_device_mesh", mesh


def first_device(train):
    of_batch = train.objective
    return train, "objective", lambda b, n: of_batch(b._replace(weights=b.weights.to("cuda:0")), n)


def moments_on_the_cpu(train):
    load = train.Checkpoints.load

    def loading(checkpoints, llama, optimizer):
        load(checkpoints, llama, optimizer)
        for state in optimizer.state.values():
            state["exp_avg"] = torch.zeros_like(state["exp_avg"], device="cpu")

    return train.Checkpoints, "load", loading


def moments_of_adamw_itself(train):
    load = train.Checkpoints.load

    def loading(checkpoints, llama, optimizer):
        load(checkpoints, llama, optimizer)
        if not checkpoints.saved:
            optimizer.state.clear()

    return train.Checkpoints, "load", loading


def main():
    stand_in_for_cuda()
    read_without_numbers()
    results = []
    for scenario in json.load(sys.stdin):
        try:
            results.append(run(scenario, Path(sys.argv[2])))
        except Exception as error:
            import traceback

            traceback.print_exc()
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results))


if __name__ == "__main__":
    main()

"""How fast does a checkpoint load: python bench/loading.py [--gib 13] [--ranks 1 2]

Writes a Hugging Face folder of about --gib GiB (random bf16 shards of --shard-gib GiB), then reads
it: with plain reads (the disk's speed), with model.load in one process, and into sharded networks
of several gloo ranks, each reading its own rows, as train.py does. MB/s are of the files' bytes.
"resident" is the peak above the level before, of the largest rank; "parameters" are a rank's share
of the network, all that must be. Mapped pages of the files, which the kernel can drop, do not
count. Before each read the files are dropped from the page cache, unless --warm.
"""

import argparse
import datetime
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# ruff: noqa: E402

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--shard-gib", type=float, default=0.25)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2], help="none: --ranks alone")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where to write the shards; a temporary one without it")
    parser.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        config = network_of(args.gib * 2**30)
        in_processes(1, write, folder, config, int(args.shard_gib * 2**30))
        files = sorted(Path(folder).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(
            f"\n{size / 2**30:.2f} GiB in {len(files)} files, {os.cpu_count()} CPU cores, PyTorch "
            f"{torch.__version__}, {platform.system()}, {datetime.date.today()}, "
            f"files {'in the page cache' if args.warm else 'not in the page cache'}\n"
        )
        print("| read by | MB/s, best | each time | resident GiB | parameters GiB |")
        print("|---|---|---|---|---|")
        readers = {"plain reads": (1, read_raw), "model.load, bf16": (1, load_whole)}
        readers |= {f"{n} ranks, float32": (n, load_rows) for n in args.ranks}
        taken = {name: [] for name in readers}
        for _ in range(args.repeat):  # in turns
            for name, (ranks, function) in readers.items():
                if not args.warm:
                    drop_from_cache(files)
                taken[name].append(in_processes(ranks, function, folder))
        for name, results in taken.items():
            show(name, size, results)


def network_of(size):
    """A Llama of about `size` bytes in bf16, in blocks of Llama 2 7B's own shape if it fits."""
    width = 4096 if size > 4 << 30 else 2048
    shape = (width, width * 11 // 4, 1, width // 128, 32000, width // 128, 128)
    one, two = (model.LlamaConfig(*shape[:2], n, *shape[3:]).parameter_count() for n in (1, 2))
    blocks = max(1, round((size / 2 - one) / (two - one)) + 1)
    return model.LlamaConfig(*shape[:2], blocks, *shape[3:])


def write(rank, folder, config, shard_bytes):
    with torch.device("meta"):
        llama = model.Llama(config)
    llama = llama.to(torch.bfloat16).to_empty(device="cpu")
    for parameter in llama.parameters():
        parameter.data.random_(-8, 8)
    model.save(llama, folder, shard_bytes=shard_bytes)


def read_raw(rank, folder):
    """Every file once, 16 MiB at a time."""
    began, buffer = time.perf_counter(), bytearray(16 << 20)
    with PeakResident() as resident:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        seconds = time.perf_counter() - began
    return seconds, resident.peak, 0


def load_whole(rank, folder):
    with PeakResident() as resident:
        began = time.perf_counter()
        llama = model.load(folder, dtype=torch.bfloat16)
        seconds = time.perf_counter() - began
    return seconds, resident.peak, held(llama)


def load_rows(rank, folder):
    """As train.build: meta, sharded, allocated, filled; the time is that of filling."""
    config = model.LlamaConfig.from_folder(folder)
    with torch.device("meta"):
        llama = model.Llama(config)
    for block in llama.model.layers:
        fully_shard(block)
    fully_shard(llama)
    with PeakResident() as resident:
        llama.to_empty(device="cpu")
        dist.barrier()
        began = time.perf_counter()
        model.fill_parameters(llama, folder)
        dist.barrier()
        seconds = time.perf_counter() - began
    return seconds, resident.peak, held(llama)


def held(llama):
    return sum(model.local_tensor(p).nbytes for p in llama.parameters())


class PeakResident:
    """Largest growth of this process's resident memory while in the block, sampled each 5 ms."""

    def __enter__(self):
        self.before, self.peak, self.over = resident_bytes(), 0, threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self

    def sample(self):
        while not self.over.wait(0.005):
            self.peak = max(self.peak, resident_bytes() - self.before)

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()
        self.peak = max(self.peak, resident_bytes() - self.before)


def resident_bytes():
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def in_processes(ranks, function, folder, *more):
    """The results of `function(rank, folder)` on each of `ranks` new processes, joined by gloo."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as meeting, context.Pool(ranks) as pool:
        same = ranks, f"{meeting}/store", folder, *more
        calls = [(function, rank, *same) for rank in range(ranks)]
        return pool.starmap(joined, calls, chunksize=1)


def joined(function, rank, ranks, store, folder, *more):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    result = function(rank, folder, *more)
    dist.barrier()
    dist.destroy_process_group()
    return result


def drop_from_cache(files):
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(name, size, results):
    speeds = [size / 1e6 / max(seconds for seconds, _, _ in ranks) for ranks in results]
    resident = max(peak for ranks in results for _, peak, _ in ranks)
    parameters = max(kept for ranks in results for _, _, kept in ranks)
    each = ", ".join(f"{speed:,.0f}" for speed in speeds)
    print(
        f"| {name} | {max(speeds):,.0f} | {each} | {resident / 2**30:.2f} | "
        f"{parameters / 2**30:.2f} |"
    )


if __name__ == "__main__":
    main()

"""How near the kernels come to the machine's limits: python bench/kernels.py [--markdown]

On a GPU: time, share of the limit and memory of both functions of loss.py, forward and backward,
beside PyTorch, torch.compile and whichever of Liger and Cut Cross-Entropy is installed. The limit
is measured in the same run: for given logits a copy of as many bytes, 4 a bf16 logit of a row with
weight and 2 of any other; for lm_head and loss together the three matrix products over the rows
with weight. Providers take turns; "cold" empties the L2 cache before each call. The weights are
OpenChat's 1 and 0.1, which only this project takes: the others are given plain sums to compute.
Given logits have padded rows. Their gradient is made in the backward, so that this project moves 6
bytes a logit; loss and gradient in one launch, as with lm_head, is "the launch alone".

Without a GPU: the compiled kernels' registers, spills and width of access; three
values in a cell are those for sm_80, sm_90 and sm_100. With --only instructions, on any machine:
how many instructions an H100's threads execute for each bf16 logit, ours and Liger's.

N tokens, of which the share p has weight; V vocabulary, D hidden size.
"""

import argparse
import collections
import datetime
import functools
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a kernels.py
# ruff: noqa: E402

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import kernels.cross_entropy as ce
from kernels.linear_cross_entropy import logits_workspace, padded
from loss import linear_weighted_cross_entropy, weighted_cross_entropy

LOGITS_SHAPES = [(8192, 32000), (8192, 32002), (8192, 128256)]  # N, V
LINEAR_SHAPES = [  # N, D, V
    (8192, 4096, 32000),
    (8192, 4096, 32002),
    (77824, 4096, 32002),
    (4096, 4096, 128256),
    (40960, 4096, 128256),
    (8192, 2304, 256000),
]
SHARES = [1, 0.5, 0.2]  # of tokens with weight
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ROUNDS = 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="a table to append to RESULTS.md")
    parser.add_argument("--only", choices=["logits", "linear", "instructions"], help="one table")
    args = parser.parse_args()
    show = functools.partial(print_table, markdown=args.markdown)
    today = datetime.date.today()
    versions = f"PyTorch {torch.__version__}, Triton {triton.__version__}, {today}"
    if args.only == "instructions":
        show(f"Instructions for sm_90, bf16, padded rows: {versions}", instructions_table())
        return
    if not torch.cuda.is_available():
        print("Times need a GPU, and there is none here: run this again on one.", file=sys.stderr)
        rows, alike = without_what_is_alike(compiled_table())
        show(f"Compiled kernels: {versions}", rows)
        print(f"\nIn every row: {alike}.")
        return
    device = f"{torch.cuda.get_device_name()}, {versions}"
    if args.only != "linear":
        show(f"Weighted cross-entropy of given logits, bf16: {device}", logits_table())
    if args.only != "logits":
        show(f"lm_head and weighted cross-entropy, bf16: {device}", linear_table())


def logits_table():
    for N, V in LOGITS_SHAPES:
        for p in SHARES:
            logits = padded_rows(N, V, "cuda", torch.bfloat16).normal_().requires_grad_()
            targets, weights = targets_and_weights(N, V, p)
            calls = logits_calls(logits, targets, weights)
            read_and_written = (4 * p + 2 * (1 - p)) * N * V
            one = torch.empty(int(read_and_written / 2), device="cuda", dtype=torch.int8)
            calls["the launch alone"] = launch_alone(logits.detach(), targets, weights)
            calls["copy of as many bytes"] = functools.partial(torch.empty_like(one).copy_, one)
            measured = measure(calls)
            for row in rows_of({"N": N, "V": V, "p": p}, measured, "copy of as many bytes"):
                seconds = row["hot ms"] / 1e3 if isinstance(row["hot ms"], float) else float("nan")
                yield {**row, "TB/s": round(read_and_written / seconds / 1e12, 3)}


def padded_rows(N, V, device, dtype):
    return torch.empty(N, padded(V), device=device, dtype=dtype)[:, :V]


def logits_calls(logits, targets, weights):
    ignoring = targets.masked_fill(weights == 0, -100)

    def plain(logits):
        return F.cross_entropy(logits, ignoring, reduction="sum")

    forwards = {
        "this project": lambda logits: weighted_cross_entropy(logits, targets, weights).sum(),
        "torch": plain,
        "torch.compile": torch.compile(plain),
    }
    if liger := optional("liger_kernel.transformers", "LigerCrossEntropyLoss"):
        # Liger writes the gradient over the logits: later rounds see other numbers, not more work
        forwards["Liger"] = lambda logits: liger(reduction="sum")(logits, ignoring)
    return {name: backward_of(forward, logits) for name, forward in forwards.items()}


def launch_alone(logits, targets, weights):
    losses, correct = torch.empty_like(weights), torch.empty_like(weights, dtype=torch.bool)
    grad = padded_rows(*logits.shape, logits.device, logits.dtype)
    return lambda: ce.cross_entropy_rows(logits, targets, weights, losses, correct, grad)


def linear_table():
    for N, D, V in LINEAR_SHAPES:
        for p in SHARES:
            hidden = torch.randn(N, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
            lm_head = torch.randn(V, D, device="cuda", dtype=torch.bfloat16).mul_(0.02)
            lm_head.requires_grad_()
            targets, weights = targets_and_weights(N, V, p)
            calls = linear_calls(hidden, lm_head, targets, weights)
            calls["three products"] = three_products(hidden, lm_head, int(p * N))
            measured = measure(calls)
            yield from rows_of({"N": N, "D": D, "V": V, "p": p}, measured, "three products")


def linear_calls(hidden, lm_head, targets, weights):
    rows = weights.nonzero()[:, 0]  # the collator's list
    few_targets, few_weights = targets[rows], weights[rows]
    ignoring = targets.masked_fill(weights == 0, -100)

    def plain(hidden, lm_head):
        return F.cross_entropy(hidden @ lm_head.t(), ignoring, reduction="sum")

    forwards = {
        "this project": lambda hidden, lm_head: linear_weighted_cross_entropy(
            hidden[rows], lm_head, few_targets, few_weights
        )[0],
        "torch": plain,
        "torch.compile": torch.compile(plain),
    }
    if liger := optional("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss"):
        forwards["Liger"] = lambda hidden, lm_head: liger(reduction="sum")(
            lm_head, hidden, ignoring
        )
    if cut := optional("cut_cross_entropy", "linear_cross_entropy"):
        forwards["CCE"] = lambda hidden, lm_head: cut(hidden, lm_head, ignoring, reduction="sum")
    return {name: backward_of(forward, hidden, lm_head) for name, forward in forwards.items()}


def three_products(hidden, lm_head, rows):
    """The products alone, a chunk at a time as this project's own, with none of the rest."""
    hidden, lm_head = hidden.detach()[:rows], lm_head.detach()
    d_hidden, d_lm_head = torch.empty_like(hidden), torch.empty_like(lm_head)

    def call():
        workspace = logits_workspace(hidden, lm_head)
        for start in range(0, rows, len(workspace)):
            chunk = slice(start, min(start + len(workspace), rows))
            x = hidden[chunk]
            logits = torch.mm(x, lm_head.t(), out=workspace[: len(x)])
            torch.mm(logits, lm_head, out=d_hidden[chunk])
            torch.mm(logits.t(), x, out=d_lm_head)

    return call


def targets_and_weights(N, V, p):
    targets = torch.randint(V, (N,), device="cuda")
    weights = torch.where(torch.rand(N, device="cuda") < 0.2, 1.0, 0.1)
    weights[torch.randperm(N, device="cuda")[int(p * N) :]] = 0
    return targets, weights


def optional(module, name):
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError):
        return None


def backward_of(forward, *inputs):
    return lambda: torch.autograd.grad(forward(*inputs), inputs)


def measure(calls):
    """{name: (hot ms, cold ms, peak GiB above the level before)}, or the error's name."""
    flush = torch.empty(2**28, device="cuda", dtype=torch.int8)  # 256 MiB, five times an L2
    times = {name: {"hot": [], "cold": []} for name in calls}
    peaks, failed = {}, {}
    for name, call in calls.items():
        try:
            call()  # compiles
            peaks[name] = peak_of(call)
        except Exception as error:  # a peer's failure is a result too
            failed[name] = type(error).__name__
            torch.cuda.empty_cache()
    for _ in range(ROUNDS):
        for name in peaks:
            for cache in ("cold", "hot"):
                if cache == "cold":
                    flush.zero_()
                times[name][cache].append(time_of(calls[name]))
    medians = {
        name: tuple(statistics.median(times[name][cache]) for cache in ("hot", "cold"))
        for name in peaks
    }
    return {name: failed.get(name) or (*medians[name], peaks[name]) for name in calls}


def peak_of(call):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def time_of(call):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5_000_000)  # some milliseconds in which the host runs ahead of the GPU
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def rows_of(shape, measured, limit):
    for name, result in measured.items():
        if isinstance(result, str):
            yield {**shape, "": name, "hot ms": result, "cold ms": "", "of limit": "", "GiB": ""}
            continue
        hot, cold, peak = result
        share = f"{measured[limit][0] / hot:.1%}" if not isinstance(measured[limit], str) else ""
        figures = {"hot ms": round(hot, 3), "cold ms": round(cold, 3), "of limit": share}
        yield {**shape, "": name, **figures, "GiB": round(peak, 2)}


def compiled_table():
    """A row per dtype and V; if sm_80, sm_90 and sm_100 differ, a cell has one value of each."""
    for dtype in TRITON_NAMES:
        for V in (512, 32002, 128256):
            rows = padded_rows(1, V, "cpu", dtype)
            of_sm = [compiled_cross_entropy(rows, capability) for capability in (80, 90, 100)]
            values = {key: [of[key] for of in of_sm] for key in of_sm[0]}
            yield {
                key: of[0] if len(set(of)) == 1 else " ".join(map(str, of))
                for key, of in values.items()
            }


def without_what_is_alike(rows):
    """The rows without the columns of one value, and these in words."""
    rows = list(rows)
    alike = {key for key in rows[0] if len({row[key] for row in rows}) == 1}
    words = ", ".join(f"{key} {value}" for key, value in rows[0].items() if key in alike)
    return [{k: v for k, v in row.items() if k not in alike} for row in rows], words


def compiled_cross_entropy(logits, capability):
    """The kernel as Triton and ptxas compile it for such rows, for a GPU that may be absent."""
    kernel, shape = compiled(logits, logits, capability)
    asm = kernel.asm
    registers, spilled = assembled(asm["ptx"])
    threads = 32 * shape["num_warps"]
    accesses = collections.Counter(widths_of_access(asm["ptx"]))
    return {
        "dtype": TRITON_NAMES[logits.dtype], "V": logits.shape[1],
        "BLOCK": shape["BLOCK"], "warps": shape["num_warps"],
        "registers": registers, "spilled bytes": spilled,
        "programs an SM": programs(registers, threads),
        "row offsets": row_offsets(asm["ttir"]),
        "barriers in loops": barriers_in_loops(asm["ptx"]),
        "accesses": " ".join(f"{k}:{accesses[k]}" for k in sorted(accesses)),
    }  # fmt: skip


def programs(registers, threads):
    """How many programs an SM holds, by registers and threads alone."""
    return min(65536 // (registers * threads), 2048 // threads, 32)


def compiled(logits, grad, capability):
    """(the kernel as Triton compiles it for cross_entropy_rows of these tensors, launch_shape).

    Needs a process without TRITON_INTERPRET.
    """
    out = logits if grad is None else grad
    shape = ce.launch_shape(logits, out)
    name = TRITON_NAMES[logits.dtype]
    pointers = {
        "logits": f"*{name}", "targets": "*i64", "weights": "*fp32",
        "losses": "*fp32", "correct": "*i1", "grads": f"*{name}",
    }  # fmt: skip
    unaligned = {k for k, rows in (("logits", logits), ("grads", out)) if rows.data_ptr() % 16}
    integers = dict.fromkeys(("V", "stride", "grads_stride"), "i32")
    constants = {"WITH_GRAD": grad is not None, "BLOCK": shape["BLOCK"], "VECTOR": shape["VECTOR"]}
    arguments = ce.cross_entropy_kernel.arg_names
    source = ASTSource(
        ce.cross_entropy_kernel,
        signature=pointers | integers | dict.fromkeys(constants, "constexpr"),
        constexprs={(arguments.index(k),): v for k, v in constants.items()},
        attrs={
            (arguments.index(k),): [["tt.divisibility", 16]] for k in pointers if k not in unaligned
        },
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": shape["num_warps"]}
    return triton.compile(source, target=target, options=options), shape


def widths_of_access(ptx):
    """Of every load and store of global memory: ["b32", "v4.b32", ...]."""
    return re.findall(r"\b(?:ld|st)\.global\S*?((?:v\d\.)?b\d+)\b", ptx)


def barriers_in_loops(ptx):
    """How often the threads of a program wait for each other in the loops over a row."""
    lines, starts, found = ptx.splitlines(), {}, set()
    for number, line in enumerate(lines):
        if label := re.match(r"\s*(\$\w+):", line):
            starts[label[1]] = number
        elif (back := re.search(r"\bbra\S*\s+(\$\w+)", line)) and back[1] in starts:
            found |= {n for n in range(starts[back[1]], number) if "bar.sync" in lines[n]}
    return len(found)


def row_offsets(ttir):
    """The types in which the row's number is multiplied by a stride; i32 would overflow."""
    return " ".join(sorted(set(re.findall(r"= arith.muli %row\w*, .* : (\w+)", ttir))))


def assembled(ptx):
    """(registers a thread, bytes spilled) by the ptxas that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        architecture = re.search(r"\.target (\w+)", ptx)[1]
        ptxas = get_ptxas(int(re.sub(r"\D", "", architecture))).path  # triton 3.9 has another
        command = [ptxas, "-v", f"--gpu-name={architecture}", file, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    return int(re.search(r"Used (\d+) registers", log)[1]), spilled


def instructions_table():
    """A row per kernel and V: of the loops over a row, instructions per logit in each pass.

    Counted in ptxas's output, per thread and iteration; of the loops of a pass the shortest,
    which is ours for whole blocks, and in the last column the longest.
    """
    makers = {"this project": our_kernel}
    if liger := optional("liger_kernel.ops.cross_entropy", "liger_cross_entropy_kernel"):
        makers["Liger"] = functools.partial(liger_kernel, liger)
    for _, V in LOGITS_SHAPES:
        for name, make in makers.items():
            kernel, block = make(V)
            registers, spilled = assembled(kernel.asm["ptx"])
            threads = 32 * kernel.metadata.num_warps
            passes = [sorted(each) for each in lengths_of_loops(kernel.asm["cubin"])]
            sums = [sum(each[i] for each in passes) * threads / block for i in (0, -1)]
            yield {
                "V": V, "": name, "threads": threads, "registers": registers,
                "spilled bytes": spilled, "programs an SM": programs(registers, threads),
                "pass 1": round(passes[0][0] * threads / block, 1),
                "pass 2": round(passes[1][0] * threads / block, 1),
                "both": round(sums[0], 1), "at a row's end": round(sums[1], 1),
            }  # fmt: skip


def our_kernel(V):
    rows = padded_rows(1, V, "cpu", torch.bfloat16)
    kernel, shape = compiled(rows, rows, 90)
    return kernel, shape["BLOCK"]


def liger_kernel(function, V):
    """(Liger's kernel as its cross_entropy_forward launches it on an H100, its BLOCK_SIZE)."""
    block = min(2**15, triton.next_power_of_2(V))
    names, constants = function.arg_names, {"BLOCK_SIZE": block, "reduction": "sum"}
    constants |= {"lse_square_scale": 0.0, "label_smoothing": 0.0}
    constants |= dict.fromkeys([n for n in names if n.startswith(("RETURN_", "HAS_"))], False)
    constants["HAS_GRADIENTS"] = True
    types = {n: "*fp32" if n.endswith("_ptr") else "fp32" for n in names}
    types |= dict.fromkeys([n for n in names if n.endswith("stride")], "i32")
    types |= {"X_ptr": "*bf16", "Y_ptr": "*i64", "n_cols": "i32", "ignore_index": "i32"}
    aligned = [n for n in names if n.endswith("_ptr")] + ["X_stride", "n_cols"] * (V % 16 == 0)
    source = ASTSource(
        function,
        signature=types | dict.fromkeys(constants, "constexpr"),
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(k),): [["tt.divisibility", 16]] for k in aligned},
    )
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 32}), block


def lengths_of_loops(cubin):
    """(of loops that only read, of loops that write too): instructions of those that take exp2."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        tool = Path(get_ptxas(90).path).with_name("nvdisasm")
        text = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout
    reading, writing = [], []
    for block in re.split(r"^(?=\s*\.L_x_\d+:)", text, flags=re.MULTILINE):
        label = re.match(r"\s*(\.L_x_\d+):", block)
        if label and "MUFU.EX2" in block and re.search(rf"BRA `\({label[1]}\)", block):
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?!NOP)\S", block)
            (writing if "STG" in block else reading).append(len(instructions))
    return reading, writing


def print_table(title, rows, markdown):
    """Prints a row as soon as it is known; columns line up as far as the first row tells.

    The nameless column, of who was measured, has room for the longest of them.
    """
    print(f"\n### {title}\n" if markdown else f"\n{title}\n", flush=True)
    for number, row in enumerate(rows):
        if number == 0:
            widths = [max(len(k), len(str(v)), 6 if k else 21) for k, v in row.items()]
            print(line(row, widths, markdown))
            if markdown:
                print("|" + "|".join("---" for _ in row) + "|")
        print(line(row.values(), widths, markdown), flush=True)


def line(cells, widths, markdown):
    if markdown:
        return "| " + " | ".join(map(str, cells)) + " |"
    padded_cells = (str(cell).ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded_cells).rstrip()


if __name__ == "__main__":
    main()

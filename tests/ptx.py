"""Runs compiled kernels without a GPU: PTX interpreted in NumPy, a warp of 32 lanes at a time.

Modelled: the instructions that Triton makes of kernels/cross_entropy.py and of Inductor's kernels
for a block, and no others, integers exactly and floats with their rounding to float32, fp16 and
bf16; lanes that part and meet again; warps that run in a random order, each alone up to its next
barrier; memory that is the given tensors' storages and nothing else.

Refused, as a Fault that names the instruction and its source: an instruction or modifier that is
not in the tables below; an access outside memory or off its alignment; warps or lanes that wait at
different barriers, or for some that have ended; a shuffle of less than a warp; a register that was
never written. Where only some lanes wrote a register the others find random bits, and so does who
reads shared memory before it is written.

A Race is refused too: two threads that touch a byte, one of them to write it, with no barrier
between them, be they of one warp; or two programs that do so at all. The order in which the warps
happened to run does not matter to it. Only in shared memory several may store the same value.

Not modelled: ptxas, and what the GPU itself runs; the errors of ex2.approx and div.full, which are
rounded correctly here; fma rounds twice, by way of float64; caches and their hints; time.
"""

import functools
import re
from typing import NamedTuple

import numpy as np
import torch

LANES = 32
NOBODY, SEVERAL = -1, -2


class Fault(Exception):
    pass


class Race(Fault):
    pass


def launch(kernel, programs, arguments, tensors, seed=0):
    """Runs the programs of these numbers one after another; returns the Memory of each tensor.

    arguments are integers: pointers as data_ptr() gives them, to the storages of `tensors`.
    """
    rng = np.random.default_rng(seed)  # of the order of warps, and of what is not set
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    of_tensors = {
        start: Memory(start, torch.empty(0, dtype=torch.uint8).set_(storage).numpy())
        for start, storage in storages.items()
    }
    for program in programs:
        shared = Memory(0, rng.integers(0, 256, kernel.shared_bytes, np.uint8))
        memory = {"shared": [shared], "global": list(of_tensors.values())}
        with np.errstate(all="ignore"):
            run_program(kernel, program, arguments, memory, rng)
    return [of_tensors[t.untyped_storage().data_ptr()] for t in tensors]


def run_program(kernel, program, arguments, memory, rng):
    warps = [
        Warp(kernel, program, np.arange(LANES) + first, arguments, memory, rng).run()
        for first in range(0, kernel.threads, LANES)
    ]
    stops = {"the start"}
    while stops != {"the end"}:
        for one in (*memory["shared"], *memory["global"]):
            one.threads.clear()
        stops = {next(warps[i], "the end") for i in rng.permutation(len(warps))}
        if len(stops) > 1:
            raise Fault(f"warps wait for each other at {' and '.join(sorted(stops))}")


class Memory:
    """Bytes from an address on; which programs touched them, and which threads since a barrier."""

    def __init__(self, start, data):
        self.start, self.data = start, data
        self.programs, self.threads = Touches(len(data)), Touches(len(data))


class Touches:
    """Who wrote and who read each byte: a number, NOBODY or SEVERAL."""

    def __init__(self, size):
        self.writer, self.reader = np.full((2, size), NOBODY, np.int32)

    def clear(self):
        self.writer[:] = self.reader[:] = NOBODY

    def read(self, places, who):
        """places (lanes, bytes) that who (lanes, 1) read at once."""
        self.refuse_others(self.writer[places], who)
        before = self.reader[places]
        self.reader[places] = who
        several = (before != NOBODY) & (before != who) | (self.reader[places] != who)
        self.reader[places[several]] = SEVERAL

    def write(self, places, who):
        self.refuse_others(self.writer[places], who)
        self.refuse_others(self.reader[places], who)
        self.writer[places] = who
        self.refuse_others(self.writer[places], who)  # two lanes at once

    def refuse_others(self, found, who):
        if (others := (found != NOBODY) & (found != who)).any():
            one, other = np.broadcast_to(who, found.shape)[others][0], found[others][0]
            raise Race(f"{one} and {other} ({SEVERAL}: several) touch a byte, one to write it")


class Instruction(NamedTuple):
    guard: str | None  # a predicate's register
    wanted: bool  # its value where this runs
    opcode: str
    operands: list
    text: str  # with its place in the source


class Kernel:
    """PTX, read. shared_bytes is Triton's own count of shared memory, which PTX leaves open."""

    def __init__(self, ptx, shared_bytes):
        self.shared_bytes = shared_bytes
        self.threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
        self.parameters = re.findall(r"\.param .*?(\w+_param_\d+)", ptx)
        self.code, self.labels, source = [], {}, ""
        for line in re.search(r"^\{$(.*?)^\}$", ptx, re.MULTILINE | re.DOTALL)[1].splitlines():
            line, _, comment = (part.strip() for part in line.partition("//"))
            if line.startswith(".loc"):
                source = comment
            elif label := re.fullmatch(r"(\$\w+):", line):
                self.labels[label[1]] = len(self.code)
            elif line and not line.startswith(".reg"):
                self.code.append(parsed(line, source))


def parsed(line, source):
    read = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*);", line)
    if not read or not known(read[3]):
        raise Fault(f"unknown instruction: {line}  // {source}")
    operands = re.findall(r"\{.*?\}|\[.*?\]|[^\s,]+", read[4])
    opcode = "max3.f32" if read[3] == "max.f32" and len(operands) == 4 else read[3]
    return Instruction(read[2], read[1] != "!", opcode, operands, f"{line}  // {source}")


def known(opcode):
    tables = opcode in OPERATIONS or opcode in OTHERS
    return tables or ACCESS.fullmatch(opcode) or MATRIX.fullmatch(opcode)


class Warp:
    """32 threads: the registers of all, and each one's next instruction."""

    def __init__(self, kernel, program, threads, arguments, memory, rng):
        self.kernel, self.program, self.threads = kernel, program, threads
        self.memory, self.rng = memory, rng
        self.arguments = dict(zip(kernel.parameters, arguments))
        self.registers = {}
        self.next = np.zeros(LANES, int)

    def run(self):
        """Runs to the end, and yields at each barrier. Lanes that are behind go first."""
        while (at := self.next.min()) < len(self.kernel.code):
            instruction = self.kernel.code[at]
            lanes = self.next == at
            self.next[lanes] += 1
            try:
                if instruction.guard:
                    lanes &= self.registers[instruction.guard] == instruction.wanted
                self.step(instruction.opcode, instruction.operands, lanes)
            except (Fault, KeyError) as error:
                kind = type(error) if isinstance(error, Fault) else Fault
                raise kind(f"{error!r} in: {instruction.text}") from error
            if instruction.opcode == "bar.sync" and lanes.any():
                yield f"{at}: {instruction.text}"

    def step(self, opcode, operands, lanes):
        if opcode in OPERATIONS:
            sources, function, kind = OPERATIONS[opcode]
            values = [self.read(*pair) for pair in zip(operands[1:], sources.split(), strict=True)]
            self.write(operands[0], kind, function(*values), lanes)
        elif access := ACCESS.fullmatch(opcode):
            self.access(access, operands, lanes)
        elif matrix := MATRIX.fullmatch(opcode):
            self.matrices(matrix, operands, lanes)
        elif opcode.startswith("bra"):
            self.next[lanes] = self.kernel.labels[operands[0]]
        elif opcode == "ret":
            self.next[lanes] = len(self.kernel.code)
        elif opcode in POLICIES:
            self.write(operands[0], "b64", np.zeros(LANES, np.uint64), lanes)
        elif lanes.any() and not lanes.all():  # what is left takes a whole warp
            raise Fault(f"of a warp only lanes {np.flatnonzero(lanes)}")
        elif opcode == "shfl.sync.bfly.b32" and operands[3:] == ["31", "-1"]:
            partner = np.arange(LANES) ^ int(operands[2])
            self.write(operands[0], "b32", self.read(operands[1], "b32")[partner], lanes)
        elif opcode in REDUCTIONS and (self.read(operands[2], "s32") == -1).all():
            kind = opcode.split(".")[-1]
            value = REDUCTIONS[opcode](self.read(operands[1], kind))
            self.write(operands[0], kind, np.full(LANES, value), lanes)
        elif opcode != "bar.sync" or operands != ["0"]:
            raise Fault("unknown operands")

    def access(self, opcode, operands, lanes):
        """A load or a store of one, two or four registers of each lane."""
        way, space, count, kind = opcode["way"], opcode["space"], opcode["count"], opcode["kind"]
        if space == "param":
            value = np.full(LANES, self.arguments[operands[1].strip("[]")])
            return self.write(operands[0], kind, value, lanes)
        values, address = operands[:2] if way == "ld" else operands[1::-1]
        registers, size = values.strip("{ }").split(","), np.dtype(NUMPY[kind]).itemsize
        if (len(registers), len(operands)) != (int(count or 1), 3 if opcode["hint"] else 2):
            raise Fault("unknown operands")
        memory, places = self.places(space, address, size * len(registers), lanes)
        program, threads = np.full((lanes.sum(), 1), self.program), self.threads[lanes, None]
        if way == "ld":
            memory.programs.read(places, program)
            memory.threads.read(places, threads)
            found = memory.data[places].view(NUMPY[kind])  # (lanes, registers)
            for register, column in zip(registers, found.T):
                value = np.zeros(LANES, NUMPY[kind])
                value[lanes] = column
                self.write(register.strip(), kind, value, lanes)
        else:
            columns = [self.read(register.strip(), kind)[lanes] for register in registers]
            data = np.stack(columns, axis=1).view(np.uint8)
            if space == "shared":
                new = ~stored_already(memory, places, data)
                places, data, program, threads = places[new], data[new], program[new], threads[new]
            memory.programs.write(places, program)
            memory.threads.write(places, threads)
            memory.data[places] = data

    def matrices(self, opcode, operands, lanes):
        """Loads or stores 8 x 8 matrices of 16 bits: lane i has two neighbours of row i // 4.

        Lanes 8·m to 8·m + 7 give the addresses of matrix m's rows, register m holds it.
        """
        if not lanes.all():
            raise Fault(f"of a warp only lanes {np.flatnonzero(lanes)}")
        values, address = operands if opcode["way"] == "ld" else operands[::-1]
        registers = [register.strip() for register in values.strip("{ }").split(",")]
        rows = np.arange(LANES) < 8 * len(registers)
        memory, places = self.places("shared", address, 16, rows)
        for register, matrix in zip(registers, places.reshape(-1, 8, 8, 2)):
            matrix = matrix.swapaxes(0, 1) if opcode["turned"] else matrix
            bytes = matrix.reshape(LANES, 4)
            if opcode["way"] == "ld":
                memory.threads.read(bytes, self.threads[:, None])
                self.write(register, "b32", memory.data[bytes].view(np.uint32)[:, 0], lanes)
            else:
                memory.threads.write(bytes, self.threads[:, None])
                memory.data[bytes] = self.read(register, "b32")[:, None].view(np.uint8)

    def places(self, space, address, size, lanes):
        """The Memory these lanes access, and the indices (lanes, size) of the bytes there."""
        base, offset = re.fullmatch(r"\[\s*(\S+?)\s*(?:\+\s*(-?\d+)\s*)?\]", address).groups()
        start = self.read(base, "b64").astype(np.int64)[lanes] + int(offset or 0)
        if (start % size).any():
            raise Fault(f"not on {size} bytes")
        for memory in self.memory[space]:
            places = start - memory.start
            if ((places >= 0) & (places + size <= len(memory.data))).all():
                return memory, places[:, None] + np.arange(size)
        raise Fault("outside memory")

    def read(self, operand, kind):
        """Values (32,) of a register, a constant or {parts, lowest first}; of a pair (32, 2)."""
        if operand[0] == "{":
            names = operand.strip("{ }").split(",")
            parts = [self.set_or_random(name.strip()) for name in names]  # LLVM may use one half
            bits = np.stack(parts, axis=1).view(NUMPY[kind])[:, 0]
        elif operand in ("%tid.x", "%ctaid.x"):
            bits = self.threads if operand == "%tid.x" else np.full(LANES, self.program)
        elif operand[0] == "%":
            bits = self.registers[operand]
        elif operand == "global_smem":
            bits = np.zeros(LANES, np.uint64)
        else:
            bits = constant(operand)
        return bits if kind == "pred" else of_bits(bits, kind)

    def write(self, operand, kind, values, lanes):
        if operand[0] == "{":
            parts = [part.strip() for part in operand.strip("{ }").split(",")]
            size = values.itemsize // len(parts)
            for part, column in zip(parts, values.view(f"u{size}").reshape(LANES, -1).T):
                if part != "_":
                    self.write(part, f"b{8 * size}", column, lanes)
            return
        dtype = register_dtype(operand)
        new = values if kind == "pred" else to_bits(values, kind, dtype)
        if not lanes.all():
            new = np.where(lanes, new, self.set_or_random(operand))
        self.registers[operand] = new

    def set_or_random(self, register):
        """What a register holds, or what one may hold that was never written."""
        if register in self.registers:
            return self.registers[register]
        dtype = register_dtype(register)
        bits = np.frombuffer(self.rng.bytes(LANES * np.dtype(dtype).itemsize), np.uint8)
        return bits % 2 == 1 if dtype == "?" else bits.view(dtype)


def stored_already(memory, places, data):
    """Which lanes store what others did since a barrier: Triton's replicated layouts do that."""
    same = (memory.threads.writer[places] != NOBODY) & (memory.data[places] == data)
    both = np.concatenate([places[:, :1], data], axis=1)
    _, first = np.unique(both, axis=0, return_index=True)
    return same.all(axis=1) | ~np.isin(np.arange(len(places)), first)


def register_dtype(name):
    return REGISTERS[name.rstrip("0123456789")]


@functools.cache
def constant(text):
    if text.startswith("0f"):
        return np.full(LANES, int(text[2:], 16), np.uint32)
    return np.full(LANES, int(text, 0))


def of_bits(bits, kind):
    """The numbers that these bits are; a pair's first is in the lower half."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    dtype = np.dtype(NUMPY[kind])
    size = dtype.itemsize * (2 if kind.endswith("x2") else 1)
    numbers = bits.astype(f"u{size}", copy=False).view(dtype)
    return numbers.reshape(LANES, 2) if kind.endswith("x2") else numbers


def to_bits(numbers, kind, dtype):
    """The bits of numbers, rounded to `kind`, in a register of this dtype; signed ones extended."""
    if kind in ("bf16", "bf16x2"):
        numbers = np.ascontiguousarray(numbers, np.float32)
        bits = numbers.view(np.uint32)
        bits = bits + 0x7FFF + (bits >> 16 & 1) >> 16  # to nearest, ties to even
        numbers = np.where(np.isnan(numbers), 0x7FFF, bits).astype(np.uint16)
    else:
        numbers = np.ascontiguousarray(numbers.astype(NUMPY[kind], copy=False))
    if kind[0] == "s":
        return numbers.astype(dtype.replace("u", "i")).view(dtype)
    size = numbers.itemsize * (2 if kind.endswith("x2") else 1)
    return numbers.view(f"u{size}").reshape(LANES).astype(dtype, copy=False)


def fma(a, b, c):
    if a.dtype != np.float32:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def flushed(function):
    """.ftz: numbers below float32's normal ones are 0, as arguments and as results."""

    def flush(x):
        return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)

    return lambda *arguments: flush(function(*map(flush, arguments)))


def same(x):
    return x


def maximum(first, *others):
    """The larger; of a number and a NaN the number."""
    for other in others:
        first = np.fmax(first, other)
    return first


def fma_down(a, b, c):
    """Rounded towards minus infinity."""
    exact = a.astype(np.float64) * b + c
    near = exact.astype(np.float32)
    return np.where(near > exact, np.nextafter(near, np.float32(-np.inf)), near)


def saturated(x):
    """From 0 to 1; a NaN is 0."""
    return np.clip(np.nan_to_num(x, nan=0), 0, 1)


def extract(x, first, count):
    """Bits of x, of which the last is the sign if x is signed."""
    kind = f"{x.dtype.kind}8"
    high = x.astype(kind) << (64 - first.astype(kind) - count.astype(kind))
    return high >> (64 - count.astype(kind))


def wide(a, b, c=0):
    return a.astype(f"{a.dtype.kind}8") * b + c


def shl(x, by):
    return np.where(by < 8 * x.itemsize, x << by.astype(x.dtype), 0)


def shr(x, by):
    """Signed numbers fill with their sign."""
    last = 8 * x.itemsize - 1
    return x >> np.minimum(by, last).astype(x.dtype) >> (by > last).astype(x.dtype)


def pair(high, low):
    return np.stack([low, high], axis=1)


def choose(a, b, condition):
    return np.where(condition, a, b)


NUMPY = {
    "b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8", "u16": "u2", "u32": "u4", "u64": "u8",
    "s32": "i4", "s64": "i8", "f16": "f2", "f32": "f4", "f16x2": "f2", "f32x2": "f4",
}  # fmt: skip
REGISTERS = {"%p": "?", "%rs": "u2", "%r": "u4", "%rd": "u8"}
COMPARISONS = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal}
COMPARISONS |= {"gt": np.greater, "ge": np.greater_equal}
REDUCTIONS = {"redux.sync.max.f32": np.fmax.reduce, "redux.sync.min.s32": np.min}
POLICIES = {f"createpolicy.fractional.L2::evict_{which}.b64" for which in ("first", "last")}
OTHERS = {"bra", "bra.uni", "ret", "bar.sync", "shfl.sync.bfly.b32", *REDUCTIONS, *POLICIES}
MATRIX = re.compile(
    r"(?P<way>ld|st)matrix\.sync\.aligned\.m8n8\.x[124](?P<turned>\.trans)?\.shared\.b16"
)
ACCESS = re.compile(
    r"(?P<way>ld|st)\.(?P<space>param|shared|global)"
    r"(?P<hint>\.L1::evict_(first|last)\.L2::cache_hint)?"
    r"(\.v(?P<count>[24]))?\.(?P<kind>b8|b16|b32|b64|s32)"
)
OPERATIONS = {  # opcode: (kinds of the sources, function, kind of the result)
    **{f"mov.{kind}": (kind, same, kind) for kind in ("b16", "u16", "b32", "u32", "b64", "u64")},
    **{f"add.{kind}": (f"{kind} {kind}", np.add, kind) for kind in ("s32", "s64", "f32", "f32x2")},
    **{f"sub.{kind}": (f"{kind} {kind}", np.subtract, kind) for kind in ("s32", "f32", "f32x2")},
    **{f"mul.{kind}": (f"{kind} {kind}", np.multiply, kind) for kind in ("f32", "f32x2")},
    **{f"sub.rn.f32.{kind}": (f"{kind} f32", np.subtract, "f32") for kind in ("bf16", "f16")},
    **{f"fma.rn.{kind}": (f"{kind} {kind} {kind}", fma, kind) for kind in ("f32", "f32x2")},
    "fma.rn.ftz.f32": ("f32 f32 f32", flushed(fma), "f32"),
    "fma.rm.ftz.f32": ("f32 f32 f32", flushed(fma_down), "f32"),
    "ex2.approx.f32": ("f32", np.exp2, "f32"),
    "ex2.approx.ftz.f32": ("f32", flushed(np.exp2), "f32"),
    "rsqrt.approx.ftz.f32": ("f32", flushed(lambda x: np.float32(1) / np.sqrt(x)), "f32"),
    "neg.f32": ("f32", np.negative, "f32"),
    "neg.s32": ("s32", np.negative, "s32"),
    "cvt.ftz.sat.f32.f32": ("f32", flushed(saturated), "f32"),
    "div.full.f32": ("f32 f32", np.divide, "f32"),
    "max.f32": ("f32 f32", maximum, "f32"),
    "max3.f32": ("f32 f32 f32", maximum, "f32"),  # max.f32 of three, from sm_100 on
    "min.s32": ("s32 s32", np.minimum, "s32"),
    "max.s32": ("s32 s32", np.maximum, "s32"),
    **{f"mul.lo.{kind}": (f"{kind} {kind}", np.multiply, kind) for kind in ("s32", "s64")},
    **{f"mul.wide.{kind}32": (f"{kind}32 {kind}32", wide, f"{kind}64") for kind in "su"},
    **{f"mad.wide.{kind}32": (f"{kind}32 {kind}32 {kind}64", wide, f"{kind}64") for kind in "su"},
    **{f"and.{kind}": (f"{kind} {kind}", np.bitwise_and, kind) for kind in ("b32", "b64", "pred")},
    **{f"or.{kind}": (f"{kind} {kind}", np.bitwise_or, kind) for kind in ("b32", "b64")},
    "xor.b32": ("b32 b32", np.bitwise_xor, "b32"),
    "mov.pred": ("pred", lambda x: x != 0, "pred"),
    **{f"bfe.{kind}": (f"{kind} u32 u32", extract, kind) for kind in ("u32", "s32")},
    **{f"not.{kind}": (kind, np.bitwise_not, kind) for kind in ("b32", "pred")},
    **{f"shl.{kind}": (f"{kind} u32", shl, kind) for kind in ("b32", "b64")},
    **{f"shr.{kind}": (f"{kind} u32", shr, kind) for kind in ("u32", "s32", "s64")},
    **{
        f"setp.{name}.{kind}": (f"{kind} {kind}", function, "pred")
        for name, function in COMPARISONS.items()
        for kind in ("b32", "b64", "u32", "s32", "u64", "s64", "f32")
        if (name, kind) != ("ne", "f32")  # of NaN true in NumPy and false in PTX
    },
    **{f"selp.{kind}": (f"{kind} {kind} pred", choose, kind) for kind in ("b16", "b32", "f32")},
    **{f"cvt.f32.{kind}": (kind, same, "f32") for kind in ("bf16", "f16")},
    **{f"cvt.rn.{kind}.f32": ("f32", same, kind) for kind in ("bf16", "f16")},
    **{f"cvt.rn.{kind}x2.f32": ("f32 f32", pair, f"{kind}x2") for kind in ("bf16", "f16")},
    **{f"cvt.{to}.{of}": (of, same, to) for to, of in (("s64", "s32"), ("u32", "u64"))},
    **{f"cvt.{to}.{of}": (of, same, to) for to, of in (("u64", "u32"), ("u32", "u16"))},
    "cvt.rn.f32.s32": ("s32", same, "f32"),
}

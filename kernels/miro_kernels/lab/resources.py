"""Kernels compiled ahead of time for GPUs that are not present, and their registers and SASS.

    with capture("sm_90") as kernels:
        adaln(x, shift, scale)         # CPU tensors; nothing runs, results are uninitialized
    kernels[0].registers, kernels[0].spills, kernels[0].matrix

A launch goes through the op's own launch code and Triton's own specialization, so the result is
what a GPU would run: shapes divisible by 16, aligned pointers, the tiles of that target. ptxas and
cuobjdump come with Triton; for gfx942 the assembly text is parsed.

An access is wide at 128 bits per thread. It is narrow if it is not, although its tile has 128 bits
or more for every thread of the program; scalars and one or two numbers per row are neither.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from miro_kernels import backend
from miro_kernels.lab.private_triton import JITFunction, driver


@dataclass(frozen=True)
class Machine:
    """Limits of one multiprocessor (CUDA C++ Programming Guide, compute capabilities), in bytes."""

    target: GPUTarget
    warps: int
    programs: int
    shared: int
    shared_per_program: int

    @property
    def vendor(self) -> str:
        """Triton's backend: cuda or hip."""
        return self.target.backend


KIB = 1024
MACHINES = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), 64, 32, 164 * KIB, 163 * KIB),
    "sm_90": Machine(GPUTarget("cuda", 90, 32), 64, 32, 228 * KIB, 227 * KIB),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), 64, 32, 228 * KIB, 227 * KIB),
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * KIB, 64 * KIB),
}
REGISTERS = 65536  # 32-bit, per multiprocessor; allocated 256 at a time to a warp
WIDE = 16  # bytes per thread


@dataclass(frozen=True)
class Compiled:
    """Resources and instruction counts of one compiled kernel."""

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int  # instructions that move registers to or from local memory
    shared: int
    shared_limit: int
    occupancy: float  # resident warps over the maximum
    wide: int
    narrow: int
    mma: int
    atomics: int
    matrix: dict[str, int]  # matrix instructions by name

    @property
    def fits(self) -> bool:
        """Whether one program's shared memory is within the limit."""
        return self.shared <= self.shared_limit


class _StubDriver:
    """A Triton driver with a target and no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # JITFunction caches compiled kernels by device: one for every target.
        return str(self.target.arch)

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def capture(target: str) -> Iterator[list[Compiled]]:
    """Compile the kernels launched inside for `target`, a key of MACHINES, without running them.

    Yields:
        The list to which each kernel is appended, once, in the order of launches.
    """
    assert not knobs.runtime.interpret, "compiling needs a process without TRITON_INTERPRET"
    machine = MACHINES[target]
    kernels: list[Compiled] = []
    seen: set[str] = set()
    run = JITFunction.run

    def compile_only(function: Any, *arguments: Any, **options: Any) -> CompiledKernel:
        options["warmup"] = True
        kernel: Any = run(function, *arguments, **options)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            kernels.append(examine(kernel, target))
        return kernel

    with (
        backend.allow_cpu_tensors(),
        backend.use_backend("triton"),
        mock.patch.object(driver, "_active", _StubDriver(machine.target)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield kernels


def examine(kernel: CompiledKernel, target: str) -> Compiled:
    """The resources and instruction counts of a compiled kernel."""
    machine = MACHINES[target]
    counts = (_read_cuda if machine.vendor == "cuda" else _read_hip)(kernel)
    metadata: Any = kernel.metadata
    registers, shared, warps = counts.pop("registers"), metadata.shared, metadata.num_warps
    return Compiled(
        kernel=metadata.name,
        target=target,
        warps=warps,
        registers=registers,
        shared=shared,
        shared_limit=machine.shared_per_program,
        occupancy=occupancy(machine, registers, warps, shared),
        **counts,
    )


def occupancy(machine: Machine, registers: int, warps: int, shared: int) -> float:
    """Resident warps over the maximum, as limited by registers and shared memory."""
    if shared > machine.shared_per_program:
        return 0.0
    if machine.vendor == "cuda":
        per_warp = -(-registers * 32 // 256) * 256
        # A warp's registers are all in one of four partitions.
        by_registers = REGISTERS // per_warp // 4 * 4 // warps
        by_shared = machine.shared // (shared + KIB)  # 1 KiB per program is reserved
    else:
        # Four SIMD units of 512 vector registers each, allocated 8 at a time; at most 8 waves.
        by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps
        by_shared = machine.shared // max(shared, 1)
    programs = min(by_registers, by_shared, machine.programs, machine.warps // warps)
    return programs * warps / machine.warps


def _read_cuda(kernel: CompiledKernel) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = knobs.nvidia.cuobjdump.path
        usage, listing = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("--dump-resource-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage.stdout)
    assert registers is not None, usage.stdout
    instructions = Counter(
        re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing.stdout)
    )
    wide, narrow = _widths(kernel, _ptx_accesses(str(kernel.asm["ptx"])), threads=32)
    return {
        "registers": int(registers[1]),
        "spills": instructions["LDL"] + instructions["STL"],
        "wide": wide,
        "narrow": narrow,
        # Global memory only: ATOMS and SYNCS are shared memory, REDUX is registers.
        "atomics": sum(instructions[name] for name in ("ATOM", "ATOMG", "RED", "REDG", "UTMAREDG")),
        **_matrix(instructions, r"(?:[HIQ]G?MMA|UTC\w*MMA)$"),
    }


def _read_hip(kernel: CompiledKernel) -> dict[str, Any]:
    text = str(kernel.asm["amdgcn"])
    numbers = {key: int(n) for key, n in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    instructions = Counter(re.findall(r"^\s+([a-z]\w+)", text, re.M))
    wide, narrow = _widths(kernel, _gcn_accesses(text), threads=64)
    return {
        "registers": numbers["vgpr_count"],
        "spills": numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"],
        "wide": wide,
        "narrow": narrow,
        "atomics": sum(n for i, n in instructions.items() if re.match(r"\w+_atomic", i)),
        **_matrix(instructions, r"v_s?mfma"),
    }


def _matrix(instructions: Counter[str], pattern: str) -> dict[str, Any]:
    matrix = {name: n for name, n in instructions.items() if re.match(pattern, name)}
    return {"mma": sum(matrix.values()), "matrix": matrix}


Location = tuple[int, int]  # source line and column


def _ptx_accesses(text: str) -> Iterator[tuple[Location, int]]:
    """(source location, bytes per thread) of each global memory access."""
    location, in_asm, located_asm = (0, 0), False, False
    for line in text.splitlines():
        if "inline asm" in line:
            in_asm, located_asm = "begin" in line, False
        elif located := re.match(r"\s*\.loc\s+\d+ (\d+) (\d+)", line):
            # An access is inline assembly, in which only the first location is the source's.
            if not (in_asm and located_asm):
                location = (int(located[1]), int(located[2]))
            located_asm = True
        elif "cp.async.bulk.tensor" in line or "cp.reduce.async.bulk.tensor" in line:
            yield location, 128
        elif copied := re.search(r"cp\.async\.c[ag]\.shared\.global .*?\], \[.*?\], (\w+)", line):
            yield location, int(copied[1], 0)
        elif moved := re.search(r"\b(?:ld|st)\.[\w.:]*?global\S*?(?:\.v(\d))?\.[bfus](\d+) ", line):
            yield location, int(moved[1] or 1) * int(moved[2]) // 8


def _gcn_accesses(text: str) -> Iterator[tuple[Location, int]]:
    sizes = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4}
    location = (0, 0)
    for line in text.splitlines():
        if located := re.match(r"\s*\.loc\s+\d+ (\d+) (\d+)", line):
            location = (int(located[1]), int(located[2]))
        elif moved := re.match(
            r"\s+(?:buffer|global)_(?:load|store)_(?:lds_)?(ubyte|byte|ushort|short|dword)"
            r"(?:_d16(?:_hi)?)?(?:x(\d))?", line
        ):  # fmt: skip
            yield location, sizes[moved[1]] * int(moved[2] or 1)


def _widths(
    kernel: CompiledKernel, accesses: Iterator[tuple[Location, int]], threads: int
) -> tuple[int, int]:
    """The number of wide and of narrow accesses, with `threads` per warp.

    An access without a known tile counts as narrow, so that a test flags it.
    """
    metadata: Any = kernel.metadata
    tiles = tile_sizes(str(kernel.asm["ttgir"]))
    wide = narrow = 0
    for location, size in accesses:
        if size >= WIDE:
            wide += 1
        elif tiles.get(location, math.inf) >= WIDE * threads * metadata.num_warps:
            narrow += 1
    return wide, narrow


def tile_sizes(ttgir: str) -> dict[Location, int]:
    """Bytes of the largest tile accessed at each source location."""
    names = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.M))

    def resolve(name: str) -> Location:
        """The innermost source location of an MLIR location, which may be named or a call site."""
        if source := re.match(r'"[^"]*":(\d+):(\d+)', names.get(name, "")):
            return int(source[1]), int(source[2])
        inner = re.search(r"#loc\d*", names.get(name, ""))
        return resolve(inner[0]) if inner else (0, 0)

    sizes: dict[Location, int] = {}
    for shape, bits, name in re.findall(
        r"(?:tt\.load|tt\.store|async_copy_global_to_local|buffer_load|buffer_store)[ _].*?"
        r" : (?:tensor<([\dx]+)x)?(?:!tt\.ptr<)?[a-z]+(\d+).* loc\((#loc\d*)\)$", ttgir, re.M
    ):  # fmt: skip
        # A scalar has no shape.
        size = math.prod(map(int, shape.split("x"))) * int(bits) // 8 if shape else 0
        sizes[resolve(name)] = max(sizes.get(resolve(name), 0), size)
    return sizes

"""Kernels compiled for GPUs that are not there, and what the assembler made of them.

    with capture("sm_90") as kernels:
        adaln(x, shift, scale)         # CPU tensors; nothing runs, results hold nothing
    kernels[0].registers, kernels[0].spills, kernels[0].matrix

A launch inside goes through the op's own launch code and Triton's own specialisation, so what is
read is what a GPU would run: shapes divisible by 16, aligned pointers, the tiles of that target.
Triton brings ptxas and cuobjdump; for gfx942 the assembly text is read.

An access is wide at 128 bits, and narrow if it is not although its tile gives every thread of the
program 128 bits or more. Scalars and a number or two per row are neither: nothing could widen them.
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
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from miro_kernels import backend


@dataclass(frozen=True)
class Machine:
    """What one multiprocessor has, by the CUDA C++ Programming Guide; sizes in bytes."""

    target: GPUTarget
    warps: int
    programs: int
    shared: int
    shared_per_program: int

    @property
    def vendor(self) -> str:
        return self.target.backend


KIB = 1024
MACHINES = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), 64, 32, 164 * KIB, 163 * KIB),
    "sm_90": Machine(GPUTarget("cuda", 90, 32), 64, 32, 228 * KIB, 227 * KIB),
    "sm_100": Machine(GPUTarget("cuda", 100, 32), 64, 32, 228 * KIB, 227 * KIB),
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), 32, 32, 64 * KIB, 64 * KIB),
}
REGISTERS = 65536  # 32-bit, of one multiprocessor, given out 256 at a time to a warp
WIDE = 16  # bytes


@dataclass(frozen=True)
class Compiled:
    """One compiled kernel."""

    kernel: str
    target: str
    warps: int
    registers: int
    spills: int  # instructions that move registers to or from local memory
    shared: int
    shared_limit: int
    occupancy: float  # warps resident on a multiprocessor over those it can hold
    wide: int
    narrow: int
    mma: int
    atomics: int
    matrix: dict[str, int]  # matrix instructions by name

    @property
    def fits(self) -> bool:
        return self.shared <= self.shared_limit


class StubDriver:
    """A driver that names a target and has no device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        # JITFunction keeps its compiled kernels by device: one for every target.
        return str(self.target.arch)

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def capture(target: str) -> Iterator[list[Compiled]]:
    """Compile every kernel launched inside for `target` instead of running it.

    Args:
        target: a key of MACHINES.

    Yields:
        The list the kernels are appended to, in the order of their launches, each once.
    """
    assert not knobs.runtime.interpret, "the interpreter excludes the compiler"
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

    driver: Any = triton.runtime.driver
    with (
        backend.allow_cpu_tensors(),
        backend.use_backend("triton"),
        mock.patch.object(driver, "_active", StubDriver(machine.target)),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield kernels


def examine(kernel: CompiledKernel, target: str) -> Compiled:
    """Read a compiled kernel."""
    machine = MACHINES[target]
    read = _read_cuda if machine.vendor == "cuda" else _read_hip
    found = read(kernel)
    metadata: Any = kernel.metadata
    registers, shared, warps = found.pop("registers"), metadata.shared, metadata.num_warps
    return Compiled(
        kernel=metadata.name,
        target=target,
        warps=warps,
        registers=registers,
        shared=shared,
        shared_limit=machine.shared_per_program,
        occupancy=occupancy(machine, registers, warps, shared),
        **found,
    )


def occupancy(machine: Machine, registers: int, warps: int, shared: int) -> float:
    """The share of a multiprocessor's warps that its registers and shared memory let it hold."""
    if shared > machine.shared_per_program:
        return 0.0
    if machine.vendor == "cuda":
        per_warp = -(-registers * 32 // 256) * 256
        # Registers lie in four banks, and a warp's all in one.
        by_registers = REGISTERS // per_warp // 4 * 4 // warps
        by_shared = machine.shared // (shared + KIB)  # a program takes 1 KiB for itself
    else:
        # Four SIMD units of 512 vector registers each, given out 8 at a time; 8 waves at most.
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
        # ATOMS and SYNCS are of shared memory, REDUX of registers.
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
    found = {name: n for name, n in instructions.items() if re.match(pattern, name)}
    return {"mma": sum(found.values()), "matrix": found}


Place = tuple[int, int]  # line and column of the source


def _ptx_accesses(text: str) -> Iterator[tuple[Place, int]]:
    """Where each access of global memory comes from, and the bytes a thread moves by it."""
    place, inside, settled = (0, 0), False, False
    for line in text.splitlines():
        if "inline asm" in line:
            inside, settled = "begin" in line, False
        elif located := re.match(r"\s*\.loc\s+\d+ (\d+) (\d+)", line):
            # Of the positions inside of inline assembly, which an access is, only the first is
            # that of the source.
            if not (inside and settled):
                place = (int(located[1]), int(located[2]))
            settled = True
        elif "cp.async.bulk.tensor" in line or "cp.reduce.async.bulk.tensor" in line:
            yield place, 128
        elif copied := re.search(r"cp\.async\.c[ag]\.shared\.global .*?\], \[.*?\], (\w+)", line):
            yield place, int(copied[1], 0)
        elif moved := re.search(r"\b(?:ld|st)\.[\w.:]*?global\S*?(?:\.v(\d))?\.[bfus](\d+) ", line):
            yield place, int(moved[1] or 1) * int(moved[2]) // 8


def _gcn_accesses(text: str) -> Iterator[tuple[Place, int]]:
    sizes = {"ubyte": 1, "byte": 1, "ushort": 2, "short": 2, "dword": 4}
    place = (0, 0)
    for line in text.splitlines():
        if located := re.match(r"\s*\.loc\s+\d+ (\d+) (\d+)", line):
            place = (int(located[1]), int(located[2]))
        elif moved := re.match(
            r"\s+(?:buffer|global)_(?:load|store)_(?:lds_)?(ubyte|byte|ushort|short|dword)"
            r"(?:_d16(?:_hi)?)?(?:x(\d))?", line
        ):  # fmt: skip
            yield place, sizes[moved[1]] * int(moved[2] or 1)


def _widths(
    kernel: CompiledKernel, accesses: Iterator[tuple[Place, int]], threads: int
) -> tuple[int, int]:
    """How many accesses are wide and how many narrow; `threads` of a warp.

    One whose tile is not found counts as narrow: it shall be looked at, and not be missed.
    """
    metadata: Any = kernel.metadata
    tiles = tile_sizes(str(kernel.asm["ttgir"]))
    wide = narrow = 0
    for place, size in accesses:
        if size >= WIDE:
            wide += 1
        elif tiles.get(place, math.inf) >= WIDE * threads * metadata.num_warps:
            narrow += 1
    return wide, narrow


def tile_sizes(ttgir: str) -> dict[Place, int]:
    """Bytes of the largest tile that the access at each place of the source moves."""
    names = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttgir, re.M))

    def place(name: str) -> Place:
        """Of a named location or a call, that of the innermost code."""
        if here := re.match(r'"[^"]*":(\d+):(\d+)', names.get(name, "")):
            return int(here[1]), int(here[2])
        inner = re.search(r"#loc\d*", names.get(name, ""))
        return place(inner[0]) if inner else (0, 0)

    sizes: dict[Place, int] = {}
    for shape, kind, name in re.findall(
        r"(?:tt\.load|tt\.store|async_copy_global_to_local|buffer_load|buffer_store)[ _].*?"
        r" : (?:tensor<([\dx]+)x)?(?:!tt\.ptr<)?[a-z]+(\d+).* loc\((#loc\d*)\)$", ttgir, re.M
    ):  # fmt: skip
        # A scalar has no shape.
        size = math.prod(map(int, shape.split("x"))) * int(kind) // 8 if shape else 0
        sizes[place(name)] = max(sizes.get(place(name), 0), size)
    return sizes

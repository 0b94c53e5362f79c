"""Compiles the Triton kernels of the contrast for GPUs that need not be here, and reads the result.

Triton's wheel brings NVIDIA's assembler and disassembler.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from contrast_d2.contrast.kernels import gather, grouped_triton
from contrast_d2.contrast.kernels.grouped import Variant
from contrast_d2.contrast.kernels.triton_tools import SIZES


class Compiled(NamedTuple):
    """A kernel for one kind of GPU.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread; above 0 where registers are spilled.
        shared: bytes of shared memory of a program.
        ptx: the virtual instructions that Triton wrote.
        sass: the instructions of the GPU; "" where there is no disassembler.
    """

    registers: int
    stack: int
    shared: int
    ptx: str
    sass: str

    @property
    def spills(self) -> int:
        """Instructions that write registers to memory or read them back."""
        return self.count(r"\b(LDL|STL)\b")

    def count(self, pattern: str) -> int:
        """Number of instructions of the GPU that match."""
        return len(re.findall(pattern, self.sass))


_POINTERS = {"table": "*i64", "labels": "*i32", "ranges": "*i32"}


def gather_variants() -> dict[str, tuple[Any, dict[str, Any]]]:
    """The kernels of `gather` as they are compiled, with their constants, by name."""
    sizes = {"R": gather._ROWS, "STEP": gather._CHANNELS}
    found = {}
    for kind, unit in itertools.product(gather._KINDS.values(), (False, True)):
        constants = {"NORMALIZE": unit, "KIND": kind, **sizes}
        found[f"read_rows-{kind}-{unit}"] = gather._read_rows, constants
        for add in (False, True):
            constants = {"ADD": add, "NORMALIZED": unit, "KIND": kind, **sizes}
            found[f"write_rows-{kind}-{unit}-{add}"] = gather._write_rows, constants
    return found


def name_of(variant: Variant) -> str:
    """A variant in one word."""
    parts = [variant.kernel, variant.width, "split" if variant.split else "single"]
    return "-".join(map(str, [*parts, *(variant.shape or ())]))


def compile_variant(variant: Variant, capability: int) -> Compiled:
    """Compiles one of `grouped.variants` for a GPU of a capability, such as 90."""
    kernel = getattr(grouped_triton, variant.kernel)
    return compile_kernel(kernel, variant.constants, capability, variant.options)


def compile_kernel(
    kernel: Any,
    constants: Mapping[str, Any],
    capability: int,
    options: Mapping[str, int] = MappingProxyType({}),
) -> Compiled:
    """Compiles a kernel as a launch does, which takes it from Triton's cache afterwards.

    Args:
        kernel: as `triton.jit` makes it.
        constants: values of its arguments that are compiled into it.
        capability: of the GPU, such as 90.
        options: what else its compilation depends on.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            attributes[(index,)] = []  # as at a launch, which then finds this in the cache
        elif name in SIZES:
            signature[name] = "i32"
        else:
            signature[name] = _POINTERS.get(name, "*fp32")
            attributes[(index,)] = [["tt.divisibility", 16]]
    result = triton.compile(
        ASTSource(kernel, signature, values, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=dict(options),
    )
    tools = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        sass = _output(tools / "nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, stack = (int(x) for x in found.groups()) if found else (-1, -1)
    return Compiled(registers, stack, result.metadata.shared, result.asm["ptx"], sass)


def _output(program: Path, *arguments: str) -> str:
    """What a program of NVIDIA's says; nothing where it is not installed."""
    if not program.exists():
        return ""
    return subprocess.run(
        [str(program), *arguments], capture_output=True, text=True, check=True
    ).stdout

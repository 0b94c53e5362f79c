"""What the Triton kernels have in common: where they can run, how they are launched."""

# pyright: reportOptionalMemberAccess=false
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    # Of PyTorch's wheels, only those for CUDA bring it.
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if tl is not None:
    INTERPRETED = tl.constexpr(INTERPRETED)  # what kernels read
# Arguments that change in every step: no compilation per divisor.
SIZES = ("programs_at", "work_at", "visits_at", "terms_at", "num_terms", "plane")


def jit(function: Callable) -> Any:
    """`triton.jit`; kernels stay plain functions, which nothing calls, where there is no Triton."""
    if triton is None:
        return function
    known = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(function, do_not_specialize=[x for x in SIZES if x in known])


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on tensors of any device."""
    return triton is not None and not isinstance(jit(_nothing), triton.JITFunction)


def is_usable(*tensors: Tensor) -> bool:
    """Whether Triton kernels can take such tensors: fp32 or 16 bits, on NVIDIA GPUs since Ampere.

    Triton has to be of version 3. With TRITON_INTERPRET=1 in the environment when it is first
    imported, its interpreter takes tensors of any device.
    """
    if triton is None or int(triton.__version__.split(".")[0]) < 3:
        return False
    if any(x.dtype not in (torch.float32, torch.float16, torch.bfloat16) for x in tensors):
        return False
    return is_interpreted() or all(
        x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
        for x in tensors
    )


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """A table of the host on a device, without waiting for it."""
    table = torch.from_numpy(values)
    if device.type == "cuda":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def launch(
    kernel: Any, grid: tuple[int, ...], table: Tensor, *arguments: Any, **constants: Any
) -> None:
    """Launches a kernel on the table's device, unless there is nothing to do."""
    if grid[0]:
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device_of(table):
            kernel[grid](table, *arguments, **constants)


def _nothing() -> None: ...

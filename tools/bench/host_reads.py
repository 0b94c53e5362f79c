"""Counts how often a computation makes the host wait for the device.

On a CUDA device CUDA itself is asked. On a CPU nothing ever waits, so the operations that would
wait on a GPU are counted as they are called: reading values (`item`, `tolist`, `bool(tensor)`, a
copy to the host), and operations whose output size depends on values. What requires a gradient, or
is computed from what does, would be on the GPU there; all else, such as labels, on the host. A copy
to the host with `non_blocking=True` is no wait, nor is reading it later.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contrast_d2.contrast import terms

# Operations whose output size is read off the device, whoever calls them.
_SIZED_BY_VALUES = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
# Reads of a whole tensor, which no dispatched operation shows on a CPU.
_COPIES_TO_HOST = {"cpu", "numpy", "tolist", "__array__"}


def count_host_reads(run: Callable[[], object], device: torch.device) -> Counter[str]:
    """How often a computation waits for the device, by what it waits in.

    Args:
        run: the computation, forward and backward.
        device: where it runs.
    """
    if device.type == "cuda":
        return _count_on_cuda(run)
    with HostReads() as reads:
        run()
    return Counter(reads.calls)


def _count_on_cuda(run: Callable[[], object]) -> Counter[str]:
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
    return Counter(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in waits)


class HostReads(TorchFunctionMode):
    """Notes on a CPU what would make the host wait for a device, forward and backward.

    What is copied to the host is read for free afterwards.

    Attributes:
        calls: names of the calls, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self._sized_by_values = _SizedByValues(self.calls)
        # The kernel that sorts by class works on a CPU alone.
        self._not_on_a_gpu = patch.object(terms, "is_exact", lambda *_: False)

    def __enter__(self) -> HostReads:
        self._not_on_a_gpu.__enter__()
        self._sized_by_values.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._sized_by_values.__exit__(*error)
        self._not_on_a_gpu.__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        reads = name in _COPIES_TO_HOST or (name == "to" and _names_the_cpu(args, kwargs))
        of_device = _has_device_tensors((args, kwargs))
        result = func(*args, **kwargs)
        if of_device and reads:
            if not kwargs.get("non_blocking"):
                self.calls.append(name)
            # On a CPU the copy is the tensor itself, which stays one of the device.
            return result.detach().clone() if isinstance(result, Tensor) else result
        if of_device:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    x._of_device = True  # pyright: ignore[reportAttributeAccessIssue]
        return result


def _has_device_tensors(arguments: Any) -> bool:
    """Whether a tensor would be on the GPU, as all are of which a backward pass reads."""
    return any(
        isinstance(x, Tensor)
        and (
            x.requires_grad
            or hasattr(x, "_of_device")
            or torch._C._current_autograd_node() is not None
        )
        for x in tree_leaves(arguments)
    )


def _names_the_cpu(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether `Tensor.to` is asked for the CPU by that name: `to(other.device)` stays put."""
    return "cpu" in [value for value in [*args[1:], *kwargs.values()] if isinstance(value, str)]


class _SizedByValues(TorchDispatchMode):
    """Notes operations that cannot return before their input is known to the host."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition(".")[0]
        waits = name in _SIZED_BY_VALUES
        if name in _INDEXING:
            waits = any(
                isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8)
                for leaf in tree_leaves(args[1])
            )
        elif name == "aten::repeat_interleave":
            waits = kwargs.get("output_size") is None
        if waits and _has_device_tensors((args, kwargs)):
            self._calls.append(name.removeprefix("aten::"))
        return func(*args, **kwargs)

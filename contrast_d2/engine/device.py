"""What a training step leaves to the device: the host asks for nothing and waits for nothing.

Whether a step is finite is decided where its numbers are, and the update is skipped there. The
host learns of it later, with the losses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


class LateNumbers:
    """Numbers on their way to the host, which waits for them only when they are read.

    Args:
        numbers: 0-dim tensors, of any device.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._indices: list[list[int]] = []
        self._copies: list[Tensor] = []
        for device in dict.fromkeys(x.device for x in numbers):
            indices = [i for i, x in enumerate(numbers) if x.device == device]
            # Stacking copies: what was handed in may change.
            stacked = torch.stack([numbers[i].detach().float() for i in indices])
            self._indices.append(indices)
            self._copies.append(stacked.to("cpu", non_blocking=True))
        gpu = next((x.device for x in numbers if x.is_cuda), None)
        self._copied = None if gpu is None else torch.cuda.current_stream(gpu).record_event()

    def read(self) -> list[float]:
        """The numbers, in their order."""
        if self._copied is not None:
            self._copied.synchronize()
        values: dict[int, float] = {}
        for indices, copy in zip(self._indices, self._copies, strict=True):
            values |= zip(indices, copy.tolist(), strict=True)
        return [values[i] for i in range(len(values))]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all tensors together, 0-dim; inf or nan where one of them is not finite."""
    norms = torch._foreach_norm(list(tensors))  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(list(norms)))


def first_not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds inf or nan; None if all are finite. The host waits, once."""
    floats = {name: x for name, x in weights.items() if x.is_floating_point() and x.numel()}
    if not floats:
        return None
    tensors = list(floats.values())
    largest = torch._foreach_norm(tensors, torch.inf)  # pyright: ignore[reportPrivateImportUsage]
    finite = torch.stack([x.float() for x in largest]).isfinite().tolist()
    return next((name for name, ok in zip(floats, finite, strict=True) if not ok), None)


def update(optimizer: Optimizer, skip: Tensor) -> None:
    """A step of the optimizer, or none at all: weights, momentum and counters stay as they are.

    Optimizers of torch with `fused=True` look at `skip` on the device. For others the host does,
    and waits.

    Args:
        optimizer: with gradients in its parameters.
        skip: 0-dim fp32 on the device of the parameters: 1 to skip, else 0.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        if not skip.item():
            optimizer.step()
        return
    _start_momentum(optimizer)
    # The attributes by which torch's loss scaler speaks to them.
    optimizer.found_inf = skip  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    del optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]


def _start_momentum(optimizer: Optimizer) -> None:
    """Gives SGD momentum of 0: what it would make in its first step is not set if that is skipped.

    The first step is the same, but for a dampening other than 0.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            if "momentum_buffer" not in optimizer.state[p]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

"""The precision that all losses compute in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def full_precision(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a loss function compute in fp32 with autocast off, and in fp64 on fp64 logits.

    Args:
        loss: a function whose first argument are the logits.
    """

    @wraps(loss)
    def wrapped(logits: Tensor, *args: Any, **options: Any) -> Any:
        device = logits.device.type
        # On the meta device, where only shapes are computed, there is no autocast to turn off.
        off = nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
        with off:
            exact = logits if logits.dtype == torch.float64 else logits.float()
            return loss(exact, *args, **options)

    return wrapped

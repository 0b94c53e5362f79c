"""Runs of neighbouring places, as vectors.

Shape letters: G runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ranges(NamedTuple):
    """Runs of neighbouring places, one per group.

    Attributes:
        first: (G,) int64, where each begins.
        size: (G,) int64, its length.
    """

    first: Tensor
    size: Tensor


def runs(sizes: Tensor) -> Ranges:
    """Runs of the given sizes, one after the other."""
    return Ranges(sizes.cumsum(dim=0) - sizes, sizes)


def at(ranges: Ranges, index: Tensor) -> Ranges:
    """The ranges at the given numbers."""
    return Ranges(ranges.first[index], ranges.size[index])


def expand(ranges: Ranges, total: int) -> tuple[Tensor, Tensor]:
    """The run that each of `total` places lies in, and the place's rank in it.

    Places beyond the last run have the number of runs for theirs, and rank on in the last one.
    """
    place = torch.arange(total, device=ranges.size.device)
    run = torch.searchsorted(ranges.first + ranges.size, place, right=True)
    return run, place - ranges.first[run.clamp(max=len(ranges.size) - 1)]

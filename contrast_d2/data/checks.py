"""Checks of arguments that several augmentations take."""

from __future__ import annotations

from collections.abc import Sequence


def checked_range(name: str, value: Sequence[float]) -> tuple[float, float]:
    """The range, or a ValueError that names the argument unless 0 < low <= high."""
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} must be a range (low, high) with 0 < low <= high, got {value}")
    return float(value[0]), float(value[1])


def checked_probability(name: str, value: float) -> float:
    """The probability, or a ValueError that names the argument unless it lies in 0..1."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability and must lie in 0..1, got {value}")
    return float(value)


def checked_size(name: str, value: Sequence[int]) -> tuple[int, int]:
    """The (height, width), or a ValueError that names the argument unless both are positive."""
    if len(value) != 2 or any(int(v) != v or v < 1 for v in value):
        raise ValueError(f"{name} must be (height, width), two positive integers, got {value}")
    return int(value[0]), int(value[1])

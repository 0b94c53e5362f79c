"""What a process and its descendants hold, seen from outside, and whether that grows.

Everything is read from Linux's /proc.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MIB = 1 << 20
_PROC = Path("/proc")


class Usage(NamedTuple):
    """What a tree of processes holds at a moment.

    Attributes:
        seconds: of a clock that starts anywhere.
        mib: resident memory; pages that the processes share are counted once. Without those of
            files: how many other programs have torch's libraries loaded must not count.
        handles: open files, pipes and sockets.
        processes: that are alive.
        threads: of all of them.
        cpu_seconds: processor time of all of them, and of those that they have waited for.
    """

    seconds: float
    mib: float
    handles: int
    processes: int
    threads: int
    cpu_seconds: float


class Growth(NamedTuple):
    """A straight line through a quantity.

    Attributes:
        slope: per unit of the axis.
        error: its standard error.
        mean: of the quantity.
    """

    slope: float
    error: float
    mean: float


def descendants(pid: int) -> list[int]:
    """A process and those that come from it, as far as they are alive."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields is not None and fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def usage(pid: int) -> Usage | None:
    """What the process and its descendants hold now; None if it has ended."""
    root = _stat(pid)
    if root is None or root[0] == "Z":
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    kib, handles, threads, cpu, alive = 0, 0, 0, 0.0, 0
    for member in descendants(pid):
        fields = _stat(member)
        try:
            rollup = (_PROC / str(member) / "smaps_rollup").read_text()
            opened = len(os.listdir(_PROC / str(member) / "fd"))
        except OSError:  # it has just ended
            continue
        parts = [rollup.partition(f"\nPss_{kind}:")[2].split() for kind in ("Anon", "Shmem")]
        if fields is None or not all(parts):
            continue
        kib += sum(int(part[0]) for part in parts)
        handles += opened
        threads += int(fields[17])
        cpu += sum(int(field) for field in fields[11:15]) / ticks
        alive += 1
    if not alive:
        return None
    return Usage(time.monotonic(), kib * 1024 / _MIB, handles, alive, threads, cpu)


def resident_mib() -> float:
    """Resident memory of this process."""
    pages = int((_PROC / "self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / _MIB


def growth(axis: Sequence[float], values: Sequence[float], blocks: int = 16) -> Growth:
    """Fits a line to a quantity.

    Neighbouring samples are alike, so that their scatter says too little about the slope's error:
    the line goes through the means of consecutive blocks.

    Args:
        axis: where the samples were taken, ascending.
        values: as many.
        blocks: at most so many, of two samples at least.

    Raises:
        ValueError: fewer than six samples, or all of them at one place.
    """
    blocks = min(blocks, len(values) // 2)
    if blocks < 3 or axis[0] == axis[-1]:
        raise ValueError(f"{len(values)} samples are too few for a slope: run longer.")
    x, y = (
        np.array([part.mean() for part in np.array_split(np.asarray(data, dtype=float), blocks)])
        for data in (axis, values)
    )
    deviation = x - x.mean()
    slope = (deviation * y).sum() / (deviation**2).sum()
    residuals = y - y.mean() - slope * deviation
    error = np.sqrt((residuals**2).sum() / (blocks - 2) / (deviation**2).sum())
    return Growth(float(slope), float(error), float(np.mean(values)))


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; None if there is no such process."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()

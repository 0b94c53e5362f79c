"""Measures how time and memory grow with each size, and draws it on log axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure

from contrast_d2.studio.visualize import GRID, LINE_COLORS

from .cases import LARGE_REGIONS
from .machine import Probes, Say, interleave, note
from .worker import peak_mib
from .workloads import OURS, TEXTBOOK, InfoNCE, Step

_MIB = 1 << 20
# What a process cannot tell from nothing.
_LEAST_MIB = 0.1


class Sweep(NamedTuple):
    """Workloads that differ in one size.

    Attributes:
        label: what grows, for the axis.
        sizes: its values, ascending.
        workloads: one for each.
        contenders: who runs them.
        gradients: count the gradients, which are outputs, as memory.
    """

    label: str
    sizes: tuple[int, ...]
    workloads: tuple[Step | InfoNCE, ...]
    contenders: tuple[str, ...]
    gradients: bool


def sweeps(largest: int) -> dict[str, Sweep]:
    """The sweeps, by name.

    Args:
        largest: most anchors; the other sizes are scaled down with it below 8,192.
    """
    anchors = tuple(largest >> shift for shift in range(5, -1, -1))
    classes = tuple(2**n for n in range(1, 9) if 2**n <= largest // 16)
    batches = tuple(b for b in (1, 2, 4, 8, 16) if b <= max(2, largest // 512))
    heights = tuple(h for h in (256, 384, 512, 768, 1024) if h <= max(384, largest // 8))
    return {
        "anchors": Sweep(
            "anchors",
            anchors,
            tuple(InfoNCE(n) for n in anchors),
            (OURS, TEXTBOOK),
            gradients=False,
        ),
        "classes": Sweep(
            f"classes, {largest // 4:,} anchors",
            classes,
            tuple(InfoNCE(largest // 4, classes=n) for n in classes),
            (OURS, TEXTBOOK),
            gradients=False,
        ),
        "batch": Sweep(
            "images of 512x1024",
            batches,
            tuple(_step(batch, 512) for batch in batches),
            (OURS,),
            gradients=True,
        ),
        "image": Sweep(
            "pixels of an image, batch 2",
            tuple(2 * h * h for h in heights),
            tuple(_step(2, h) for h in heights),
            (OURS,),
            gradients=True,
        ),
    }


def measure(
    found: Mapping[str, Sweep],
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measures sweeps.

    Args:
        found: of `sweeps`.
        device: where.
        rounds: how often each workload runs, at most.
        most_seconds: about how long a sweep is timed, unless that is less than five rounds.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and by sweep and contender the times (ms), the memory (MiB)
        and the exponents that fit them.
    """
    probes = Probes(device)
    results = {}
    for name, sweep in found.items():
        say(f"\n{name}: {sweep.label}")
        lines = {
            contender: _measure_line(sweep, contender, probes, device, rounds, most_seconds)
            for contender in sweep.contenders
        }
        for contender, line in lines.items():
            for size, time, memory in zip(sweep.sizes, line["ms"], line["mib"], strict=True):
                say(f"  {contender:12} {size:9,} {time:10.1f} ms {memory:9.1f} MiB")
            say(
                f"  {contender:12} time ~ size^{line['ms_exponent']:.2f}, "
                f"memory ~ size^{line['mib_exponent']:.2f}"
            )
        results[name] = {"label": sweep.label, "sizes": list(sweep.sizes), "lines": lines}
    return {**note(device), "sweeps": results}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of the power law that fits the larger half of the points best.

    Small sizes are left out, where fixed costs rule.
    """
    half = min(len(sizes) // 2, len(sizes) - 2)
    slope, _ = np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)
    return float(slope)


def plot(results: Mapping[str, Any]) -> Figure:
    """Time and memory against each size on log axes, the exponents in the legends.

    Args:
        results: of `measure`.
    """
    found = results["sweeps"]
    figure = Figure(
        figsize=(3.4 * len(found), 6.0), dpi=120, facecolor="white", layout="constrained"
    )
    # One scale per row: noise on a flat line must not fill its panel.
    axes = figure.subplots(2, len(found), squeeze=False, sharey="row")
    rows = (("ms", "time [ms]"), ("mib", "peak memory [MiB]"))
    for column, sweep in enumerate(found.values()):
        for row, (quantity, label) in enumerate(rows):
            ax = axes[row, column]
            for color, (contender, line) in zip(LINE_COLORS, sweep["lines"].items(), strict=False):
                power = line[f"{quantity}_exponent"]
                name = f"{contender}: exponent {power:.2f}"
                ax.loglog(sweep["sizes"], line[quantity], "o-", ms=3, color=color, label=name)
            ax.grid(color=GRID)
            ax.legend(fontsize=7)
            ax.set_xlabel(sweep["label"])
            if column == 0:
                ax.set_ylabel(label)
    machine = results["machine"]
    figure.suptitle(f"{machine['processor']}, threads: {machine['threads']}", fontsize=9)
    return figure


def _step(batch: int, height: int) -> Step:
    """A step of about as many anchors at any size: the budget binds, not the rarest region."""
    area = LARGE_REGIONS.object_area * (height / LARGE_REGIONS.height) ** 2
    scene = replace(LARGE_REGIONS, batch=batch, height=height, width=2 * height, object_area=area)
    return Step(scene, max_anchors=1024)


def _measure_line(
    sweep: Sweep,
    contender: str,
    probes: Probes,
    device: torch.device,
    rounds: int,
    most_seconds: float,
) -> dict[str, Any]:
    runs = {
        str(size): workload.contenders(device, [contender])[contender]
        for size, workload in zip(sweep.sizes, sweep.workloads, strict=True)
    }
    measured = peak_mib([(workload, [contender]) for workload in sweep.workloads], device)
    memory = [
        found[contender] + (workload.gradient_bytes() / _MIB if sweep.gradients else 0)
        for found, workload in zip(measured, sweep.workloads, strict=True)
    ]
    memory = [max(mib, _LEAST_MIB) for mib in memory]
    timings = interleave(runs, probes, device, rounds=rounds, most_seconds=most_seconds)
    times = [1000 * min(seconds) for seconds in timings.seconds.values()]
    return {
        "ms": times,
        "mib": memory,
        "ms_exponent": exponent(sweep.sizes, times),
        "mib_exponent": exponent(sweep.sizes, memory),
    }

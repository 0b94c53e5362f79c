"""Measures what it saves to project the drawn pixels alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from .machine import Probes, Say, interleave, milliseconds, note, ratios, warning
from .scenes import Scene
from .training import BASELINE, VARIANTS, TrainingStep
from .worker import peak_mib


def measure(
    scene: Scene,
    device: torch.device,
    *,
    backbone: str,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measures time and peak memory with dense and with sampled projection.

    Args:
        scene: labels, and with them the size of the images.
        device: where.
        backbone: timm's name.
        rounds: how often each variant runs, at most.
        most_seconds: about how long the part and the whole are timed, unless that is less than
            five rounds.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and by part and variant time (ms), its ratio to dense
        projection, and peak memory beyond weights, inputs and, for the part, feature maps (MiB).
    """
    probes = Probes(device)
    parts = {}
    for part, names in (("contrast", list(VARIANTS)), ("step", [BASELINE, *VARIANTS])):
        work = TrainingStep(scene, whole=part == "step", backbone=backbone)
        say(f"\n{part}: {work.backbone}, {scene.batch} x {scene.height}x{scene.width}")
        runs = work.contenders(device, names)
        timings = interleave(runs, probes, device, rounds=rounds, most_seconds=most_seconds)
        del runs
        busy = warning(timings)
        if busy:
            say(busy)
        (memory,) = peak_mib([(work, names)], device)
        parts[part] = {}
        for name, seconds in timings.seconds.items():
            row = {
                "ms": milliseconds(seconds),
                "times_dense": ratios(seconds, timings.seconds["dense"]),
                "peak_mib": memory[name],
            }
            parts[part][name] = row
            say(
                f"  {name:16} {row['ms']['median']:9.1f} ms  "
                f"{row['times_dense']['median']:6.3f} x dense  {memory[name]:8.0f} MiB"
            )
    return {**note(device), "backbone": backbone, "scene": asdict(scene), "parts": parts}

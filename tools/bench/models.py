"""Measures whole training steps of baseline and method: time and peak memory, by model.

Labels are generated, so that no dataset is needed; they draw about as many anchors as the datasets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from .cases import ROOMS, STREET
from .machine import Say, note
from .methods import MethodStep, measure_step
from .scenes import Scene

_MANY_CLASSES = 100


def step_of(
    files: Sequence[Path],
    *,
    batch: int | None = None,
    size: Sequence[int] | None = None,
    precision: str = "fp32",
    compiled: bool = False,
    channels_last: bool = False,
) -> MethodStep:
    """A training step, with its update, of experiment files on generated labels.

    Args:
        files: the baseline first.
        batch: B; None for the batch of the baseline's file.
        size: H and W; None for the crop of that file.
        precision, compiled, channels_last: as in `MethodStep`.

    Raises:
        ValueError: a file or a setting that cannot be.
    """
    from contrast_d2.engine import load_config

    if len({path.stem for path in files}) < 2:
        raise ValueError("name the baseline's experiment file, and one of a method at least.")
    configs = [load_config(str(path)) for path in files]
    baseline = configs[0]
    if baseline.model.contrast is not None:
        raise ValueError(f"{files[0]} has a contrast method: name the baseline first.")
    classes = {config.dataset.num_classes for config in configs}
    if len(classes) > 1:
        raise ValueError(f"the files have {sorted(classes)} classes: name files of one dataset.")
    if size is None:
        size = crop_of(files[0], baseline)
    if batch is None:
        batch = baseline.dataloader.train.total_batch_size
    if min(batch, *size) < 1:
        raise ValueError(f"--batch {batch}, --size {size[0]} {size[1]}: all must be at least 1.")
    return MethodStep(
        files={path.stem: str(path) for path in files},
        scene=scene_of(classes.pop(), batch, size),
        precision=precision,
        compiled=compiled,
        channels_last=channels_last,
    )


def crop_of(file: str | Path, cfg: DictConfig) -> tuple[int, int]:
    """Height and width of the images that an experiment trains on.

    Raises:
        ValueError: it trains on whole images.
    """
    augmentations = cfg.dataloader.train.mapper.augmentations
    if "crop_size" not in augmentations:
        raise ValueError(f"{file} trains on whole images: say which with --size HEIGHT WIDTH.")
    height, width = augmentations.crop_size
    return height, width


def scene_of(num_classes: int, batch: int, size: Sequence[int]) -> Scene:
    """Labels with the look of streets, or with that of rooms where there are many classes; objects
    keep their share of the image."""
    scene = ROOMS if num_classes >= _MANY_CLASSES else STREET
    share = prod(size) / (scene.height * scene.width)
    return replace(
        scene,
        batch=batch,
        height=size[0],
        width=size[1],
        num_classes=num_classes,
        classes_per_image=min(scene.classes_per_image, num_classes),
        stuff_per_image=min(scene.stuff_per_image, num_classes),
        object_area=scene.object_area * share,
    )


def measure(
    cases: Mapping[str, MethodStep],
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measures the steps of some models.

    Args:
        cases: what to measure, by name.
        device: where.
        rounds: how often each step of a case runs, at most.
        most_seconds: about how long a case is timed, unless that is less than five rounds.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and by case what `methods.measure_step` finds.
    """
    options = {"rounds": rounds, "most_seconds": most_seconds, "say": say}
    found = {}
    for name, work in cases.items():
        say(f"\n{name}: {work.scene.batch} x {work.scene.height}x{work.scene.width}")
        found[name] = measure_step(work, device, **options)
    return {**note(device), "cases": found}

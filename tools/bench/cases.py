"""The cases that are measured, and what the library promises about them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .scenes import Scene
from .workloads import OURS, SUPCON, TEXTBOOK, InfoNCE, Step

# Memory beyond inputs and outputs of an InfoNCE of 10,000 anchors.
MOST_MIB = 100.0
# Errors of value and gradient, relative to those of plain PyTorch in the same dtype.
MOST_TIMES_TEXTBOOK_ERROR = 2.0


class Case(NamedTuple):
    """A workload and who runs it.

    Attributes:
        workload: what is measured.
        contenders: the library first.
        most_times_limit: how many times its limit the library may take on a CPU; None for no
            target.
        expected: about how many anchors each scale should draw; empty for no expectation.
        default_heap: also time the library and the textbook form with the system's heap.
        once: too long to be repeated: a single call of the library is timed.
    """

    workload: Step | InfoNCE
    contenders: tuple[str, ...]
    most_times_limit: float | None = None
    expected: tuple[int, ...] = ()
    default_heap: bool = False
    once: bool = False


_STEP = (OURS, TEXTBOOK, SUPCON)
_LOSS = (OURS, TEXTBOOK, SUPCON)

STREET = Scene(
    batch=8,
    height=512,
    width=1024,
    num_classes=19,
    classes_per_image=13,
    stuff_per_image=6,
    object_area=2000.0,
    area_spread=1.6,
    seed=151,
)
_FEWSTREETS = replace(STREET, batch=2, stuff_per_image=5, area_spread=1.0, seed=161)
LARGE_REGIONS = replace(
    STREET,
    classes_per_image=9,
    stuff_per_image=5,
    object_area=20_000.0,
    area_spread=0.4,
    seed=24,
)
ROOMS = Scene(
    batch=16,
    height=512,
    width=512,
    num_classes=150,
    classes_per_image=9,
    stuff_per_image=3,
    object_area=2000.0,
    area_spread=1.2,
    seed=141,
)
_TINY = replace(_FEWSTREETS, height=128, width=256, object_area=500.0, seed=0)

# Scenes and seeds are such that about as many anchors are drawn as from the datasets themselves.
CASES = {
    # So small a step that fixed costs rule: no promise.
    "cityscapes_b2": Case(Step(_FEWSTREETS), _STEP, expected=(1008, 288, 115, 85)),
    "cityscapes_b8": Case(Step(STREET), _STEP, 1.8, (990, 704, 410, 325), default_heap=True),
    "ade20k_b16": Case(Step(ROOMS), _STEP, 1.8, (1430, 828, 615, 500)),
    "cityscapes_b8_large": Case(Step(LARGE_REGIONS), (OURS, TEXTBOOK), 1.5, (9936, 3744, 792, 325)),
    "infonce_2048": Case(InfoNCE(2048), _LOSS, 1.4),
    "infonce_4096": Case(InfoNCE(4096), _LOSS, 1.4),
    "infonce_9984": Case(InfoNCE(9984), _LOSS, 1.4),
    "infonce_9984_unsorted": Case(InfoNCE(9984, sorted=False), (OURS,)),
    "memory_1024_10000": Case(InfoNCE(1024, memory=10_000), (OURS, SUPCON)),
}
LARGE_CASES = {"infonce_100000": Case(InfoNCE(100_000), (OURS,), once=True)}
TINY_CASES = {
    "tiny": Case(Step(_TINY, width=32), _STEP),
    "tiny_infonce": Case(InfoNCE(96, classes=4, width=16), _LOSS),
    "tiny_memory": Case(InfoNCE(32, memory=64, classes=4, width=16), (OURS, SUPCON)),
}
ALL_CASES = CASES | LARGE_CASES | TINY_CASES

"""One, two and four gloo processes on the same global batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from contrast_d2.contrast import HardAnchorSampler, MultiScaleProjector, PixelContrast

from ..helpers import run_processes
from .process_counts import (
    METHODS,
    NUM_CLASSES,
    SCENES,
    SPLITS,
    TOLERANCE,
    Result,
    difference,
    in_order,
    joined,
    make_batch,
    run_all,
    run_steps,
)

CASES = [(method, scene, torch.float64) for method in METHODS for scene in SCENES]
CASES += [(method, "common", torch.float32) for method in METHODS]
BUDGETS = [
    {"max_anchors": 43, "hard_share": 0.4},
    {"max_anchors": 10**6, "max_per_group": 7, "rest": "easy"},
    {"balance": "image_class", "max_anchors": 10**6, "max_per_group": 3, "min_pixels": 8},
]


def hard_draws(split: list[int]) -> list[Counter[tuple[int, int, bool]]]:
    """How many wrong and right pixels the budgets give to each class and image, by process."""
    _, _, labels = make_batch("common", split, 0, torch.float32)
    predictions = labels.roll(1, dims=2)
    first = 0
    if dist.is_initialized():
        first = sum(split[: dist.get_rank()])
        own = slice(first, first + split[dist.get_rank()])
        labels, predictions = labels[own], predictions[own]
    results = []
    for budgets in BUDGETS:
        sampler = HardAnchorSampler(NUM_CLASSES, across_processes=True, **budgets)
        (draw,) = sampler([labels], [predictions])
        wrong = predictions.flatten(1)[draw.image, draw.pixel] != draw.labels
        # The easy rest draws from the right pixels only; of the random rest chance decides.
        marks = wrong.tolist() if budgets.get("rest") == "easy" else [False] * len(wrong)
        images = (draw.image + first).tolist()
        results.append(Counter(zip(draw.labels.tolist(), images, marks, strict=True)))
    return results


def run_rank(split: list[int]) -> tuple[dict[tuple, Result], list[Counter]]:
    return run_all(CASES, split), hard_draws(split)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request: pytest.FixtureRequest) -> list[tuple[dict[tuple, Result], list[Counter]]]:
    return run_processes(run_rank, request.param, SPLITS[request.param])


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{m} - {s} - {str(d).removeprefix('torch.')}" for m, s, d in CASES]
)
def test_loss_and_gradients_are_those_of_one_process(ranks: list[tuple], case: tuple) -> None:
    method, scene, dtype = case
    split = SPLITS[len(ranks)]
    one = run_steps(method, scene, split, dtype)
    several = [results[case] for results, _ in ranks]
    for kind, value in difference(one, joined(several)).items():
        assert value < TOLERANCE[dtype], kind
    losses = one["losses"].values()
    # PNE compares pixels of an image that has several classes.
    alone = scene == "no class in common" and method in ("PNE", "sum")
    assert all((loss > 0) == (scene != "all void") or alone for loss in losses)
    assert all(gradient.isfinite().all() for gradient in one["parameters"].values())
    for rank in several:
        for name, buffer in rank["buffers"].items():
            assert buffer.equal(several[0]["buffers"][name]), name
    if "memory" in method:
        filled = one["buffers"]["memory.filled"]
        assert filled.any() == (scene != "all void")
        # Not to rounding: the same keys.
        for name, buffer in in_order(one["buffers"]).items():
            assert buffer.equal(in_order(several[0]["buffers"])[name]), name


def test_hard_anchors_share_the_global_budget(ranks: list[tuple]) -> None:
    split = SPLITS[len(ranks)]
    for index, one in enumerate(hard_draws(split)):
        assert sum((draws[index] for _, draws in ranks), Counter()) == one
        assert 30 <= one.total() < 200  # of a thousand pixels


def test_the_sampler_must_be_set_likewise() -> None:
    projector = MultiScaleProjector({"res2": 4}, 6)
    sampler = HardAnchorSampler(NUM_CLASSES, across_processes=True)
    with pytest.raises(ValueError, match="across_processes=False here and True in the sampler"):
        PixelContrast(projector, sampler, feature="res2")

"""Two gloo processes: rows of both, budgets of both, and norms with the statistics of both."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from contrast_d2.contrast import (
    BalancedSampler,
    HardAnchorSampler,
    MultiScaleContrast,
    MultiScaleProjector,
    PixelDraw,
    PixelSet,
    sets,
)

from ..helpers import run_processes

NUM_CLASSES = 5
SPLIT = [slice(0, 1), slice(1, 4)]  # images of each process


def run_rank() -> dict[str, Any]:
    """All of this file's cases in one pair of processes, since starting them takes the longest."""
    return {
        "rows": collect_rows(),
        "draws": draw_all(SPLIT[dist.get_rank()], across_processes=True),
        "own draws": draw_own(SPLIT[dist.get_rank()], max_anchors=31),
        "losses": run_losses(),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_processes(run_rank, 2)


# ---- rows of all processes

ROWS = {"more and less": [3, 1], "one has none": [0, 2], "all have none": [0, 0]}


def own_rows(count: int, rank: int) -> tuple[Tensor, Tensor]:
    values = 10 * rank + torch.arange(4 * count, dtype=torch.float64).view(count, 4)
    return values.requires_grad_(), torch.arange(count) + 10 * rank


def collect_rows() -> dict[str, dict[str, Tensor]]:
    rank, found = dist.get_rank(), {}
    for case, counts in ROWS.items():
        rows, labels = own_rows(counts[rank], rank)
        parts, label_parts = sets.gather_parts(rows, labels)
        every = sets.gathered_set(PixelSet(rows, labels))
        stack = sets.stack_processes(rows.sum(dim=0))
        # Each process weighs the rows of all by another factor.
        weighted = sum(number * part.sum() for number, part in enumerate(parts, start=1))
        loss = (rank + 1) * (weighted + every.embeddings.sum() + stack[0].sum())
        (gradient,) = torch.autograd.grad(loss, rows)
        values = {"parts": torch.cat(parts), "labels": torch.cat(label_parts), "stack": stack}
        values.update(set=every.embeddings, set_labels=every.labels, gradient=gradient)
        found[case] = {name: value.detach() for name, value in values.items()}
    return found


def test_rows_of_processes_and_their_gradients(ranks: list[dict]) -> None:
    for case, counts in ROWS.items():
        rows, labels = zip(*(own_rows(n, rank) for rank, n in enumerate(counts)), strict=True)
        for rank, results in enumerate(ranks):
            order = (rank, 1 - rank)  # a set begins with its own rows
            # Both processes' factors, 1 and 2, times the row's weight in its parts, the set, and
            # for the first process the stack.
            gradient = torch.full_like(rows[rank], 3 * ((rank + 1) + 1 + (rank == 0)))
            expected = {
                "parts": torch.cat(rows).detach(),
                "labels": torch.cat(labels),
                "set": torch.cat([rows[i] for i in order]).detach(),
                "set_labels": torch.cat([labels[i] for i in order]),
                "stack": torch.stack([x.sum(dim=0) for x in rows]).detach(),
                "gradient": gradient,
            }
            for name, value in expected.items():
                assert torch.equal(results["rows"][case][name], value), (case, rank, name)


# ---- budgets

BALANCED = [
    {"balance": "class", "max_anchors": 30},
    {"balance": "class", "min_per_class": 7},
    {"balance": "image_class", "min_pixels": 3, "max_per_group": 9},
]
HARD = [
    {"max_anchors": 43, "hard_share": 0.4},
    {"max_per_group": 7, "fill_from": "easy"},
    {"balance": "image_class", "max_per_group": 3, "min_pixels": 8},
]


def label_map(images: slice) -> Tensor:
    labels = torch.randint(0, 4, (4, 16, 16), generator=torch.Generator().manual_seed(1))
    labels[:, :4] = 255
    labels[0, 4, 0] = 4  # one pixel of class 4
    return labels[images]


def draw_all(images: slice, across_processes: bool) -> list[Counter]:
    """How many pixels the budgets give to each class and image, and of which kind."""
    labels, counts = label_map(images), []
    predictions = labels.roll(1, dims=2)

    def count(draw: PixelDraw, kinds: Tensor) -> None:
        where = (draw.image + (images.start or 0)).tolist()
        counts.append(Counter(zip(draw.labels.tolist(), where, kinds.tolist(), strict=True)))

    for budgets in BALANCED:
        sampler = BalancedSampler(NUM_CLASSES, **budgets)
        for draw in sampler([labels, labels[:, ::2]], across_processes=across_processes):
            count(draw, torch.zeros_like(draw.labels))
    for budgets in HARD:
        sampler = HardAnchorSampler(NUM_CLASSES, **budgets)
        (draw,) = sampler([labels], [predictions], across_processes=across_processes)
        # Easy ones fill from the right pixels only; of the random others chance decides.
        count(draw, draw.wrong if sampler.fill_from == "easy" else torch.zeros_like(draw.labels))
    return counts


def test_draws_share_the_global_budget(ranks: list[dict]) -> None:
    one = draw_all(slice(None), across_processes=False)
    assert len(one) == 2 * len(BALANCED) + len(HARD)
    for index, expected in enumerate(one):
        assert sum((rank["draws"][index] for rank in ranks), Counter()) == expected
        assert 3 < expected.total() < 250  # of a thousand pixels


def draw_own(images: slice, max_anchors: int) -> dict[str, list]:
    """Pixels by class and image that samplers draw that balance the images of their process."""
    options = {
        "class": {},
        "image_class": {"balance": "image_class"},
        "least": {"max_anchors": 10},
    }
    labels, draws = label_map(images), {}
    for name, changes in options.items():
        arguments = {"max_anchors": max_anchors, "min_per_class": 99, **changes}
        (draws[name],) = BalancedSampler(NUM_CLASSES, **arguments)([labels])
    hard = HardAnchorSampler(NUM_CLASSES, max_anchors=max_anchors)
    (draws["hard"],) = hard([labels], [torch.zeros_like(labels)])
    return {
        name: torch.stack([draw.labels, draw.image.where(draw.labels >= 0, -1)], dim=1).tolist()
        for name, draw in draws.items()
    }


def test_a_budget_is_shared_by_the_processes(ranks: list[dict]) -> None:
    for images, rank in zip(SPLIT, ranks, strict=True):
        shares = rank["own draws"]
        assert shares == draw_own(images, max_anchors=16)  # half of 31, rounded up
        assert 12 <= len(shares["class"]) <= 16
        assert len(shares["least"]) >= 8  # two of each class that is there, not one


# ---- norms of drawn rows

CHANNELS = {"res2": 4, "res3": 5}
SIZES = {"res2": 8, "res3": 4}
# Images that hold ignored pixels only.
BLANK = {"none": [], "first rank": [0], "second rank": [1, 2, 3], "all": [0, 1, 2, 3]}


def run_loss(blank: str, images: slice, synchronised: bool = False) -> dict:
    torch.manual_seed(0)
    # At this least number every pixel is drawn, so that chance plays no part.
    contrast: nn.Module = MultiScaleContrast(
        MultiScaleProjector(CHANNELS, 6, num_hidden=2, projection="sampled"),
        BalancedSampler(NUM_CLASSES, max_anchors=10**6, min_per_class=10**5),
        scale_weights={"res2": 1.0, "res3": 0.7},
        cross_scale=[("res2", "res3", 1.0)],
        across_processes=synchronised,
    ).double()
    if synchronised:
        contrast = nn.SyncBatchNorm.convert_sync_batchnorm(contrast)
    features = {
        name: torch.randn(4, c, SIZES[name], SIZES[name], dtype=torch.float64)[images]
        for name, c in CHANNELS.items()
    }
    features = {name: f.clone().requires_grad_() for name, f in features.items()}
    labels = label_map(slice(None)).clone()
    labels[BLANK[blank]] = 255
    losses = contrast(features, labels[images]).losses
    sum(losses.values()).backward()
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "parameters": {n: p.grad for n, p in contrast.named_parameters()},
        "buffers": dict(contrast.named_buffers()),
        "features": {name: f.grad for name, f in features.items()},
    }


def run_losses() -> dict[str, dict]:
    own, results = SPLIT[dist.get_rank()], {}
    for blank in BLANK:
        # DistributedDataParallel refuses synchronised norms on a CPU: average here.
        results[blank] = run_loss(blank, own, True)
        for gradient in results[blank]["parameters"].values():
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
        results["separate " + blank] = run_loss(blank, own)
    return results


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_synchronised_statistics_are_those_of_the_global_batch(ranks: list[dict]) -> None:
    for blank in BLANK:
        one = run_loss(blank, slice(None))
        two = [rank["losses"][blank] for rank in ranks]
        assert all((loss > 0) == (blank != "all") for loss in one["losses"].values())
        for name, loss in one["losses"].items():
            assert_close((two[0]["losses"][name] + two[1]["losses"][name]) / 2, loss)
        for rank in two:
            assert_close(rank["parameters"], one["parameters"])
            assert_close(rank["buffers"], one["buffers"])
        for name, gradient in one["features"].items():
            # Each process holds twice its share, since DistributedDataParallel takes the mean.
            both = torch.cat([two[0]["features"][name], two[1]["features"][name]])
            assert_close(both, 2 * gradient)


def test_other_norms_stay_with_their_process(ranks: list[dict]) -> None:
    for blank in BLANK:
        for images, rank in zip(SPLIT, ranks, strict=True):
            assert_close(rank["losses"]["separate " + blank], run_loss(blank, images))

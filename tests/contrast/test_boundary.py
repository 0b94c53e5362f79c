"""Boundary-aware negatives against loops and scipy's distance transform."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from contrast_d2.contrast import boundary
from contrast_d2.contrast.boundary import (
    BoundaryNegatives,
    boundary_negatives,
    squared_distance_to_other,
)

from ..helpers import HostWaits

NUM_CLASSES = 4


def patches(num_images: int, height: int, width: int, num_values: int, size: int = 3) -> Tensor:
    """Maps whose values come in squares, some of which are broken up."""
    coarse = torch.randint(num_values, (num_images, height // size + 1, width // size + 1))
    fine = coarse.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, :height, :width]
    noise = torch.randint(num_values, fine.shape)
    return torch.where(torch.rand(fine.shape) < 0.1, noise, fine)


def random_maps(num_images: int = 3, height: int = 24, width: int = 30) -> tuple[Tensor, Tensor]:
    """Labels, some of them ignored, and predictions that are wrong in patches."""
    labels = patches(num_images, height, width, NUM_CLASSES, size=6)
    labels[patches(num_images, height, width, 6) == 0] = 255
    predictions = patches(num_images, height, width, NUM_CLASSES, size=5)
    return labels, torch.where(patches(num_images, height, width, 2) == 0, predictions, labels % 5)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- distances


@pytest.mark.parametrize("size", [(9, 9), (12, 40), (40, 12), (1, 20), (20, 1)])
@pytest.mark.parametrize("num_values", [2, 5])
def test_distances_are_those_of_scipy(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], num_values: int
) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    regions = patches(3, *size, num_values) - 1
    distances = squared_distance_to_other(regions)
    assert distances.dtype == torch.float32
    for image, found in zip(regions, distances, strict=True):
        for value in image.unique():
            region = image == value
            expected = torch.from_numpy(ndimage.distance_transform_edt(region)).square()
            torch.testing.assert_close(found[region].double(), expected[region], atol=1e-9, rtol=0)
    monkeypatch.setattr(boundary, "_CPU_ELEMENTS", 1000)
    assert squared_distance_to_other(regions).equal(distances)


def test_large_squared_distances_are_exact() -> None:
    regions = torch.zeros(1, 2, 3000, dtype=torch.uint8)
    regions[0, 1, 0] = 1
    distances = squared_distance_to_other(regions)
    assert distances[0, 0, 2999] == 1 + 2999**2
    assert distances[0, 0, 2998] == 1 + 2998**2


def test_an_image_of_one_value_is_infinitely_far_from_others() -> None:
    regions = torch.zeros(2, 5, 6, dtype=torch.long)
    regions[1, 2, 3] = 7
    distances = squared_distance_to_other(regions)
    assert distances[0].isposinf().all()
    assert distances[1, 2, 3] == 1 and distances[1, 0, 0] == 2**2 + 3**2


# ---- selection


@pytest.mark.parametrize("error_map", ["false_negatives", "false_positives"])
@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.7, 1.0])
def test_each_region_gives_its_nearest_pixels(error_map: str, fraction: float) -> None:
    labels, predictions = random_maps()
    found = boundary_negatives(
        labels, predictions, NUM_CLASSES, fraction=fraction, error_map=error_map
    )
    regions = 0
    for image in range(len(labels)):
        for n in range(NUM_CLASSES):
            truth, predicted = labels[image], predictions[image]
            wrong = (truth != predicted) & (truth < NUM_CLASSES)
            inside = wrong & ((truth if error_map == "false_negatives" else predicted) == n)
            assert inside.equal(found.region[image] == n)
            selected = found.selected[image] & inside
            assert selected.sum() == math.ceil(round(fraction * inside.sum().item(), 9))
            distances = found.squared_distance[image]
            left = inside & ~selected
            if left.any():
                assert distances[selected].max() <= distances[left].min()
            regions += bool(inside.any())
    assert regions > 8
    assert not found.selected[found.region < 0].any()


def test_the_number_is_rounded_up_in_integers() -> None:
    labels = torch.zeros(1, 10, 20, dtype=torch.long)
    predictions = torch.zeros_like(labels)
    predictions[:, :, :10] = 1
    for fraction, expected in ((0.55, 55), (0.551, 56), (0.07, 7), (1e-9, 1), (0.999, 100)):
        found = boundary_negatives(labels, predictions, 2, fraction=fraction)
        assert found.selected.sum() == expected


@pytest.mark.parametrize("whole_image", [False, True])
def test_ties_are_broken_at_random(whole_image: bool) -> None:
    # A column of one pixel's width, all at distance 1; or an image without an outside.
    labels = torch.zeros(2, 16, 1 if whole_image else 5, dtype=torch.long)
    predictions = torch.zeros_like(labels)
    predictions[:, :, labels.shape[2] // 2] = 1
    trials, times = 400, torch.zeros(2, 16)
    for seed in range(trials):
        found = boundary_negatives(labels, predictions, 2, fraction=0.25, generator=seeded(seed))
        assert found.selected.sum(dim=(1, 2)).tolist() == [4, 4]
        times += found.selected.sum(dim=2)
    # Each pixel is taken 100 times, give or take 4 standard deviations.
    assert ((times - 0.25 * trials).abs() < 4 * (trials * 0.25 * 0.75) ** 0.5).all()


def test_the_generator_fixes_the_selection() -> None:
    labels, predictions = random_maps()
    first, again, other = (
        boundary_negatives(labels, predictions, NUM_CLASSES, generator=seeded(seed)).selected
        for seed in (1, 1, 2)
    )
    assert first.equal(again)
    assert not first.equal(other)


def test_ignored_pixels_and_correct_ones_are_outside_of_a_region() -> None:
    labels = torch.zeros(1, 3, 9, dtype=torch.uint8)
    labels[:, :, 7:] = 255
    predictions = torch.ones(1, 3, 9, dtype=torch.long)
    predictions[:, :, 0] = 0
    found = boundary_negatives(labels, predictions, 2)
    assert found.region[0, 0].tolist() == [-1, 0, 0, 0, 0, 0, 0, -1, -1]
    # Not counted: the border above and below.
    assert found.squared_distance[0, 1, 1:7].tolist() == [1, 4, 9, 9, 4, 1]
    assert found.selected[0].sum() == 9
    assert not found.selected[0, :, [0, 3, 4, 7, 8]].any()


def test_regions_of_two_classes_bound_each_other() -> None:
    labels = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
    found = boundary_negatives(labels, torch.full_like(labels, 2), 3, fraction=0.3)
    assert found.squared_distance.flatten().tolist() == [9, 4, 1, 1, 4, 9]
    assert found.selected.flatten().tolist() == [False, False, True, True, False, False]


def test_nothing_wrong_selects_nothing() -> None:
    labels, _ = random_maps()
    assert not boundary_negatives(labels, labels, NUM_CLASSES).selected.any()
    labels[:] = 255
    assert not boundary_negatives(labels, labels * 0, NUM_CLASSES).selected.any()


def test_the_host_does_not_wait() -> None:
    labels, predictions = random_maps()
    with HostWaits() as waits:
        boundary_negatives(labels, predictions, NUM_CLASSES)
    assert waits.calls == []


# ---- draws


def test_draws_are_the_selected_pixels() -> None:
    maps = [random_maps(), random_maps(3, 10, 12)]
    labels, predictions = zip(*maps, strict=True)
    draws = BoundaryNegatives(NUM_CLASSES, fraction=0.4)(labels, predictions, seeded(3))
    for truth, predicted, draw in zip(labels, predictions, draws, strict=True):
        wrong = (truth != predicted) & (truth < NUM_CLASSES)
        groups = Counter(zip(truth[wrong].tolist(), wrong.nonzero()[:, 0].tolist(), strict=True))
        expected = {group: math.ceil(round(0.4 * n, 9)) for group, n in groups.items()}
        assert Counter(zip(draw.labels.tolist(), draw.image.tolist(), strict=True)) == expected
        assert wrong.flatten(1)[draw.image, draw.pixel].all()
        assert truth.flatten(1)[draw.image, draw.pixel].equal(draw.labels)
        places = draw.image * wrong[0].numel() + draw.pixel
        assert len(places.unique()) == len(places)
        order = draw.labels * len(truth) + draw.image
        assert (order.diff() >= 0).all()
        assert draw.class_counts == tuple(draw.labels.bincount(minlength=NUM_CLASSES).tolist())


def test_the_bound_keeps_a_random_part() -> None:
    labels = torch.zeros(1, 4, 10, dtype=torch.long)
    predictions = torch.zeros_like(labels)
    predictions[:, :2] = 1
    sampler = BoundaryNegatives(2, fraction=1.0, max_negatives=5)
    trials, times = 400, torch.zeros(40)
    for seed in range(trials):
        (draw,) = sampler([labels], [predictions], seeded(seed))
        assert draw.class_counts == (5, 0)
        times[draw.pixel] += 1
    assert not times[20:].any()
    assert ((times[:20] - 0.25 * trials).abs() < 4 * (trials * 0.25 * 0.75) ** 0.5).all()


def test_a_draw_may_be_empty() -> None:
    labels, _ = random_maps()
    draws = BoundaryNegatives(NUM_CLASSES)([labels, labels], [labels, labels % NUM_CLASSES + 1])
    assert draws[0].image.shape == draws[0].pixel.shape == draws[0].labels.shape == (0,)
    assert draws[0].class_counts == (0,) * NUM_CLASSES
    assert len(draws[1].labels) > 0


def test_a_draw_waits_once_for_the_device() -> None:
    labels, predictions = random_maps()
    with HostWaits() as waits:
        BoundaryNegatives(NUM_CLASSES)([labels, labels[:, ::2]], [predictions, predictions[:, ::2]])
    assert waits.calls == ["tolist"]


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, "fraction=0.0: must be above 0 and at most 1"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"fraction": math.nan}, "fraction=nan"),
        ({"max_negatives": 0}, "max_negatives=0: needs at least 1"),
        ({"num_classes": 0}, "num_classes=0: needs at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundaryNegatives(**{"num_classes": NUM_CLASSES, **arguments})


def test_wrong_arguments_of_the_function_are_named() -> None:
    labels, predictions = random_maps()
    with pytest.raises(ValueError, match="fraction=2"):
        boundary_negatives(labels, predictions, NUM_CLASSES, fraction=2)
    with pytest.raises(ValueError, match="error_map='missed': choose one of"):
        boundary_negatives(labels, predictions, NUM_CLASSES, error_map="missed")

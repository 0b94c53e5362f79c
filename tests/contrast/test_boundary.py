"""Boundary-aware negatives against loops and scipy's distance transform."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import (
    Batch,
    BoundaryNegatives,
    boundary,
    boundary_negatives,
    squared_distance_to_other,
)

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
    wrong = patches(num_images, height, width, 2) == 0
    return labels, torch.where(wrong, predictions, labels % 255 % NUM_CLASSES)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_uniform(times: Tensor, trials: int, share: float) -> None:
    """Each pixel is taken in its share of the trials, give or take 4 standard deviations."""
    assert ((times - share * trials).abs() < 4 * (trials * share * (1 - share)) ** 0.5).all()


# ---- distances


def test_distances_are_those_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    for size in ((9, 9), (12, 40), (40, 12), (1, 20), (20, 1)):
        for num_values in (2, 5):
            regions = patches(3, *size, num_values) - 1
            distances = squared_distance_to_other(regions)
            for image, found in zip(regions, distances, strict=True):
                for value in image.unique():
                    region = image == value
                    expected = torch.from_numpy(ndimage.distance_transform_edt(region)).square()
                    torch.testing.assert_close(
                        found[region].double(), expected[region], atol=1e-9, rtol=0
                    )
            with monkeypatch.context() as patch:
                patch.setattr(boundary, "_CPU_ELEMENTS", 1000)
                assert squared_distance_to_other(regions).equal(distances)


def test_large_squared_distances_are_exact_and_one_value_is_infinitely_far() -> None:
    regions = torch.zeros(2, 2, 3000, dtype=torch.uint8)
    regions[0, 1, 0] = 1
    distances = squared_distance_to_other(regions)
    assert distances.dtype == torch.float32
    assert distances[0, 0, 2998:].tolist() == [1 + 2998**2, 1 + 2999**2]
    assert distances[1].isposinf().all()


# ---- selection


def test_each_region_gives_its_nearest_pixels() -> None:
    labels, predictions = random_maps()
    wrong = (labels != predictions) & (labels < NUM_CLASSES)
    for error_map, classes in (("false_negatives", labels), ("false_positives", predictions)):
        for fraction in (0.05, 0.5, 0.7, 1.0):
            found = boundary_negatives(
                labels, predictions, NUM_CLASSES, fraction=fraction, error_map=error_map
            )
            regions = 0
            for image, n in ((b, n) for b in range(len(labels)) for n in range(NUM_CLASSES)):
                inside = wrong[image] & (classes[image] == n)
                assert inside.equal(found.region[image] == n)
                selected = found.selected[image] & inside
                assert selected.sum() == math.ceil(round(fraction * inside.sum().item(), 9))
                distances, left = found.squared_distance[image], inside & ~selected
                if left.any():
                    assert distances[selected].max() <= distances[left].min()
                regions += bool(inside.any())
            assert regions > 8
            assert not found.selected[found.region < 0].any()
    assert not boundary_negatives(labels, labels % NUM_CLASSES, NUM_CLASSES).selected.any()


def test_the_number_is_rounded_up_in_integers() -> None:
    labels = torch.zeros(1, 10, 20, dtype=torch.long)
    predictions = torch.zeros_like(labels)
    predictions[:, :, :10] = 1
    for fraction, expected in ((0.55, 55), (0.551, 56), (0.07, 7), (1e-9, 1), (0.999, 100)):
        found = boundary_negatives(labels, predictions, 2, fraction=fraction)
        assert found.selected.sum() == expected


def test_ties_are_broken_at_random() -> None:
    # A column of one pixel's width, all at distance 1; or an image without an outside.
    for width in (5, 1):
        labels = torch.zeros(2, 16, width, dtype=torch.long)
        predictions = torch.zeros_like(labels)
        predictions[:, :, width // 2] = 1
        times = torch.zeros(2, 16)
        for seed in range(200):
            found = boundary_negatives(
                labels, predictions, 2, fraction=0.25, generator=seeded(seed)
            ).selected
            assert found.sum(dim=(1, 2)).tolist() == [4, 4]
            times += found.sum(dim=2)
        assert_uniform(times, 200, 0.25)
        # The last seed once more.
        again = boundary_negatives(
            labels, predictions, 2, fraction=0.25, generator=seeded(199)
        ).selected
        assert again.equal(found)


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
        index = draw.image * wrong[0].numel() + draw.pixel
        assert len(index.unique()) == len(index)
        assert ((draw.labels * len(truth) + draw.image).diff() >= 0).all()
        assert draw.class_counts == tuple(draw.labels.bincount(minlength=NUM_CLASSES).tolist())


def test_a_step_draws_at_the_sizes_of_its_maps() -> None:
    labels, predictions = random_maps()
    scores = F.one_hot(predictions, NUM_CLASSES).movedim(-1, 1).float()
    maps = {"res2": torch.zeros(3, 1, 24, 30), "res3": torch.zeros(3, 1, 12, 15)}
    sampler = BoundaryNegatives(NUM_CLASSES)
    found = sampler.draw(Batch(maps, labels, scores, seeded(2)), ["res3", "res2"])
    small = F.avg_pool2d(scores, 2).argmax(1)  # what a bilinear resize to the half is
    expected = sampler([labels[:, ::2, ::2], labels], [small, predictions], seeded(2))
    assert len(found[0].labels) > 10
    torch.testing.assert_close(found, expected)


def test_the_bound_keeps_a_random_part() -> None:
    labels = torch.zeros(1, 4, 10, dtype=torch.long)
    predictions = torch.zeros_like(labels)
    predictions[:, :2] = 1
    sampler = BoundaryNegatives(2, fraction=1.0, max_negatives=5)
    times = torch.zeros(40)
    for seed in range(200):
        (draw,) = sampler([labels], [predictions], seeded(seed))
        assert draw.class_counts == (5, 0)
        times[draw.pixel] += 1
    assert not times[20:].any()
    assert_uniform(times[:20], 200, 0.25)


def test_a_draw_may_be_empty() -> None:
    labels, predictions = random_maps()
    right = labels % 255 % NUM_CLASSES
    empty, full = BoundaryNegatives(NUM_CLASSES)([labels, labels], [right, predictions])
    assert empty.image.shape == empty.pixel.shape == empty.labels.shape == (0,)
    assert empty.class_counts == (0,) * NUM_CLASSES
    assert len(full.labels) > 0


def test_wrong_arguments_are_named() -> None:
    for arguments, named in (
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 1.5}, "fraction=1.5"),
        ({"fraction": math.nan}, "fraction=nan"),
        ({"max_negatives": 0}, "max_negatives=0"),
        ({"num_classes": 0}, "num_classes=0"),
    ):
        with pytest.raises(ValueError, match=named):
            BoundaryNegatives(**{"num_classes": NUM_CLASSES, **arguments})
    for arguments, named in (
        ({"fraction": 2}, "fraction=2"),
        ({"error_map": "x"}, "error_map='x'"),
    ):
        with pytest.raises(ValueError, match=named):
            boundary_negatives(*random_maps(), NUM_CLASSES, **arguments)

"""Whether draws are as random as they are defined to be: chi-square tests over many draws.

Shape letters: T draws, B images, P pixels of a map, C subsets of a group of pixels. The draws of a
test are the scales of one call, which have budgets and random numbers of their own.

Seeds are fixed, so the outcome is too; a correct sampler fails with one seed in 10,000.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from contrast_d2.contrast import BalancedSampler, PixelDraw

from .test_sampling import BALANCES, count_draw, counted_map

SIGNIFICANCE = 1e-4


def draw_often(label_map: Tensor, trials: int, num_classes: int, **budgets) -> list[PixelDraw]:
    generator = torch.Generator().manual_seed(0)
    return BalancedSampler(num_classes, **budgets)([label_map] * trials, generator)


def subsets(draws: Sequence[PixelDraw], label_map: Tensor, label: int, image: int) -> np.ndarray:
    """(T,) numbers 0..C-1 of the subsets of a group that were drawn, all C of which occur."""
    images, pixels, labels = (
        torch.stack(column).numpy() for column in list(zip(*draws, strict=True))[:3]
    )
    slots = ((labels == label) & (images == image)).all(axis=0)
    drawn = np.sort(pixels[:, slots], axis=1)
    codes, numbers = np.unique(drawn, axis=0, return_inverse=True)
    size = int((label_map[image] == label).sum())
    assert len(codes) == math.comb(size, int(slots.sum()))
    return numbers.ravel()


def independence(first: np.ndarray, second: np.ndarray) -> float:
    """The p-value of two sequences of numbers being independent."""
    table = np.zeros((first.max() + 1, second.max() + 1))
    np.add.at(table, (first, second), 1)
    return stats.chi2_contingency(table).pvalue


# Both units of balance draw 2 pixels from each group: of 2, 2, 6 and 7 pixels.
SMALL = [[2, 6], [2, 7]]


@pytest.mark.parametrize("balance", BALANCES)
def test_subsets_of_a_group_are_equally_likely_and_independent(balance: str) -> None:
    label_map = counted_map(*SMALL)
    draws = draw_often(label_map, 6000, 2, balance=balance)
    first, second = (subsets(draws, label_map, 1, image) for image in (0, 1))
    for numbers in (first, second):
        assert stats.chisquare(np.bincount(numbers)).pvalue > SIGNIFICANCE
    # One group and another.
    assert independence(first, second) > SIGNIFICANCE
    # One draw and the next.
    assert independence(first[:-1], first[1:]) > SIGNIFICANCE


# Pixels of classes 0 to 2 in three images, and what the definition takes of them with a
# `min_per_class` of 50. By class: all 12 of class 0; 50 of class 1 from two images; 50 of class 2
# from three, of which the two with most pixels give one more.
LONG_TAILED = [[3, 40, 900], [0, 200, 60], [9, 0, 3000]]
PAIRS = [(0, 0), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
QUOTAS = {
    "class": dict(zip(PAIRS, (3, 9, 25, 25, 17, 16, 17), strict=True)),
    "image_class": dict(zip(PAIRS, (3, 9, 40, 50, 50, 50, 50), strict=True)),
}


@pytest.mark.parametrize("balance", BALANCES)
def test_every_pixel_is_drawn_as_often_as_the_quota_of_its_group_says(balance: str) -> None:
    label_map, trials = counted_map(*LONG_TAILED), 300
    draws = draw_often(label_map, trials, 3, balance=balance, min_per_class=50)
    times_BP = np.zeros(label_map.flatten(1).shape)
    for draw in draws:
        assert count_draw(draw) == QUOTAS[balance]
        times_BP[draw.image, draw.pixel] += 1  # no pixel is twice in a draw
    assert (times_BP[label_map.flatten(1) > 2] == 0).all()
    for (label, image), quota in QUOTAS[balance].items():
        times = times_BP[image][label_map[image].flatten() == label]
        size, p = len(times), quota / len(times)
        if quota == size:
            assert (times == trials).all()
            continue
        # Without replacement the times covary by -p (1 - p) / (size - 1).
        variance = trials * p * (1 - p) * size / (size - 1)
        statistic = ((times - trials * p) ** 2).sum() / variance
        # From either side: times that vary too little are as suspect.
        tails = stats.chi2.cdf(statistic, size - 1), stats.chi2.sf(statistic, size - 1)
        assert min(tails) > SIGNIFICANCE, (label, image)


def test_a_small_share_of_a_large_group_is_spread_evenly() -> None:
    size, quota, num_images = 50_000, 250, 40
    sampler = BalancedSampler(1, balance="image_class", max_anchors=quota * num_images)
    (draw,) = sampler(
        [torch.zeros(num_images, 1, size, dtype=torch.uint8)], torch.Generator().manual_seed(0)
    )
    assert draw.image.bincount().tolist() == [quota] * num_images
    places = (draw.pixel * 50 // size).numpy()
    assert stats.chisquare(np.bincount(places, minlength=50)).pvalue > SIGNIFICANCE
    # Nor does the image play a part.
    table = np.zeros((num_images, 10))
    np.add.at(table, (draw.image.numpy(), places // 5), 1)
    assert stats.chi2_contingency(table).pvalue > SIGNIFICANCE
    # Neighbours are drawn as often as chance has it: the gaps between drawn pixels are geometric.
    gaps = np.diff(np.sort(draw.pixel.view(num_images, quota).numpy(), axis=1), axis=1).ravel()
    edges = np.unique(stats.geom.ppf(np.linspace(0, 1, 21)[1:-1], quota / size))
    observed = np.bincount(np.searchsorted(edges, gaps), minlength=len(edges) + 1)
    below = stats.geom.cdf(np.concatenate([edges, [np.inf]]), quota / size)
    expected = np.diff(below, prepend=0) * len(gaps)
    assert stats.chisquare(observed, expected).pvalue > SIGNIFICANCE

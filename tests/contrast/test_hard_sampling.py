"""Anchors that are wrongly predicted, and the others. Shape letters: B images, K classes."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter

import pytest
import torch
from scipy import stats
from torch import Tensor

from contrast_d2.contrast import HardAnchorSampler, PixelDraw

from . import references
from .test_sampling import check_draw, count_draw, random_map

BALANCES = ["class", "image_class"]
FILLS = ["random", "easy"]
FORMS = list(itertools.product(BALANCES, FILLS))


def counted_maps(*images: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Labels and predictions (B, 1, w) in which image b has images[b][c] = (wrong, right) pixels
    of class c, shuffled; the rest is ignored, and predicted as such."""
    width = max(sum(wrong + right for wrong, right in counts) for counts in images)
    maps = []
    for counts in images:
        pixels = [(c, p) for c, (w, r) in enumerate(counts) for p in [c + 1] * w + [c] * r]
        pixels += [(255, 255)] * (width - len(pixels))
        maps.append(random.sample(pixels, width))
    labels, predictions = torch.tensor(maps)[:, None].unbind(dim=3)
    return labels, predictions


def sample(labels: Tensor, predictions: Tensor, num_classes: int, **budgets) -> PixelDraw:
    (draw,) = HardAnchorSampler(num_classes, **budgets)([labels], [predictions])
    check_draw(draw, labels, num_classes)
    assert draw.wrong.equal((labels != predictions).flatten(1)[draw.image, draw.pixel])
    return draw


def count_kinds(draw: PixelDraw) -> Counter:
    """Drawn pixels of each (class, image, whether it is wrongly predicted)."""
    columns = (draw.labels, draw.image, draw.wrong)
    return Counter(zip(*(column.tolist() for column in columns), strict=True))


# ---- how many of which kind


def test_hard_and_easy_ones_of_a_group() -> None:
    for num, share, wrong, right, expected in (
        # They fill in for each other.
        (10, 0.5, 3, 50, (3, 7)),
        (10, 0.5, 50, 2, (8, 2)),
        (10, 0.5, 50, 50, (5, 5)),
        (10, 0.5, 5, 5, (5, 5)),
        (10, 0.5, 0, 50, (0, 10)),
        (10, 0.5, 50, 0, (10, 0)),
        (10, 0.5, 2, 3, (2, 3)),
        # Half of one anchor, rounded down, would leave easy anchors alone.
        (1, 0.5, 50, 50, (1, 0)),
        (3, 0.5, 50, 50, (2, 1)),
        (7, 0.5, 50, 50, (4, 3)),
        (10, 0.0, 50, 50, (0, 10)),
        (10, 0.1, 50, 50, (1, 9)),
        (10, 0.75, 50, 50, (8, 2)),
        (10, 1.0, 50, 50, (10, 0)),
    ):
        for balance in BALANCES:
            budgets = {"max_per_group": num, "hard_share": share, "fill_from": "easy"}
            draw = sample(*counted_maps([(wrong, right)]), 1, balance=balance, **budgets)
            kinds = count_kinds(draw)
            assert (kinds[0, 0, True], kinds[0, 0, False]) == expected, (num, share, wrong, right)


def reference_quotas(
    wrong: Counter, right: Counter, *, balance, max_anchors, max_per_group, min_pixels, fill_from
) -> dict:
    """{unit: (hard anchors, others)} with halves for hard ones, in plain words."""
    units: dict = {}
    for kind, counts in enumerate((wrong, right)):
        for (label, image), number in counts.items():
            unit = label if balance == "class" else (label, image)
            units.setdefault(unit, [0, 0])[kind] += number
    units = {unit: pair for unit, pair in units.items() if sum(pair) >= min_pixels}
    quotas = {}
    for unit, (num_wrong, num_right) in units.items():
        num = min(max_per_group, max(2, max_anchors // len(units)), num_wrong + num_right)
        hard = min(math.ceil(num / 2), num_wrong)
        if fill_from == "easy" and num - hard > num_right:
            hard = num - num_right
        quotas[unit] = (hard, num - hard)
    return quotas


@pytest.mark.parametrize(("balance", "fill_from"), FORMS)
def test_random_maps_against_the_rules(balance: str, fill_from: str) -> None:
    rng = random.Random(3)
    for _ in range(40):
        num_classes, num_images = rng.randint(1, 7), rng.randint(1, 4)
        budgets = {
            "balance": balance,
            "max_anchors": rng.choice([14, 60, 10_000]),
            "max_per_group": rng.choice([1, 9, 50]),
            "min_pixels": rng.choice([1, 20, 101]),
            "fill_from": fill_from,
        }
        labels = random_map(num_images, rng.randint(1, 16), rng.randint(1, 16), num_classes)
        guess = torch.randint(num_classes, labels.shape)
        predictions = torch.where(torch.rand(labels.shape) < rng.random(), guess, labels)
        kinds = count_kinds(sample(labels, predictions, num_classes, **budgets))
        wrong, right = (
            references.count_groups(torch.where(kind, labels, 255), num_classes)
            for kind in (labels != predictions, labels == predictions)
        )
        expected = reference_quotas(wrong, right, **budgets)
        drawn: dict = {}
        for (label, image, hard), number in kinds.items():
            unit = label if balance == "class" else (label, image)
            drawn.setdefault(unit, [0, 0])[not hard] += number
        assert drawn.keys() == expected.keys()
        for unit, (hard, others) in expected.items():
            assert sum(drawn[unit]) == hard + others
            # At random, some of the others are wrong too.
            assert drawn[unit][0] == hard if fill_from == "easy" else drawn[unit][0] >= hard
            if balance == "class" and fill_from == "easy":
                for is_hard, counts, number in ((True, wrong, hard), (False, right, others)):
                    shares = [kinds[unit, image, is_hard] for image in range(num_images)]
                    sizes = [counts[unit, image] for image in range(num_images)]
                    assert sorted(shares) == sorted(references.deal(sizes, number))


def test_images_share_each_kind_of_a_class() -> None:
    # Five hard and five easy ones: image 1 has but one wrong pixel, image 2 no right one.
    maps = counted_maps([(10, 20)], [(1, 20)], [(10, 0)])
    kinds = count_kinds(sample(*maps, 1, max_per_group=10, fill_from="easy"))
    assert kinds[0, 1, True] == 1
    assert kinds[0, 0, True] == kinds[0, 2, True] == 2
    assert sorted([kinds[0, 0, False], kinds[0, 1, False]]) == [2, 3]
    # In the paper's form five more at random: of 28, 20 and 8 pixels that are left.
    drawn = count_draw(sample(*maps, 1, max_per_group=10))
    assert (drawn[0, 1], sorted([drawn[0, 0], drawn[0, 2]])) in [(2, [4, 4]), (3, [3, 4])]


def test_small_budgets_and_small_classes() -> None:
    # A positive pair is left to each group where the budget sinks to one anchor, and then to none.
    maps = counted_maps(*[[(3, 3)] * 4] * 10)
    draw = sample(*maps, 4, balance="image_class", max_anchors=12)
    assert count_draw(draw) == {(label, image): 2 for label in range(4) for image in range(10)}
    assert sample(*maps, 4, balance="class", max_anchors=12).class_counts == (3, 3, 3, 3)
    # Small classes give what they have.
    maps = counted_maps([(2, 1), (40, 60)])
    assert sample(*maps, 2, max_per_group=30).class_counts == (3, 30)
    assert sample(*maps, 2, max_per_group=30, min_pixels=4).class_counts == (0, 30)
    for fill_from, fill in itertools.product(FILLS, (255, 3)):
        labels = torch.full((2, 4, 4), fill)
        draw = sample(labels, torch.zeros_like(labels), 5, fill_from=fill_from)
        assert draw.class_counts == ((0,) * 5 if fill == 255 else (0, 0, 0, 32, 0))


# ---- which pixels


@pytest.mark.parametrize(("balance", "fill_from"), FORMS)
def test_the_hard_quota_comes_first(balance: str, fill_from: str) -> None:
    labels, predictions = counted_maps([(30, 30), (20, 90)], [(40, 10), (5, 60)])
    budgets = {"balance": balance, "max_per_group": 20, "fill_from": fill_from}
    for dtype in (torch.int64, torch.uint8):
        draw = sample(labels.to(dtype), predictions, 2, **budgets)
        for (label, image), number in count_draw(draw).items():
            own = draw.wrong[(draw.labels == label) & (draw.image == image)]
            # Ten of twenty, and five where two images share them or have no more.
            assert number >= 5 and own[:5].all()
            if fill_from == "easy":
                assert own.tolist() == sorted(own.tolist(), reverse=True)


@pytest.mark.parametrize(
    # Of wrong and right pixels, as many anchors; so many ordered outcomes, all equally likely.
    ("wrong", "right", "num", "outcomes"),
    [(2, 3, 2, 2 * 4), (3, 3, 4, 3 * 2 * 4 * 3), (1, 4, 4, 1 * 4 * 3 * 2), (0, 4, 2, 4 * 3)],
)
def test_the_rest_is_drawn_from_all_that_remains(wrong, right, num, outcomes) -> None:
    labels, predictions = counted_maps([(wrong, right), (4, 4)], [(5, 2), (1, 1)])
    trials = 50 * outcomes
    sampler = HardAnchorSampler(2, balance="image_class", max_per_group=num)
    draws = sampler([labels] * trials, [predictions] * trials, torch.Generator().manual_seed(0))
    counts = Counter(tuple(draw.pixel[:num].tolist()) for draw in draws)
    assert len(counts) == outcomes
    assert all((draw.labels[:num] == 0).all() and (draw.image[:num] == 0).all() for draw in draws)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_scales_are_drawn_for_themselves() -> None:
    for balance, fill_from in FORMS:
        labels = [random_map(2, size, size, 5) for size in (16, 4, 8)]
        predictions = [torch.randint(5, one.shape) for one in labels]
        budgets = {"balance": balance, "fill_from": fill_from, "max_per_group": 9}
        sampler = HardAnchorSampler(5, **budgets)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
        draws = sampler(labels, predictions, generators[0])
        again, other = (sampler(labels, predictions, g)[0].pixel for g in generators[1:])
        assert draws[0].pixel.equal(again) and not draws[0].pixel.equal(other)
        for draw, one, prediction in zip(draws, labels, predictions, strict=True):
            check_draw(draw, one, 5)
            assert draw.class_counts == sample(one, prediction, 5, **budgets).class_counts


def test_wrong_arguments_are_named() -> None:
    for arguments, message in (
        ({"num_classes": 0}, "num_classes=0"),
        ({"balance": "pixel"}, "balance='pixel'.*'class'.*'image_class'"),
        ({"fill_from": "hard"}, "fill_from='hard'.*'random'.*'easy'"),
        ({"max_anchors": 5}, "max_anchors=5.* 6 "),
        ({"max_per_group": 0}, "max_per_group=0"),
        ({"min_pixels": 0}, "min_pixels=0"),
        ({"hard_share": 1.5}, "hard_share=1.5"),
        ({"hard_share": math.nan}, "hard_share=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            HardAnchorSampler(**{"num_classes": 3, **arguments})
    maps = [torch.zeros(1, size, size, dtype=torch.long) for size in (4, 2)]
    with pytest.raises(ValueError, match=r"\(1, 2, 2\).*\(1, 4, 4\)"):
        HardAnchorSampler(3)(maps[:1], maps[1:])

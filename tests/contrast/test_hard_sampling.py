"""Anchors that are wrongly predicted, and the others. Shape letters: B images, K classes."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from scipy import stats
from torch import Tensor

from contrast_d2.contrast import HardAnchorSampler, PixelDraw

from ..helpers import HostWaits
from . import references
from .test_sampling import check_draw, count_draw, random_map

BALANCES = ["class", "image_class"]
RESTS = ["random", "easy"]
RELEASE = {
    "balance": "image_class",
    "max_anchors": 1024,
    "max_per_group": 100,
    "min_pixels": 101,
    "rest": "easy",
}


def counted_maps(*images: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Labels and predictions (B, 1, w) in which image b has images[b][c] = (wrong, right) pixels
    of class c, shuffled; the rest is ignored, and predicted as such."""
    width = max(sum(wrong + right for wrong, right in counts) for counts in images)
    labels, predictions = [], []
    for counts in images:
        pixels = [(c, p) for c, (w, r) in enumerate(counts) for p in [c + 1] * w + [c] * r]
        pixels += [(255, 255)] * (width - len(pixels))
        random.shuffle(pixels)
        labels.append([[label for label, _ in pixels]])
        predictions.append([[prediction for _, prediction in pixels]])
    return torch.tensor(labels), torch.tensor(predictions)


def sample(labels: Tensor, predictions: Tensor, num_classes: int, **budgets) -> PixelDraw:
    (draw,) = HardAnchorSampler(num_classes, **budgets)([labels], [predictions])
    check_draw(draw, labels, num_classes)
    return draw


def is_wrong(draw: PixelDraw, labels: Tensor, predictions: Tensor) -> list[bool]:
    return (labels != predictions).flatten(1)[draw.image, draw.pixel].tolist()


def count_kinds(draw: PixelDraw, labels: Tensor, predictions: Tensor) -> Counter:
    """Drawn pixels of each (class, image, whether it is wrongly predicted)."""
    wrong = is_wrong(draw, labels, predictions)
    return Counter(zip(draw.labels.tolist(), draw.image.tolist(), wrong, strict=True))


def hard_and_easy(num: int, wrong: int, right: int, **budgets) -> tuple[int, int]:
    """How many of `num` anchors of the release are wrong, and how many right."""
    maps = counted_maps([(wrong, right)])
    draw = sample(*maps, 1, rest="easy", balance="image_class", max_per_group=num, **budgets)
    kinds = count_kinds(draw, *maps)
    return kinds[0, 0, True], kinds[0, 0, False]


# ---- how many of which kind


@pytest.mark.parametrize(
    ("num", "wrong", "right", "expected"),
    [
        (10, 3, 50, (3, 7)),
        (10, 50, 2, (8, 2)),
        (10, 50, 50, (5, 5)),
        (10, 5, 5, (5, 5)),
        (10, 0, 50, (0, 10)),
        (10, 50, 0, (10, 0)),
        (10, 2, 3, (2, 3)),
    ],
)
def test_hard_and_easy_ones_fill_in_for_each_other(num, wrong, right, expected) -> None:
    assert hard_and_easy(num, wrong, right) == expected


@pytest.mark.parametrize(("num", "expected"), [(1, (1, 0)), (3, (2, 1)), (7, (4, 3))])
def test_the_odd_anchor_is_a_hard_one(num: int, expected: tuple[int, int]) -> None:
    """Half of one anchor, rounded down, would leave easy anchors alone."""
    assert hard_and_easy(num, 50, 50) == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, (0, 10)), (0.1, (1, 9)), (0.75, (8, 2)), (1.0, (10, 0))]
)
def test_hard_share(share: float, expected: tuple[int, int]) -> None:
    assert hard_and_easy(10, 50, 50, hard_share=share) == expected


def reference_quotas(
    wrong: Counter, right: Counter, *, balance, max_anchors, max_per_group, min_pixels, rest
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
        if rest == "easy" and num - hard > num_right:
            hard = num - num_right
        quotas[unit] = (hard, num - hard)
    return quotas


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("balance", BALANCES)
def test_random_maps_against_the_rules(balance: str, rest: str) -> None:
    rng = random.Random(3)
    for _ in range(40):
        num_classes, num_images = rng.randint(1, 7), rng.randint(1, 4)
        budgets = {
            "balance": balance,
            "max_anchors": rng.choice([14, 60, 10_000]),
            "max_per_group": rng.choice([1, 9, 50]),
            "min_pixels": rng.choice([1, 20]),
            "rest": rest,
        }
        labels = random_map(num_images, rng.randint(1, 16), rng.randint(1, 16), num_classes)
        guess = torch.randint(num_classes, labels.shape)
        predictions = torch.where(torch.rand(labels.shape) < rng.random(), guess, labels)
        draw = sample(labels, predictions, num_classes, **budgets)
        wrong, right = (
            references.count_groups(torch.where(kind, labels, 255), num_classes)
            for kind in (labels != predictions, labels == predictions)
        )
        expected = reference_quotas(wrong, right, **budgets)
        kinds = count_kinds(draw, labels, predictions)
        drawn: dict = {}
        for (label, image, hard), number in kinds.items():
            unit = label if balance == "class" else (label, image)
            drawn.setdefault(unit, [0, 0])[not hard] += number
        assert drawn.keys() == expected.keys()
        for unit, (hard, others) in expected.items():
            assert sum(drawn[unit]) == hard + others
            # At random, some of the others are wrong too.
            assert drawn[unit][0] == hard if rest == "easy" else drawn[unit][0] >= hard
            if balance == "class" and rest == "easy":
                for is_hard, counts, number in ((True, wrong, hard), (False, right, others)):
                    shares = [kinds[unit, image, is_hard] for image in range(num_images)]
                    sizes = [counts[unit, image] for image in range(num_images)]
                    assert sorted(shares) == sorted(references.deal(sizes, number))


def test_images_share_each_kind_of_a_class() -> None:
    # Five hard and five easy ones: image 1 has but one wrong pixel, image 2 no right one.
    maps = counted_maps([(10, 20)], [(1, 20)], [(10, 0)])
    kinds = count_kinds(sample(*maps, 1, max_per_group=10, rest="easy"), *maps)
    assert kinds[0, 1, True] == 1
    assert kinds[0, 0, True] == kinds[0, 2, True] == 2
    assert sorted([kinds[0, 0, False], kinds[0, 1, False]]) == [2, 3]
    # In the paper's form five more at random: of 28, 20 and 8 pixels that are left.
    drawn = count_draw(sample(*maps, 1, max_per_group=10))
    assert (drawn[0, 1], sorted([drawn[0, 0], drawn[0, 2]])) in [(2, [4, 4]), (3, [3, 4])]


def test_the_paper_draws_fifty_per_class() -> None:
    maps = counted_maps([(200, 200), (0, 30)], [(0, 300), (10, 500)])
    draw = sample(*maps, 2)
    assert draw.class_counts == (50, 50)
    kinds = count_kinds(draw, *maps)
    # Image 0 alone has wrong pixels of class 0; all 25 of the hard half, and some at random.
    assert kinds[0, 0, True] >= 25 and kinds[0, 1, False] >= 12
    assert kinds[1, 1, True] == 10


def test_the_release_draws_from_more_than_a_hundred_pixels() -> None:
    maps = counted_maps([(50, 50), (50, 51)], [(0, 5), (300, 300)])
    draw = sample(*maps, 2, **RELEASE)
    assert count_draw(draw) == {(1, 0): 100, (1, 1): 100}
    kinds = count_kinds(draw, *maps)
    assert kinds[1, 0, True] == kinds[1, 1, True] == 50


def test_the_release_shares_its_anchors_among_the_pairs() -> None:
    maps = counted_maps(*[[(60, 60)] * 4] * 3)
    draw = sample(*maps, 4, **RELEASE)
    assert set(count_draw(draw).values()) == {1024 // 12}


def test_many_groups_leave_a_positive_pair_to_each() -> None:
    """The budget of the release sinks to one anchor, and then to none."""
    maps = counted_maps(*[[(3, 3)] * 4] * 10)
    draw = sample(*maps, 4, balance="image_class", max_anchors=12)
    assert count_draw(draw) == {(label, image): 2 for label in range(4) for image in range(10)}
    assert sample(*maps, 4, balance="class", max_anchors=12).class_counts == (3, 3, 3, 3)


def test_small_classes_give_what_they_have() -> None:
    maps = counted_maps([(2, 1), (40, 60)])
    assert sample(*maps, 2, max_per_group=30).class_counts == (3, 30)
    assert sample(*maps, 2, max_per_group=30, min_pixels=4).class_counts == (0, 30)


# ---- which pixels


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("balance", BALANCES)
def test_the_hard_quota_comes_first(balance: str, rest: str) -> None:
    maps = counted_maps([(30, 30), (20, 90)], [(40, 10), (5, 60)])
    draw = sample(*maps, 2, balance=balance, max_per_group=20, rest=rest)
    wrong = torch.tensor(is_wrong(draw, *maps))
    for (label, image), number in count_draw(draw).items():
        own = wrong[(draw.labels == label) & (draw.image == image)]
        # Ten of twenty, and five where two images share them or have no more.
        assert number >= 5 and own[:5].all()
        if rest == "easy":
            assert own.tolist() == sorted(own.tolist(), reverse=True)


@pytest.mark.parametrize(
    # Of wrong and right pixels, as many anchors; so many ordered outcomes, all equally likely.
    ("wrong", "right", "num", "outcomes"),
    [(2, 3, 2, 2 * 4), (3, 3, 4, 3 * 2 * 4 * 3), (1, 4, 4, 1 * 4 * 3 * 2), (0, 4, 2, 4 * 3)],
)
def test_the_rest_is_drawn_from_all_that_remains(wrong, right, num, outcomes) -> None:
    labels, predictions = counted_maps([(wrong, right), (4, 4)], [(5, 2), (1, 1)])
    trials = 100 * outcomes
    sampler = HardAnchorSampler(2, balance="image_class", max_per_group=num)
    draws = sampler([labels] * trials, [predictions] * trials, torch.Generator().manual_seed(0))
    counts = Counter(tuple(draw.pixel[:num].tolist()) for draw in draws)
    assert len(counts) == outcomes
    assert all((draw.labels[:num] == 0).all() and (draw.image[:num] == 0).all() for draw in draws)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_the_generator_fixes_the_draw() -> None:
    maps = counted_maps([(30, 30), (20, 90)])
    sampler = HardAnchorSampler(2, max_per_group=20)
    first, again, other = (
        sampler(maps[:1], maps[1:], torch.Generator().manual_seed(seed))[0].pixel
        for seed in (1, 1, 2)
    )
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("balance", BALANCES)
def test_scales_are_drawn_for_themselves(balance: str, rest: str) -> None:
    labels = [random_map(2, size, size, 5) for size in (16, 4, 8)]
    predictions = [torch.randint(5, one.shape) for one in labels]
    sampler = HardAnchorSampler(5, balance=balance, rest=rest, max_per_group=9)
    for draw, one, prediction in zip(
        sampler(labels, predictions), labels, predictions, strict=True
    ):
        check_draw(draw, one, 5)
        alone = sample(one, prediction, 5, balance=balance, rest=rest, max_per_group=9)
        assert draw.class_counts == alone.class_counts


@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("fill", [255, 3])
def test_nothing_or_one_class_to_draw(fill: int, rest: str) -> None:
    labels = torch.full((2, 4, 4), fill)
    draw = sample(labels, torch.zeros_like(labels), 5, rest=rest)
    assert draw.class_counts == ((0,) * 5 if fill == 255 else (0, 0, 0, 32, 0))


def test_labels_of_bytes() -> None:
    labels, predictions = counted_maps([(30, 30), (20, 90)])
    draw = sample(labels.byte(), predictions, 2, rest="easy", max_per_group=20)
    assert count_kinds(draw, labels, predictions)[1, 0, True] == 10


def test_the_host_waits_once() -> None:
    maps = counted_maps([(30, 30), (20, 90)])
    with HostWaits() as waits:
        HardAnchorSampler(2)(maps[:1] * 3, maps[1:] * 3)
    assert waits.calls == ["cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes=0: needs at least 1"),
        ({"balance": "pixel"}, "balance='pixel': choose 'class' or 'image_class'"),
        ({"rest": "hard"}, "rest='hard': choose 'random' or 'easy'"),
        ({"max_anchors": 5}, "max_anchors=5 cannot give two.*set it to 6 or more"),
        ({"max_per_group": 0}, "max_per_group=0: needs at least 1"),
        ({"min_pixels": 0}, "min_pixels=0"),
        ({"hard_share": 1.5}, "hard_share=1.5: a share is in 0..1"),
        ({"hard_share": math.nan}, "hard_share=nan"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HardAnchorSampler(**{"num_classes": 3, **arguments})


def test_predictions_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) with a label map \(1, 4, 4\): resize both"):
        HardAnchorSampler(3)(
            [torch.zeros(1, 4, 4, dtype=torch.long)], [torch.zeros(1, 2, 2, dtype=torch.long)]
        )

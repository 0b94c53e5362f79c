"""Which pixels become anchors. Shape letters: B images, K classes, H W labels, h w feature map."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import (
    BalancedSampler,
    Batch,
    PixelDraw,
    downsample_labels,
    ms_cs_release,
)
from contrast_d2.contrast.sampling import (
    draw_pixels,
    draw_without_replacement,
    majority_labels,
    share_equally,
    sort_pixels,
)
from contrast_d2.contrast.sets import draws_on_device

from ..helpers import HostWaits
from . import references

BALANCES = ["class", "image_class"]
IGNORED = [255, -1, 7, 1000]  # with K <= 7


def random_map(num_images: int, height: int, width: int, num_classes: int) -> Tensor:
    """Labels of which some classes are rare or absent and some pixels are ignored."""
    weights = torch.rand(num_classes + len(IGNORED)) ** 4
    values = torch.tensor([*range(num_classes), *IGNORED])
    drawn = torch.multinomial(weights, num_images * height * width, replacement=True)
    return values[drawn].view(num_images, height, width)


def counted_map(*images: list[int]) -> Tensor:
    """(B, 1, w) labels in which image b has images[b][c] pixels of class c, shuffled; rest 255."""
    width = max(sum(counts) for counts in images)
    rows = []
    for counts in images:
        row = torch.tensor([c for c, n in enumerate(counts) for _ in range(n)], dtype=torch.long)
        rows.append(F.pad(row, (0, width - len(row)), value=255)[torch.randperm(width)])
    return torch.stack(rows)[:, None]


def count_draw(draw: PixelDraw) -> Counter:
    """Drawn pixels of each (class, image)."""
    return Counter(zip(draw.labels.tolist(), draw.image.tolist(), strict=True))


def pixels_of(draw: PixelDraw) -> list[tuple[int, int]]:
    return list(zip(draw.image.tolist(), draw.pixel.tolist(), strict=True))


def check_draw(draw: PixelDraw, label_map: Tensor, num_classes: int) -> None:
    """What holds for every draw."""
    assert torch.equal(label_map.flatten(1)[draw.image, draw.pixel].long(), draw.labels)
    assert ((draw.labels >= 0) & (draw.labels < num_classes)).all()
    assert len(set(pixels_of(draw))) == len(draw.pixel)
    groups = list(zip(draw.labels.tolist(), draw.image.tolist(), strict=True))
    assert groups == sorted(groups)
    assert list(draw.class_counts) == draw.labels.bincount(minlength=num_classes).tolist()


def sample(label_map: Tensor, num_classes: int, **budgets) -> PixelDraw:
    (draw,) = BalancedSampler(num_classes, **budgets)([label_map])
    check_draw(draw, label_map, num_classes)
    return draw


# ---- labels and scores at the size of a feature map


def test_downsampling_is_exact_for_every_size() -> None:
    for height in range(1, 41):
        for h in range(1, height + 1):
            labels = torch.arange(height * 3).view(1, height, 3)
            rows = downsample_labels(labels, (h, 3))[0, :, 0] // 3
            assert rows.tolist() == [i * height // h for i in range(h)], (height, h)
            columns = downsample_labels(labels.transpose(1, 2), (3, h))[0, 0] // 3
            assert torch.equal(columns, rows), (height, h)


def test_a_majority_is_what_counting_by_hand_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    num_classes = 3
    for height, width, h, w in ((8, 8, 2, 4), (7, 10, 3, 4), (5, 5, 5, 5), (9, 4, 1, 1)):
        labels = torch.tensor([0, 1, 2, 255, -1])[
            torch.randint(5, (2, height, width), generator=generator)
        ]
        found = majority_labels(labels, (h, w), num_classes)
        seen = 0
        for image, i, j in itertools.product(range(2), range(h), range(w)):
            rows = slice(i * height // h, (i + 1) * height // h)
            columns = slice(j * width // w, (j + 1) * width // w)
            covered = labels[image, rows, columns].flatten().tolist()
            seen += len(covered)
            votes = [covered.count(c) for c in range(num_classes)]
            votes.append(len(covered) - sum(votes))
            assert found[image, i, j] == votes.index(max(votes))
        assert seen == labels.numel()  # each votes once
    with pytest.raises(ValueError, match="8x8.*9x2"):
        majority_labels(torch.zeros(1, 8, 8, dtype=torch.long), (9, 2), 3)


def test_a_sampler_votes_and_others_of_the_step_do_not() -> None:
    labels = torch.tensor([[[1, 0], [0, 2]]])
    batch = Batch({"x": torch.zeros(1, 3, 1, 1)}, labels)
    for _ in range(2):
        (voted,) = BalancedSampler(3, label_sampling="majority").draw(batch, ["x"])
        (nearest,) = BalancedSampler(3).draw(batch, ["x"])
        assert (voted.labels.tolist(), nearest.labels.tolist()) == ([0], [1])
        assert batch.label_map("x").item() == 1
    with pytest.raises(ValueError, match="label_sampling='mean'.*majority"):
        ms_cs_release({"x": 3}, 3, label_sampling="mean")  # pyright: ignore[reportArgumentType]


def test_predictions_are_made_of_resized_scores() -> None:
    # Two pixels of 0.9 : 0.1 and 0.2 : 0.8 mix to 0.55 : 0.45, where the second class has lost.
    logits = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]])
    labels = torch.zeros(1, 1, 6, dtype=torch.long)
    maps = {str(width): torch.zeros(1, 3, 1, width) for width in (1, 2, 6)}
    expected = {"2": [0, 1], "1": [0], "6": [0, 0, 0, 1, 1, 1]}
    for scores in (logits, logits.bfloat16()):
        batch = Batch(maps, labels, scores)
        assert {name: batch.predictions(name).flatten().tolist() for name in maps} == expected
    with pytest.raises(ValueError, match="logits=None"):
        Batch(maps, labels).predictions("2")


# ---- equal shares


def test_equal_shares_are_those_of_dealing_one_by_one() -> None:
    rng = random.Random(0)
    for _ in range(300):
        sizes = [[rng.choice([0, 1, 2, 3, 10, 30]) for _ in range(5)] for _ in range(3)]
        wanted = [rng.randint(0, sum(row)) for row in sizes]
        shares = share_equally(torch.tensor(sizes), torch.tensor(wanted)).tolist()
        for row, number, share in zip(sizes, wanted, shares, strict=True):
            assert sorted(share) == sorted(references.deal(row, number)), (row, number)
            assert all(0 <= n <= size for n, size in zip(share, row, strict=True))


# ---- budgets

BOTH = [{"balance": balance} for balance in BALANCES]
RELEASE = {"balance": "image_class", "min_pixels": 5}
# Pixels of each class in each image, options, and pixels drawn of each (class, image).
BUDGETS = [
    # As many as the rarest pair has, without those below the bound.
    ([[5, 400]], RELEASE, {(0, 0): 5, (1, 0): 5}),
    ([[4, 400], [0, 30]], RELEASE, {(1, 0): 30, (1, 1): 30}),
    ([[6, 50], [3, 10]], BOTH[1], {(0, 0): 3, (0, 1): 3, (1, 0): 3, (1, 1): 3}),
    # Nine of each class, of which images take equal shares; of five and four, the larger has five.
    ([[6, 50], [3, 10]], BOTH[0], {(0, 0): 6, (0, 1): 3, (1, 0): 5, (1, 1): 4}),
    # What an image lacks others give.
    (
        [[30, 0], [0, 2], [0, 40], [0, 60]],
        BOTH[0],
        {(0, 0): 30, (1, 1): 2, (1, 2): 14, (1, 3): 14},
    ),
]
for both in BOTH:
    BUDGETS += [
        ([[50, 60, 70]], {**both, "max_anchors": 100}, {(c, 0): 33 for c in range(3)}),
        ([[50, 60, 70]], {**both, "max_per_group": 20}, {(c, 0): 20 for c in range(3)}),
        # A tiny object does not rule; which lifts no budget, and limits nothing by itself.
        ([[3, 60, 70]], {**both, "min_per_class": 40}, {(0, 0): 3, (1, 0): 40, (2, 0): 40}),
        (
            [[3, 60, 70]],
            {**both, "min_per_class": 40, "max_anchors": 90},
            {(0, 0): 3, (1, 0): 30, (2, 0): 30},
        ),
        ([[50, 60, 70]], {**both, "min_per_class": 40}, {(c, 0): 50 for c in range(3)}),
    ]


def test_budgets_of_simple_maps() -> None:
    for images, budgets, expected in BUDGETS:
        for absent in (0, 4):  # classes that are absent take no part of a budget
            draw = sample(counted_map(*images), len(images[0]) + absent, **budgets)
            assert count_draw(draw) == expected, (images, budgets)


@pytest.mark.parametrize("balance", BALANCES)
def test_random_maps_against_the_rules(balance: str) -> None:
    rng = random.Random(1)
    total = 0
    for seed in range(40):
        num_classes, num_images = rng.randint(1, 7), rng.randint(1, 4)
        budgets = {
            "max_anchors": rng.choice([14, 60, 10_000]),
            "min_pixels": rng.choice([1, 5, 20]),
            "max_per_group": rng.choice([None, 6]),
            "min_per_class": rng.choice([0, 8]),
        }
        maps = [random_map(num_images, size, size + 3, num_classes) for size in (1, 9, 4, 16)]
        draws = BalancedSampler(num_classes, balance=balance, **budgets)(
            maps, torch.Generator().manual_seed(seed)
        )
        for draw, label_map in zip(draws, maps, strict=True):
            check_draw(draw, label_map, num_classes)
            counts, drawn = references.count_groups(label_map, num_classes), count_draw(draw)
            if balance == "image_class":
                assert drawn == Counter(references.release_quotas(counts, **budgets))
            else:
                shares = {
                    label: sorted(drawn[group] for group in counts if group[0] == label)
                    for label in draw.labels.unique().tolist()
                }
                assert shares == references.paper_quotas(counts, **budgets)
            assert len(draw.labels) <= min(budgets["max_anchors"], label_map.numel())
            total += len(draw.labels)
    assert total > 1000


def test_maps_without_classes_give_empty_draws() -> None:
    nothing, something = torch.full((2, 3, 4), 255), counted_map([6, 9], [0, 0])
    for both in BOTH:
        draws = BalancedSampler(3, **both)([nothing, something, nothing])
        assert [len(draw.labels) for draw in draws] == [0, 12, 0]
        assert [draw.class_counts for draw in draws] == [(0, 0, 0), (6, 6, 0), (0, 0, 0)]
        assert all(draw.pixel.dtype == draw.image.dtype == torch.long for draw in draws)


def test_draws_do_not_depend_on_the_type_of_the_labels() -> None:
    label_map, sampler = counted_map([6, 90, 30], [20, 5, 60]), BalancedSampler(3)
    draws = [
        sampler([label_map.to(dtype)], torch.Generator().manual_seed(0))[0]
        for dtype in (torch.int64, torch.uint8, torch.int16, torch.int32)
    ]
    for draw in draws[1:]:
        assert pixels_of(draw) == pixels_of(draws[0])
        assert torch.equal(draw.labels, draws[0].labels)
    # Each is 1 in its low 8, 16 or 32 bits, and only the first is class 1.
    values = [1, 257, 2**16 + 1, 1 - 2**16, 2**32 + 1, 1 - 2**32]
    label_map = torch.tensor(values + [0] * 10).view(1, 1, -1)
    assert count_draw(sample(label_map, 2, min_per_class=10)) == {(0, 0): 10, (1, 0): 1}


def test_more_classes_than_one_or_two_bytes_can_number() -> None:
    for num_classes in (254, 255, 256, 40_000):
        label_map = torch.arange(-1, num_classes + 2).repeat(2)[None, None]
        draw = sample(label_map, num_classes, max_anchors=80_000)
        assert draw.class_counts == (2,) * num_classes
    maps = [torch.stack([torch.randperm(9000) for _ in range(2)])[:, None] for _ in range(2)]
    for draw, label_map in zip(BalancedSampler(9000, max_anchors=20_000)(maps), maps, strict=True):
        check_draw(draw, label_map, 9000)
        assert draw.class_counts == (2,) * 9000


# ---- randomness


def test_scales_are_drawn_for_themselves() -> None:
    coarse, fine = counted_map([2, 3], [1, 4]), counted_map([80, 90], [20, 300])
    sampler = BalancedSampler(2, balance="image_class")
    for maps in ([coarse, fine], [fine, coarse], [fine, fine]):
        draws = sampler(maps)
        for draw, label_map in zip(draws, maps, strict=True):
            assert count_draw(draw) == count_draw(sampler([label_map])[0])
        assert pixels_of(draws[0]) != pixels_of(draws[1])


def test_a_generator_fixes_the_draw() -> None:
    label_map, sampler = counted_map([30, 200], [40, 100]), BalancedSampler(2, max_anchors=40)
    state = torch.get_rng_state()
    first, again, other = (
        pixels_of(sampler([label_map], torch.Generator().manual_seed(seed))[0])
        for seed in (3, 3, 4)
    )
    assert first == again and first != other
    assert torch.equal(state, torch.get_rng_state())
    sampler([label_map])
    assert not torch.equal(state, torch.get_rng_state())


def swap_one_by_one(sizes: list[int], quotas: list[int], numbers: list[int]) -> list[int]:
    """The shuffle as it is written in the textbook."""
    drawn, first, numbers = [], 0, iter(numbers)
    for size, quota in zip(sizes, quotas, strict=True):
        places = list(range(first, first + size))
        for i in range(quota):
            j = i + next(numbers) % (size - i)
            places[i], places[j] = places[j], places[i]
        drawn += places[:quota]
        first += size
    return drawn


def test_shuffle_is_that_of_swapping_one_by_one() -> None:
    rng = random.Random(0)
    # In chains every index passes its content on to the next, so the last one brings up the first.
    cases = [([1000], [quota], [1] * (quota - 1) + [0]) for quota in (512, 513, 1000)]
    for _ in range(300):
        sizes = [rng.choice([0, 1, 2, 3, 8, 20, 100]) for _ in range(rng.randint(1, 6))]
        quotas = [rng.choice([0, n, n // 2, rng.randint(0, n)]) for n in sizes]
        cases.append((sizes, quotas, [rng.randrange(2**62) for _ in range(sum(quotas))]))
    for sizes, quotas, numbers in cases:
        size_G, quota_G = torch.tensor(sizes), torch.tensor(quotas)
        drawn = draw_without_replacement(
            (size_G.cumsum(dim=0) - size_G).repeat_interleave(quota_G),
            size_G.repeat_interleave(quota_G),
            torch.tensor([i for quota in quotas for i in range(quota)], dtype=torch.long),
            torch.tensor(numbers, dtype=torch.long),
        )
        assert drawn.tolist() == swap_one_by_one(sizes, quotas, numbers), (sizes, quotas)


# ---- waits


def test_a_draw_reads_nothing_from_the_device() -> None:
    maps = [counted_map([9, 50, 30], [20, 0, 60]) for _ in range(4)]
    for both in BOTH:
        with HostWaits() as reads:
            BalancedSampler(3, **both)(maps)
        assert reads.calls == []
    # On the meta device tensors have no values: what asks for one raises.
    is_right = torch.zeros(2, 32, 32, dtype=torch.bool, device="meta")
    pixels = sort_pixels(torch.zeros(2, 32, 32, dtype=torch.long, device="meta"), 3, is_right)
    quotas = torch.zeros(1, 3, 4, dtype=torch.long, device="meta")
    (draw,) = draw_pixels([pixels], quotas, [(5, 6, 7)], None, from_remainder=True)
    assert draw.image.shape == draw.pixel.shape == draw.labels.shape == (18,)


@pytest.mark.gpu
@pytest.mark.parametrize("balance", BALANCES)
def test_draws_for_a_gpu_are_those_of_the_host(balance: str) -> None:
    labels = random_map(4, 64, 64, 7)
    sampler = BalancedSampler(7, balance=balance, max_anchors=500, min_per_class=8)
    draws = []
    for device in ("cpu", "cuda"):
        maps = {name: torch.zeros(4, 1, n, n, device=device) for name, n in (("a", 64), ("b", 16))}
        batch = Batch(maps, labels, generator=torch.Generator().manual_seed(0))
        draws.append(draws_on_device(sampler.draw(batch, list(maps)), torch.device("cpu")))
    for first, second in zip(*draws, strict=True):
        assert pixels_of(first) == pixels_of(second)


def test_wrong_arguments_are_named() -> None:
    for arguments, message in (
        ({"balance": "pixel"}, "balance='pixel'.*'class'.*'image_class'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"max_anchors": 21}, "max_anchors=21.* 22 "),
        ({"min_pixels": 0}, "min_pixels=0"),
        ({"max_per_group": 1}, "max_per_group=1"),
        ({"min_per_class": -1}, "min_per_class=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            BalancedSampler(**{"num_classes": 11, **arguments})

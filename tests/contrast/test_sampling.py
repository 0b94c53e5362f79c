"""Which pixels become anchors. Shape letters: B images, K classes, H W labels, h w feature map."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from contrast_d2.contrast import (
    BalancedSampler,
    PixelDraw,
    downsample_labels,
    predicted_labels,
)
from contrast_d2.contrast.sampling import draw_without_replacement, share_equally

from ..helpers import HostWaits, gpu_waits
from . import references

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
        row = torch.cat([row, torch.full((width - len(row),), 255)])
        rows.append(row[torch.randperm(width)])
    return torch.stack(rows)[:, None]


def count_draw(draw: PixelDraw) -> Counter:
    """Drawn pixels of each (class, image)."""
    return Counter(zip(draw.labels.tolist(), draw.image.tolist(), strict=True))


def check_draw(draw: PixelDraw, label_map: Tensor, num_classes: int) -> None:
    """What holds for every draw."""
    assert torch.equal(label_map.flatten(1)[draw.image, draw.pixel].long(), draw.labels)
    assert ((draw.labels >= 0) & (draw.labels < num_classes)).all()
    pixels = list(zip(draw.image.tolist(), draw.pixel.tolist(), strict=True))
    assert len(set(pixels)) == len(pixels)
    groups = list(zip(draw.labels.tolist(), draw.image.tolist(), strict=True))
    assert groups == sorted(groups)
    assert list(draw.class_counts) == draw.labels.bincount(minlength=num_classes).tolist()


def sample(label_map: Tensor, num_classes: int, **budgets) -> PixelDraw:
    (draw,) = BalancedSampler(num_classes, **budgets)([label_map])
    check_draw(draw, label_map, num_classes)
    return draw


# ---- labels at the size of a feature map


def test_downsampling_is_exact_for_every_size() -> None:
    for height in range(1, 41):
        for h in range(1, height + 1):
            labels = torch.arange(height * 3).view(1, height, 3)
            rows = downsample_labels(labels, (h, 3))[0, :, 0] // 3
            assert rows.tolist() == [i * height // h for i in range(h)], (height, h)
            columns = downsample_labels(labels.transpose(1, 2), (3, h))[0, 0] // 3
            assert torch.equal(columns, rows), (height, h)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("height", [360, 480, 473, 512, 540, 769])
def test_downsampling_equals_nearest_interpolation(height: int, dtype: torch.dtype) -> None:
    # interpolate computes in fp32 and is off by one pixel for a few pairs of sizes (26 -> 22 is
    # the smallest), none of which is here.
    labels = torch.randint(0, 256, (2, height, height // 3)).to(dtype)
    for stride in (4, 8, 16, 32):
        size = (-(-height // stride), -(-(height // 3) // stride))
        expected = F.interpolate(labels[:, None].double(), size=size, mode="nearest")[:, 0]
        actual = downsample_labels(labels, size)
        assert actual.dtype == dtype
        assert torch.equal(actual.double(), expected), size


# ---- equal shares


def test_equal_shares_are_those_of_dealing_one_by_one() -> None:
    rng = random.Random(0)
    for _ in range(1000):
        sizes = [rng.choice([0, 1, 2, 3, 10, 30]) for _ in range(rng.randint(1, 7))]
        wanted = rng.randint(0, sum(sizes))
        shares = share_equally(torch.tensor(sizes), torch.tensor(wanted))
        shares = shares.tolist()
        assert sum(shares) == wanted
        assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
        assert sorted(shares) == sorted(references.deal(sizes, wanted)), (sizes, wanted)


def test_equal_shares_of_several_rows_are_those_of_each() -> None:
    sizes = torch.randint(0, 20, (2, 5, 4))
    wanted = (torch.rand(2, 5) * (sizes.sum(dim=-1) + 1)).long()
    shares = share_equally(sizes, wanted)
    for index in np.ndindex(2, 5):
        assert torch.equal(shares[index], share_equally(sizes[index], wanted[index]))


# ---- budgets


def test_release_draws_as_many_as_the_rarest_pair_has() -> None:
    draw = sample(counted_map([5, 400]), 2, balance="image_class", min_pixels=5)
    assert count_draw(draw) == {(0, 0): 5, (1, 0): 5}


def test_pairs_below_min_pixels_neither_give_nor_limit() -> None:
    draw = sample(counted_map([4, 400], [0, 30]), 2, balance="image_class", min_pixels=5)
    assert count_draw(draw) == {(1, 0): 30, (1, 1): 30}


def test_release_counts_pairs_and_paper_counts_classes() -> None:
    label_map = counted_map([6, 50], [3, 10])
    release = sample(label_map, 2, balance="image_class")
    assert count_draw(release) == {(0, 0): 3, (0, 1): 3, (1, 0): 3, (1, 1): 3}
    paper = sample(label_map, 2, balance="class")
    # K = 9, of which images take equal shares; of five and four, the larger has five.
    assert count_draw(paper) == {(0, 0): 6, (0, 1): 3, (1, 0): 5, (1, 1): 4}


def test_what_an_image_lacks_others_give() -> None:
    draw = sample(counted_map([30, 0], [0, 2], [0, 40], [0, 60]), 2, balance="class")
    assert count_draw(draw) == {(0, 0): 30, (1, 1): 2, (1, 2): 14, (1, 3): 14}


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_max_anchors_is_shared_by_the_groups(balance: str) -> None:
    label_map = counted_map([50, 60, 70])
    assert set(count_draw(sample(label_map, 3, balance=balance, max_anchors=100)).values()) == {33}
    # Classes that are absent take no part of it.
    draw = sample(label_map, 10, balance=balance, max_anchors=100)
    assert set(count_draw(draw).values()) == {33}


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_max_per_group(balance: str) -> None:
    draw = sample(counted_map([50, 60, 70]), 3, balance=balance, max_per_group=20)
    assert set(count_draw(draw).values()) == {20}


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_floor_keeps_a_tiny_object_from_ruling(balance: str) -> None:
    draw = sample(counted_map([3, 60, 70]), 3, balance=balance, floor=40)
    assert count_draw(draw) == {(0, 0): 3, (1, 0): 40, (2, 0): 40}
    # It lifts no budget.
    draw = sample(counted_map([3, 60, 70]), 3, balance=balance, floor=40, max_anchors=90)
    assert count_draw(draw) == {(0, 0): 3, (1, 0): 30, (2, 0): 30}
    # And limits nothing by itself.
    draw = sample(counted_map([50, 60, 70]), 3, balance=balance, floor=40)
    assert set(count_draw(draw).values()) == {50}


def _assert_quotas(draw: PixelDraw, label_map: Tensor, num_classes: int, **budgets) -> None:
    counts = references.count_groups(label_map, num_classes)
    drawn = count_draw(draw)
    balance = budgets.pop("balance")
    if balance == "image_class":
        expected = references.release_quotas(counts, **budgets)
        assert drawn == Counter(expected)
        return
    shares = {
        label: sorted(drawn[label, image] for (other, image) in counts if other == label)
        for label in {label for label, _ in drawn}
    }
    assert shares == references.paper_quotas(counts, **budgets)


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_random_maps_against_the_rules(balance: str) -> None:
    rng = random.Random(1)
    for _ in range(60):
        num_classes, num_images = rng.randint(1, 7), rng.randint(1, 4)
        budgets = {
            "balance": balance,
            "max_anchors": rng.choice([14, 60, 10_000]),
            "min_pixels": rng.choice([1, 5, 20]),
            "max_per_group": rng.choice([None, 6]),
            "floor": rng.choice([0, 8]),
        }
        maps = [random_map(num_images, size, size + 3, num_classes) for size in (1, 4, 9, 16)]
        draws = BalancedSampler(num_classes, **budgets)(maps)
        for draw, label_map in zip(draws, maps, strict=True):
            check_draw(draw, label_map, num_classes)
            assert len(draw.labels) <= budgets["max_anchors"]
            _assert_quotas(draw, label_map, num_classes, **budgets)


@pytest.mark.parametrize(
    "budgets",
    [
        {"balance": "class", "min_pixels": 1, "max_per_group": None, "floor": 0},
        {"balance": "class", "min_pixels": 1, "max_per_group": None, "floor": 64},
        {"balance": "image_class", "min_pixels": 5, "max_per_group": 2500, "floor": 0},
    ],
)
def test_real_labels_against_the_rules(camvid: Path, budgets: dict) -> None:
    files = sorted((camvid / "annotations" / "train").glob("*.png"))[::120]
    labels = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])
    labels[labels == 11] = 255
    sizes = [(90, 120), (45, 60), (23, 30), (12, 15)]
    maps = [downsample_labels(labels, size) for size in sizes]
    draws = BalancedSampler(11, max_anchors=1000, **budgets)(maps)
    for draw, label_map in zip(draws, maps, strict=True):
        check_draw(draw, label_map, 11)
        assert 20 < len(draw.labels) <= 1000
        _assert_quotas(draw, label_map, 11, max_anchors=1000, **budgets)


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_maps_without_classes_give_empty_draws(balance: str) -> None:
    nothing = torch.full((2, 3, 4), 255)
    something = counted_map([6, 9], [0, 0])
    sampler = BalancedSampler(3, balance=balance)
    draws = sampler([nothing, something, nothing])
    assert [len(draw.labels) for draw in draws] == [0, 12, 0]
    assert [draw.class_counts for draw in draws] == [(0, 0, 0), (6, 6, 0), (0, 0, 0)]
    assert all(draw.pixel.dtype == draw.image.dtype == torch.long for draw in draws)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_draws_do_not_depend_on_the_type_of_the_labels(dtype: torch.dtype) -> None:
    label_map, sampler = counted_map([6, 90, 30], [20, 5, 60]), BalancedSampler(3)
    expected, actual = (
        sampler([labels], torch.Generator().manual_seed(0))[0]
        for labels in (label_map, label_map.to(dtype))
    )
    assert _pixels(actual) == _pixels(expected)
    assert torch.equal(actual.labels, expected.labels)


def test_values_that_wrap_to_a_class_are_ignored() -> None:
    # Each is 1 in its low 8, 16 or 32 bits.
    values = [1, 257, 2**16 + 1, 1 - 2**16, 2**32 + 1, 1 - 2**32]
    label_map = torch.tensor(values + [0] * 10).view(1, 1, -1)
    assert count_draw(sample(label_map, 2, floor=10)) == {(0, 0): 10, (1, 0): 1}


def test_more_groups_than_two_bytes_can_number() -> None:
    maps = [torch.stack([torch.randperm(9000) for _ in range(2)])[:, None] for _ in range(2)]
    for draw, label_map in zip(BalancedSampler(9000, max_anchors=20_000)(maps), maps, strict=True):
        check_draw(draw, label_map, 9000)
        assert draw.class_counts == (2,) * 9000


def test_scales_do_not_limit_each_other() -> None:
    coarse, fine = counted_map([2, 3], [1, 4]), counted_map([80, 90], [20, 300])
    sampler = BalancedSampler(2, balance="image_class")
    for maps in ([coarse, fine], [fine, coarse]):
        for draw, label_map in zip(sampler(maps), maps, strict=True):
            assert count_draw(draw) == count_draw(sampler([label_map])[0])


# ---- randomness


def _pixels(draw: PixelDraw) -> list[tuple[int, int]]:
    return list(zip(draw.image.tolist(), draw.pixel.tolist(), strict=True))


def test_scales_are_drawn_independently() -> None:
    label_map = counted_map([10, 200])
    first, second = BalancedSampler(2)([label_map, label_map])
    assert _pixels(first) != _pixels(second)
    assert count_draw(first) == count_draw(second)


def test_a_generator_fixes_the_draw() -> None:
    label_map, sampler = counted_map([30, 200], [40, 100]), BalancedSampler(2, max_anchors=40)

    def draw(seed: int) -> list[tuple[int, int]]:
        return _pixels(sampler([label_map], torch.Generator().manual_seed(seed))[0])

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())
    sampler([label_map])
    assert not torch.equal(state, torch.get_rng_state())


def test_every_pixel_and_every_pair_of_pixels_is_equally_likely() -> None:
    # 4 of the 12 pixels of class 1 are drawn, in each of many images.
    row, trials = counted_map([4, 12])[0], 4000
    draw = sample(row.expand(trials, -1, -1), 2, balance="image_class", max_anchors=100_000)
    chosen = torch.zeros(trials, 16)
    chosen[draw.image[draw.labels == 1], draw.pixel[draw.labels == 1]] = 1
    chosen = chosen[:, row[0] == 1]
    together = chosen.T @ chosen
    probability = torch.full((12, 12), 4 * 3 / (12 * 11)).fill_diagonal_(4 / 12)
    deviation = (trials * probability * (1 - probability)).sqrt()
    # 4.5 standard deviations: of 2000 seeds, about one has one of its 78 counts outside.
    assert ((together - trials * probability).abs() < 4.5 * deviation).all()


def _swap_one_by_one(sizes: list[int], quotas: list[int], numbers: list[int]) -> list[int]:
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


def _draw_heads(sizes: list[int], quotas: list[int], numbers: list[int]) -> list[int]:
    size_G, quota_G = torch.tensor(sizes), torch.tensor(quotas)
    first_G = size_G.cumsum(dim=0) - size_G
    rank = [i for quota in quotas for i in range(quota)]
    return draw_without_replacement(
        first_G.repeat_interleave(quota_G),
        size_G.repeat_interleave(quota_G),
        torch.tensor(rank, dtype=torch.long),
        torch.tensor(numbers, dtype=torch.long),
    ).tolist()


def test_shuffle_is_that_of_swapping_one_by_one() -> None:
    rng = random.Random(0)
    for _ in range(500):
        sizes = [rng.choice([0, 1, 2, 3, 8, 20, 100]) for _ in range(rng.randint(1, 6))]
        quotas = [rng.choice([0, n, n // 2, rng.randint(0, n)]) for n in sizes]
        numbers = [rng.randrange(2**62) for _ in range(sum(quotas))]
        expected = _swap_one_by_one(sizes, quotas, numbers)
        assert _draw_heads(sizes, quotas, numbers) == expected, (sizes, quotas)


@pytest.mark.parametrize("quota", [512, 513, 1000])
def test_shuffle_follows_the_longest_chain_of_swaps(quota: int) -> None:
    # Every place passes its content on to the next, so the last one brings up the first.
    sizes, quotas, numbers = [1000], [quota], [1] * (quota - 1) + [0]
    drawn = _draw_heads(sizes, quotas, numbers)
    assert drawn == _swap_one_by_one(sizes, quotas, numbers)
    assert drawn[-1] == 0


def test_shuffle_reaches_every_ordered_draw_once() -> None:
    choices = list(itertools.product(range(5), range(4), range(3)))
    drawn = _draw_heads([5] * 60, [3] * 60, [number for row in choices for number in row])
    triples = {
        tuple(place - 5 * row for place in drawn[3 * row : 3 * row + 3]) for row in range(60)
    }
    assert triples == set(itertools.permutations(range(5), 3))


# ---- draws of fixed size, and compiled ones


@pytest.mark.parametrize(("fixed_size", "breaks"), [(False, 1), (True, 0)])
def test_a_compiled_draw_is_the_same(fixed_size: bool, breaks: int) -> None:
    maps = [counted_map([9, 50, 30], [20, 0, 60]), counted_map([5, 6, 7], [0, 9, 9])]
    sampler = BalancedSampler(3, max_anchors=60, fixed_size=fixed_size)

    def draw(maps: list[Tensor]) -> list[PixelDraw]:
        draws = sampler([label_map + 0 for label_map in maps])
        return [draw._replace(pixel=draw.pixel + 0) for draw in draws]

    assert torch._dynamo.explain(draw)(maps).graph_break_count == breaks
    torch._dynamo.reset()
    torch.manual_seed(0)
    compiled = torch.compile(draw, backend="aot_eager", fullgraph=fixed_size)(maps)
    torch.manual_seed(0)
    for actual, expected in zip(compiled, draw(maps), strict=True):
        assert actual.class_counts == expected.class_counts
        for name in ("image", "pixel", "labels"):
            assert torch.equal(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_fixed_size_draws_the_same_and_pads(balance: str) -> None:
    rng = random.Random(2)
    for seed in range(30):
        num_classes, num_images = rng.randint(1, 7), rng.randint(1, 4)
        budgets = {
            "balance": balance,
            "max_anchors": rng.choice([14, 60, 10_000]),
            "min_pixels": rng.choice([1, 20]),
            "floor": rng.choice([0, 8]),
        }
        maps = [random_map(num_images, size, size + 3, num_classes) for size in (1, 9, 4, 16)]
        generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
        ordinary = BalancedSampler(num_classes, **budgets)(maps, generators[0])
        fixed = BalancedSampler(num_classes, fixed_size=True, **budgets)(maps, generators[1])
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        for draw, padded, label_map in zip(ordinary, fixed, maps, strict=True):
            number, slots = len(draw.labels), min(budgets["max_anchors"], label_map.numel())
            assert padded.image.shape == padded.pixel.shape == padded.labels.shape == (slots,)
            for name in ("image", "pixel", "labels"):
                assert torch.equal(getattr(padded, name)[:number], getattr(draw, name))
            assert (padded.labels[number:] == -1).all()
            label_map.flatten(1)[padded.image, padded.pixel]  # raises for a wrong index
            assert (padded.image >= 0).all() and (padded.pixel >= 0).all()
            assert padded.class_counts is None


def test_padding_does_not_pile_up_on_a_pixel() -> None:
    maps = [counted_map([20, 4000], [10, 3000]), counted_map([2, 1000], [3, 900])]
    for draw in BalancedSampler(2, max_anchors=1500, fixed_size=True)(maps):
        padding = draw.labels < 0
        assert padding.sum() > 1000
        assert Counter(_pixels(draw)).most_common(1)[0][1] <= 3


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_an_ordinary_draw_reads_from_the_device_once(balance: str) -> None:
    maps = [counted_map([9, 50, 30], [20, 0, 60]) for _ in range(4)]
    with HostWaits() as reads:
        BalancedSampler(3, balance=balance)(maps)
    assert reads.calls == ["cpu"]  # all scales


@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_a_draw_of_fixed_size_reads_nothing_from_the_device(balance: str) -> None:
    sampler = BalancedSampler(3, balance=balance, max_anchors=600, floor=8, fixed_size=True)
    # Tensors that have a device and a shape but no values: what needs a value raises, and so does
    # what mixes devices.
    with FakeTensorMode(), HostWaits() as reads:
        maps = [torch.zeros(2, size, size, dtype=torch.long, device="cuda") for size in (32, 8)]
        draws = sampler(maps)
    assert reads.calls == []
    assert [draw.labels.shape for draw in draws] == [(600,), (128,)]
    assert all(value.device.type == "cuda" for draw in draws for value in draw[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("balance", ["class", "image_class"])
def test_a_draw_of_fixed_size_does_not_wait_for_the_gpu(balance: str) -> None:
    maps = [random_map(4, size, size, 7).cuda() for size in (64, 16)]
    sampler = BalancedSampler(7, balance=balance, max_anchors=500, floor=8, fixed_size=True)
    assert gpu_waits(lambda: sampler(maps)) == 0
    draws = sampler(maps, torch.Generator("cuda").manual_seed(0))
    ordinary = BalancedSampler(7, balance=balance, max_anchors=500, floor=8)
    for padded, draw in zip(
        draws, ordinary(maps, torch.Generator("cuda").manual_seed(0)), strict=True
    ):
        number = len(draw.labels)
        assert 0 < number < len(padded.labels)
        assert _pixels(padded)[:number] == _pixels(draw)
        assert (padded.labels[number:] == -1).all()


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"balance": "pixel"}, "balance='pixel': choose 'class' or 'image_class'"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"max_anchors": 21}, "max_anchors=21.*11 classes: set it to 22"),
        ({"min_pixels": 0}, "min_pixels=0"),
        ({"max_per_group": 1}, "max_per_group=1.*2 or more"),
        ({"floor": -1}, "floor=-1"),
        (
            {"fixed_size": True, "across_processes": True},
            "fixed_size=True with across_processes=True.*Set one of them to False",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BalancedSampler(**{"num_classes": 11, **arguments})


# ---- predictions


def test_predictions_are_made_of_resized_scores() -> None:
    # Two pixels of 0.9 : 0.1 and 0.2 : 0.8 mix to 0.55 : 0.45, where the second class has lost.
    logits = torch.tensor([[[[0.9, 0.2]], [[0.1, 0.8]]]])
    assert predicted_labels(logits, (1, 2)).tolist() == [[[0, 1]]]
    assert predicted_labels(logits, (1, 1)).tolist() == [[[0]]]
    assert predicted_labels(logits, (1, 6)).tolist() == [[[0, 0, 0, 1, 1, 1]]]
    assert predicted_labels(logits.bfloat16(), (1, 1)).tolist() == [[[0]]]

"""The memory bank. Shape letters: B images, K classes, D width, h w embedding map, S slots."""

from __future__ import annotations

import copy
import io
import logging
from collections import Counter, deque

import pytest
import torch
import torch.distributed as dist
from scipy import stats
from torch import Tensor
from torch.nn.functional import normalize

from contrast_d2.contrast import MemoryBank

from ..helpers import HostWaits, run_processes
from .test_sampling import random_map

NUM_CLASSES = 4
WIDTH = 5


def build(**arguments) -> MemoryBank:
    defaults = {"regions_per_class": 3, "pixels_per_class": 8, "pixels_per_image": 2}
    return MemoryBank(NUM_CLASSES, WIDTH, **{**defaults, **arguments})


def random_batch(num_images: int = 2, size: int = 6) -> tuple[Tensor, Tensor]:
    """Embeddings of all lengths, and labels with ignored pixels and absent classes."""
    embeddings = torch.randn(num_images, WIDTH, size, size, dtype=torch.float64)
    embeddings *= torch.rand(num_images, 1, size, size, dtype=torch.float64) * 10 + 0.1
    return embeddings, random_map(num_images, size, size, NUM_CLASSES)


def filled(slots: Tensor, number: Tensor) -> list[Tensor]:
    """The filled slots of each class."""
    return [rows[:n] for rows, n in zip(slots, number.tolist(), strict=True)]


class Reference:
    """The same bank of regions, one key at a time; and what is known of each pixel."""

    def __init__(self, regions: int, pixels_per_image: int) -> None:
        self.regions = [deque(maxlen=regions) for _ in range(NUM_CLASSES)]
        self.pixels_per_image = pixels_per_image
        self.embeddings: list[Tensor] = []
        self.origins: list[tuple[int, int]] = []
        # The images from which the pixel keys of each class come, in order.
        self.pixel_images: list[list[int]] = [[] for _ in range(NUM_CLASSES)]
        self.num_images = 0

    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        for one_map, one_labels in zip(embeddings, labels, strict=True):
            for label in range(NUM_CLASSES):
                rows = [
                    one_map[:, y, x] / one_map[:, y, x].norm()
                    for y in range(one_labels.shape[0])
                    for x in range(one_labels.shape[1])
                    if one_labels[y, x] == label
                ]
                if rows:
                    mean = sum(rows) / len(rows)
                    self.regions[label].append(mean / mean.norm())
                self.embeddings += rows
                self.origins += [(label, self.num_images)] * len(rows)
                number = min(len(rows), self.pixels_per_image)
                self.pixel_images[label] += [self.num_images] * number
            self.num_images += 1

    def check(self, bank: MemoryBank) -> None:
        for label, keys in enumerate(self.regions):
            number = bank.filled[0, label]
            assert number == len(keys)
            found = bank.regions[label, :number]
            if number == bank.regions_per_class:  # the oldest one is the next to be replaced
                found = found.roll(-bank.pointers[0, label].item(), 0)
            if len(keys):
                torch.testing.assert_close(found, torch.stack(list(keys)), rtol=0, atol=1e-12)
            self._check_pixels(bank, label)

    def _check_pixels(self, bank: MemoryBank, label: int) -> None:
        number = bank.filled[1, label]
        keys = bank.pixels[label, :number]
        if number == bank.pixels_per_class:
            keys = keys.roll(-bank.pointers[1, label].item(), 0)
        expected = self.pixel_images[label][-bank.pixels_per_class :]
        assert number == len(expected)
        if number:
            similarity, nearest = (keys @ torch.stack(self.embeddings).T).max(dim=1)
            torch.testing.assert_close(similarity, torch.ones_like(similarity))
            assert [self.origins[i] for i in nearest.tolist()] == [(label, b) for b in expected]
            assert len(set(nearest.tolist())) == number


# ---- what is stored


@pytest.mark.parametrize("num_images", [1, 2, 7])
def test_contents_are_those_of_one_key_at_a_time(num_images: int) -> None:
    bank, reference = build().double(), Reference(regions=3, pixels_per_image=2)
    for _ in range(6):
        batch = random_batch(num_images)
        bank.enqueue(*batch)
        reference.enqueue(*batch)
        reference.check(bank)
    # Rings have gone round; seven images at once bring more keys than there are slots.
    assert (bank.filled == torch.tensor([[3], [8]])).any(dim=1).all()


def by_class(labels: Tensor) -> Tensor:
    """Embeddings of a single direction for each class: unit vector c for class c."""
    return torch.eye(WIDTH)[labels.clamp(0, WIDTH - 1)].movedim(3, 1) * 3


@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_pixel_keys_are_of_their_class(size: tuple[int, int]) -> None:
    """Not the first pixels of an image, whatever they show."""
    labels = torch.randint(NUM_CLASSES, (3, *size))
    labels[:, : size[0] // 2] = 3
    bank = build(pixels_per_class=60, pixels_per_image=20)
    bank.enqueue(by_class(labels), labels)
    for label, keys in enumerate(filled(bank.pixels, bank.filled[1])):
        assert len(keys) > 5
        assert torch.equal(keys, torch.eye(WIDTH)[label].expand_as(keys))


def test_region_keys_are_of_their_class() -> None:
    labels = torch.randint(NUM_CLASSES, (3, 6, 6))
    bank = build()
    bank.enqueue(by_class(labels), labels)
    expected = torch.eye(WIDTH)[:NUM_CLASSES, None].expand(-1, 3, -1)
    torch.testing.assert_close(bank.regions, expected)


def test_class_0_is_a_class() -> None:
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    bank = build()
    bank.enqueue(by_class(labels), labels)
    assert bank.filled.tolist() == [[1, 0, 0, 0], [2, 0, 0, 0]]
    embeddings, found = bank.contrast_set()
    assert torch.equal(embeddings[found == 0], torch.eye(WIDTH)[:1].expand(3, -1))


def test_what_is_ignored_is_not_stored() -> None:
    labels = torch.tensor([255, -1, NUM_CLASSES, 1000]).repeat(4)[None].view(1, 4, 4)
    bank = build()
    before = copy.deepcopy(bank.state_dict())
    bank.enqueue(torch.randn(1, WIDTH, 4, 4), labels)
    torch.testing.assert_close(dict(bank.state_dict()), dict(before), rtol=0, atol=0)
    labels[0, 0, 0] = 2
    bank.enqueue(torch.randn(1, WIDTH, 4, 4), labels)
    assert bank.filled.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]


def test_all_ignored_leaves_a_full_bank_alone() -> None:
    bank = build().double()
    for _ in range(6):
        bank.enqueue(*random_batch())
    before = copy.deepcopy(bank.state_dict())
    embeddings, labels = random_batch()
    bank.enqueue(embeddings, torch.full_like(labels, 255))
    torch.testing.assert_close(dict(bank.state_dict()), dict(before), rtol=0, atol=0)


def test_pointers_advance_by_the_number_of_keys() -> None:
    """And not by one for all pixels of an image."""
    bank = build(pixels_per_class=7, pixels_per_image=3)
    labels = torch.tensor([[1] * 10 + [2, 2, 255]]).view(1, 1, 13)
    pointers = []
    for _ in range(3):
        bank.enqueue(torch.randn(1, WIDTH, 1, 13), labels)
        pointers.append(bank.pointers[:, 1:3].tolist())
    assert pointers == [[[1, 1], [3, 2]], [[2, 2], [6, 4]], [[0, 0], [2, 6]]]
    assert bank.filled.tolist() == [[0, 3, 3, 0], [0, 7, 6, 0]]


@pytest.mark.parametrize("extra", [1, 3, 5, 8])
def test_a_full_ring_holds_the_newest_keys(extra: int) -> None:
    """Wrap-around drops neither the end of one round nor the start of the next."""
    size = 8
    bank = build(regions_per_class=size, pixels_per_class=size, pixels_per_image=1)
    keys = normalize(torch.randn(size + extra, WIDTH), dim=1)
    for start in range(0, len(keys), 3):  # three images at a time, of one pixel
        part = keys[start : start + 3]
        bank.enqueue(part[:, :, None, None], torch.zeros(len(part), 1, 1, dtype=torch.long))
    for kind, slots in enumerate((bank.regions, bank.pixels)):
        in_order = slots[0].roll(-bank.pointers[kind, 0].item(), 0)
        torch.testing.assert_close(in_order, keys[extra:])


def test_more_keys_than_slots_at_once() -> None:
    bank = build(regions_per_class=3, pixels_per_class=3, pixels_per_image=1)
    keys = normalize(torch.randn(11, WIDTH), dim=1)
    bank.enqueue(keys[:2, :, None, None], torch.ones(2, 1, 1, dtype=torch.long))
    bank.enqueue(keys[2:, :, None, None], torch.ones(9, 1, 1, dtype=torch.long))
    for kind, slots in enumerate((bank.regions, bank.pixels)):
        assert bank.pointers[kind, 1] == 11 % 3
        torch.testing.assert_close(slots[1].roll(-2, 0), keys[-3:])
        assert not slots[[0, 2, 3]].any()


def test_pixels_are_drawn_at_random() -> None:
    labels = torch.zeros(1, 1, 6, dtype=torch.long)
    bank = build(pixels_per_class=2000, pixels_per_image=2)
    embeddings = torch.eye(6)[:, :WIDTH].T[None, :, None]  # (1, D, 1, 6); the sixth is zero
    bank.enqueue(embeddings.expand(1000, -1, -1, -1), labels.expand(1000, -1, -1))
    pairs = bank.pixels[0].view(1000, 2, WIDTH)
    assert not (pairs[:, 0] * pairs[:, 1]).any()  # never the same pixel twice
    counts = torch.cat([pairs.sum((0, 1)), (~pairs.any(dim=2)).sum()[None]])
    # Fewer repetitions than of independent draws: if anything, the test is too lenient.
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert pairs[:, 0].sum(0).min() > 100


@pytest.mark.parametrize("regions", [True, False])
def test_one_kind_alone(regions: bool) -> None:
    sizes = (
        {"regions_per_class": 3, "pixels_per_class": 0}
        if regions
        else {"regions_per_class": 0, "pixels_per_class": 8}
    )
    both, bank = build(), build(**sizes)
    for seed in range(6):
        torch.manual_seed(seed)
        embeddings, labels = random_batch()
        for one in (both, bank):
            one.enqueue(embeddings, labels, torch.Generator().manual_seed(seed))
    name = "regions" if regions else "pixels"
    assert torch.equal(getattr(bank, name), getattr(both, name))
    keys, labels = bank.contrast_set()
    assert len(keys) == len(labels) == NUM_CLASSES * (3 if regions else 8)
    part, part_labels = bank.contrast_set(max_per_class=2)
    assert len(part) == 2 * NUM_CLASSES
    assert all(
        any(torch.equal(key, other) for other in keys[labels == label])
        for key, label in zip(part, part_labels.tolist(), strict=True)
        if label >= 0
    )


def test_an_overflow_stays_out() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]).expand(2, 1, 8)
    embeddings = torch.randn(2, WIDTH, 1, 8)
    embeddings[0, 0, 0, 0] = torch.inf
    embeddings[0, 1, 0, 4] = torch.nan
    bank = build(pixels_per_class=20, pixels_per_image=4)
    bank.enqueue(embeddings, labels)
    assert bank.keys.isfinite().all()
    assert bank.filled.tolist() == [[1, 1, 1, 0], [7, 3, 4, 0]]
    torch.testing.assert_close(bank.keys.norm(dim=1).sum(), torch.tensor(17.0))


# ---- what comes out


def test_slots_that_are_not_filled_have_no_label() -> None:
    bank = build()
    assert (bank.contrast_set().labels == -1).all()
    assert (bank.contrast_set(max_per_class=3).labels == -1).all()
    assert bank.fill_fraction() == 0
    labels = torch.tensor([[[0, 2, 2, 255]]])
    bank.enqueue(torch.randn(1, WIDTH, 1, 4), labels)
    keys, found = bank.contrast_set()
    assert sorted(found[found >= 0].tolist()) == [0, 0, 2, 2, 2]
    torch.testing.assert_close(keys[found >= 0].norm(dim=1), torch.ones(5))
    assert not keys[found < 0].any()
    torch.testing.assert_close(bank.fill_fraction(), torch.tensor(5 / (4 * 11)))


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("most", [1, 4, 9, 11, 50])
def test_a_part_of_the_bank_is_of_filled_slots_and_none_twice(most: int, steps: int) -> None:
    bank = build()
    for _ in range(steps):
        bank.enqueue(*random_batch())
    keys, labels = bank.contrast_set(most)
    everything, classes = bank.contrast_set()
    assert len(keys) == len(labels) == min(most, 11) * NUM_CLASSES
    for label in range(NUM_CLASSES):
        # The region and the pixel of a class that an image shows once are equal keys.
        whole = Counter(map(tuple, everything[classes == label].tolist()))
        part = Counter(map(tuple, keys[labels == label].tolist()))
        assert part.total() == min(most, whole.total())
        assert part <= whole


def test_every_filled_slot_is_equally_likely() -> None:
    bank = build()
    labels = torch.tensor([[[0] * 9 + [1]]])
    for _ in range(3):
        bank.enqueue(torch.randn(1, WIDTH, 1, 10), labels)
    whole = torch.cat(filled(bank.regions[:2], bank.filled[0, :2]))
    whole = torch.cat([whole, *filled(bank.pixels[:2], bank.filled[1, :2])])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(len(whole))
    for _ in range(600):
        keys, found = bank.contrast_set(4, generator)
        counts += (keys[found >= 0] @ whole.T > 1 - 1e-6).sum(0)
    # Class 0 has three regions and six pixels; class 1, of one pixel per image, the same twice.
    of_class_0 = torch.cat([counts[:3], counts[6:12]])
    assert of_class_0.sum() == 600 * 4
    assert stats.chisquare(of_class_0.numpy()).pvalue > 1e-4


def test_the_generator_fixes_all_choices() -> None:
    banks = [build() for _ in range(3)]
    embeddings, labels = random_batch()
    for bank, seed in zip(banks, (1, 1, 2), strict=True):
        bank.enqueue(embeddings, labels, torch.Generator().manual_seed(seed))
    first, again, other = banks
    assert torch.equal(first.pixels, again.pixels) and not torch.equal(first.pixels, other.pixels)
    sets = [first.contrast_set(3, torch.Generator().manual_seed(s)).embeddings for s in (1, 1, 2)]
    assert torch.equal(sets[0], sets[1]) and not torch.equal(sets[0], sets[2])


# ---- storage


def test_half_precision_slots() -> None:
    exact, half = build(), build(dtype="fp16")
    assert half.keys.dtype == torch.float16
    for seed in range(6):
        torch.manual_seed(seed)
        embeddings, labels = random_batch()
        for bank in (exact, half):
            bank.enqueue(embeddings, labels, torch.Generator().manual_seed(seed))
    for most in (None, 5):
        expected = exact.contrast_set(most, torch.Generator().manual_seed(0))
        found = half.contrast_set(most, torch.Generator().manual_seed(0))
        assert found.embeddings.dtype == torch.float32
        assert torch.equal(found.labels, expected.labels)
        torch.testing.assert_close(found.embeddings, expected.embeddings, rtol=1e-3, atol=1e-4)
        assert not torch.equal(found.embeddings, expected.embeddings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_mixed_precision(dtype: torch.dtype) -> None:
    embeddings, labels = random_batch()
    lowered = embeddings.to(dtype)
    exact, mixed = build(), build()
    exact.enqueue(lowered.float(), labels, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=dtype):
        mixed.enqueue(lowered, labels, torch.Generator().manual_seed(0))
    # What has been rounded already is rounded no further: sums are fp32.
    torch.testing.assert_close(mixed.keys, exact.keys, rtol=0, atol=1e-6)


def test_the_memory_format_does_not_matter() -> None:
    embeddings, labels = random_batch()
    banks = [build().double(), build().double()]
    maps = (embeddings, embeddings.contiguous(memory_format=torch.channels_last))
    for bank, one_map in zip(banks, maps, strict=True):
        bank.enqueue(one_map, labels, torch.Generator().manual_seed(0))
    torch.testing.assert_close(banks[1].keys, banks[0].keys)


def save_and_load(bank: MemoryBank, other: MemoryBank) -> None:
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_resumed_bank_continues_bit_for_bit(steps: int, dtype: str) -> None:
    batches = [random_batch() for _ in range(steps + 3)]
    bank, resumed = build(dtype=dtype), build(dtype=dtype)
    for batch in batches[:steps]:
        bank.enqueue(*batch)
    save_and_load(bank, resumed)
    for seed, batch in enumerate(batches[steps:]):
        for one in (bank, resumed):
            one.enqueue(*batch, torch.Generator().manual_seed(seed))
    for name, value in bank.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert set(bank.state_dict()) == {"keys", "pointers", "filled"}


def test_a_bank_that_is_not_kept_starts_empty() -> None:
    bank, resumed = build(persistent=False), build(persistent=False)
    bank.enqueue(*random_batch())
    assert bank.state_dict() == {}
    save_and_load(bank, resumed)
    assert resumed.fill_fraction() == 0 and (resumed.contrast_set().labels == -1).all()
    assert bank.fill_fraction() > 0


@pytest.mark.parametrize(("dtype", "megabytes"), [("fp32", "194.6"), ("fp16", "97.3")])
def test_its_size_is_logged(dtype: str, megabytes: str, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="contrast_d2.contrast.memory"):
        with torch.device("meta"):
            MemoryBank(19, 256, regions_per_class=5000, pixels_per_class=5000, dtype=dtype)
    (message,) = caplog.messages
    assert f"19 classes x (5000 regions + 5000 pixels) x 256 in {dtype}: {megabytes} MB" in message


def test_the_host_waits_for_nothing() -> None:
    bank, batch = build(), random_batch()
    with HostWaits() as waits:
        bank.enqueue(*batch)
        bank.contrast_set()
        bank.contrast_set(3)
    assert waits.calls == []


# ---- several processes

# Images of each rank; 255 for one of ignored pixels alone.
SPLITS = {"even": [[0, 1], [2, 3]], "uneven": [[0], [1, 2, 3]], "blank": [[255, 255], [1, 2]]}


def fill_on_rank(steps: int) -> dict[str, dict[str, Tensor]]:
    rank, states = dist.get_rank(), {}
    for split in SPLITS:
        bank = build(pixels_per_image=1).double()
        for step in range(steps):
            embeddings, labels = make_step(split, step)[rank]
            bank.enqueue(embeddings, labels, torch.Generator().manual_seed(10 * step + rank))
        states[split] = dict(bank.state_dict())
    return states


def make_step(split: str, step: int) -> list[tuple[Tensor, Tensor]]:
    """The batch of each rank."""
    torch.manual_seed(step)
    embeddings, labels = random_batch(num_images=4)
    parts = []
    for images in SPLITS[split]:
        chosen = [image % 4 for image in images]
        own = labels[chosen].clone()
        own[[i for i, image in enumerate(images) if image == 255]] = 255
        parts.append((embeddings[chosen], own))
    return parts


def test_two_processes_hold_the_same_bank() -> None:
    ranks = run_processes(fill_on_rank, 2, 3)
    for split in SPLITS:
        first, second = (states[split] for states in ranks)
        for name, value in first.items():
            assert torch.equal(value, second[name]), (split, name)
        # Nobody's keys are lost: it is the bank of one process with all images in order of ranks.
        bank = build(pixels_per_image=1).double()
        for step in range(3):
            batches = zip(*make_step(split, step), strict=True)
            bank.enqueue(*(torch.cat(parts) for parts in batches))
        for name in ("filled", "pointers"):
            assert torch.equal(first[name], getattr(bank, name))
        regions = NUM_CLASSES * bank.regions_per_class
        torch.testing.assert_close(first["keys"][:regions], bank.keys[:regions])
        # Which pixels they are is chance.
        torch.testing.assert_close(first["keys"].norm(dim=1), bank.keys.norm(dim=1))


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"regions_per_class": -1}, r"MemoryBank\(regions_per_class=-1\): needs at least 0"),
        ({"pixels_per_class": -1}, r"MemoryBank\(pixels_per_class=-1\)"),
        ({"pixels_per_image": 0}, r"MemoryBank\(pixels_per_image=0\): needs at least 1"),
        ({"regions_per_class": 0, "pixels_per_class": 0}, "a bank without slots. Set one"),
        ({"pixels_per_class": 1}, "pixels_per_class=1 is less than.*set it to 2 or more"),
        ({"dtype": "bf16"}, r"dtype='bf16': choose one of \['fp32', 'fp16'\]"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize("num_classes", [0, -3])
def test_wrong_number_of_classes(num_classes: int) -> None:
    with pytest.raises(ValueError, match=rf"num_classes={num_classes}\): needs at least 1"):
        MemoryBank(num_classes, 4, regions_per_class=1, pixels_per_class=0)


def test_labels_of_another_size_are_named() -> None:
    """A bank that is read at another stride than it was labelled at holds keys of other classes."""
    with pytest.raises(ValueError, match=r"labels \(1, 8, 8\): needs .*downsample_labels"):
        build().enqueue(torch.randn(1, WIDTH, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"needs \(B, 5, h, w\)"):
        build().enqueue(torch.randn(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long))


def test_an_empty_part_is_named() -> None:
    with pytest.raises(ValueError, match="max_per_class=0: set it to 1 or more, or to None"):
        build().contrast_set(max_per_class=0)

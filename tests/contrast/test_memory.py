"""Ring buffers of keys. Shape letters: B images, K classes, D width, h w embedding map, S slots."""

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

from contrast_d2.contrast import AnchorMemory, MemoryBank, PixelSet
from contrast_d2.contrast.memory import RingBuffer

from ..helpers import run_processes

NUM_CLASSES = 4
WIDTH = 5
RINGS = {"regions": slice(0, NUM_CLASSES), "pixels": slice(NUM_CLASSES, None)}


def build(**arguments) -> MemoryBank:
    defaults = {"regions_per_class": 3, "pixels_per_class": 8, "pixels_per_image": 2}
    return MemoryBank(NUM_CLASSES, WIDTH, **{**defaults, **arguments})


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_batch(num_images: int = 2, size: int = 6) -> tuple[Tensor, Tensor]:
    """Embeddings of all lengths, and labels with ignored pixels and absent classes."""
    embeddings = torch.randn(num_images, WIDTH, size, size, dtype=torch.float64)
    embeddings *= torch.rand(num_images, 1, size, size, dtype=torch.float64) * 10 + 0.1
    values = torch.tensor([*range(NUM_CLASSES), 255, -1, NUM_CLASSES, 1000])
    weights = torch.rand(len(values)) ** 4
    labels = values[torch.multinomial(weights, num_images * size**2, replacement=True)]
    return embeddings, labels.view(num_images, size, size)


def ring(memory: RingBuffer, number: int) -> Tensor:
    """The keys of a ring, from the oldest one to the newest."""
    size, number_filled = memory.sizes[number], memory.filled[number]
    keys = memory.keys[memory.first[number] :][:size]
    return keys.roll(-memory.pointers[number].item(), 0)[size - number_filled :]


def kind(bank: MemoryBank, name: str) -> list[Tensor]:
    """The filled slots of each class."""
    return [ring(bank, number) for number in range(2 * NUM_CLASSES)[RINGS[name]]]


# ---- the rings


def test_rings_hold_the_newest_keys_in_their_order() -> None:
    # One ring for each class and kind, one kind without slots; more keys at once than slots.
    slots = {"a": 4, "none": 0, "b": 7}
    for _ in range(20):
        memory = RingBuffer(2, 1, slots).double()
        expected = [deque(maxlen=size) for size in (4, 4, 0, 0, 7, 7)]
        value = 0.0
        for number in torch.randint(1, 20, (6,)).tolist():
            rings = torch.tensor([-1, 0, 1, 4, 5])[torch.randint(5, (number,))]
            if number < 5:
                rings[:] = rings[0]
            keys = torch.arange(value, value + number).double()[:, None]
            value += number
            memory.push(keys, rings)
            for key, r in zip(keys.flatten().tolist(), rings.tolist(), strict=True):
                if r >= 0:
                    expected[r].append(key)
            for r, kept in enumerate(expected):
                assert ring(memory, r).flatten().tolist() == list(kept)
            assert memory.fill_fraction() == pytest.approx(sum(map(len, expected)) / 22)
        shares = {name: x.tolist() for name, x in memory.fill_by_class().items()}
        a0, a1, _, _, b0, b1 = map(len, expected)
        assert shares == {"a": [a0 / 4, a1 / 4], "b": pytest.approx([b0 / 7, b1 / 7])}


def test_what_is_not_finite_or_has_no_ring_is_not_stored() -> None:
    memory = RingBuffer(2, 3, {"anchors": 2})
    memory.push(torch.ones(1, 3), torch.tensor([0]))
    before = copy.deepcopy(memory.state_dict())
    bad = torch.ones(4, 3)
    bad[0, 1], bad[1, 0], bad[2, 2] = torch.inf, torch.nan, -torch.inf
    memory.push(bad, torch.tensor([0, 1, 1, -1]))
    for name, value in before.items():
        assert torch.equal(memory.state_dict()[name], value), name
    memory.push(torch.cat([bad, 2 * torch.ones(1, 3)]), torch.tensor([0, 1, 1, -1, 0]))
    assert memory.filled.tolist() == [2, 0]
    assert memory.keys[:, 0].tolist() == [1, 2, 0, 0]


def test_a_resumed_memory_continues_bit_for_bit() -> None:
    for dtype in ("fp32", "fp16"):
        for steps in (1, 4):
            bank, resumed = build(dtype=dtype), build(dtype=dtype)
            for _ in range(steps):
                bank.enqueue(*random_batch())
            file = io.BytesIO()
            torch.save(bank.state_dict(), file)
            file.seek(0)
            resumed.load_state_dict(torch.load(file, weights_only=True), strict=True)
            for seed in range(3):
                batch = random_batch()
                for one in (bank, resumed):
                    one.enqueue(*batch, seeded(seed))
            assert set(bank.state_dict()) == {"keys", "pointers", "filled"}
            for name, value in bank.state_dict().items():
                assert torch.equal(value, resumed.state_dict()[name]), name
    assert build(persistent=False).state_dict() == {}


# ---- what a bank stores


class Reference:
    """The same bank of regions, one key at a time; and what is known of each pixel."""

    def __init__(self, pixels_per_image: int) -> None:
        self.regions = [deque(maxlen=3) for _ in range(NUM_CLASSES)]
        # The images from which the pixel keys of each class come.
        self.pixel_images = [deque(maxlen=8) for _ in range(NUM_CLASSES)]
        self.pixels_per_image = pixels_per_image
        self.embeddings: list[Tensor] = []
        self.origins: list[tuple[int, int]] = []
        self.num_images = 0

    def enqueue(self, embeddings: Tensor, labels: Tensor) -> None:
        for one_map, one_labels in zip(embeddings, labels, strict=True):
            for label in range(NUM_CLASSES):
                pixels = (one_labels == label).nonzero().tolist()
                rows = [one_map[:, y, x] / one_map[:, y, x].norm() for y, x in pixels]
                if rows:
                    mean = sum(rows) / len(rows)
                    self.regions[label].append(mean / mean.norm())
                self.embeddings += rows
                self.origins += [(label, self.num_images)] * len(rows)
                number = min(len(rows), self.pixels_per_image)
                self.pixel_images[label].extend([self.num_images] * number)
            self.num_images += 1

    def check(self, bank: MemoryBank) -> None:
        for found, keys in zip(kind(bank, "regions"), self.regions, strict=True):
            expected = torch.stack(list(keys)) if keys else found[:0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        for label, keys in enumerate(kind(bank, "pixels")):
            assert len(keys) == len(self.pixel_images[label])
            if len(keys):
                similarity, nearest = (keys @ torch.stack(self.embeddings).T).max(dim=1)
                torch.testing.assert_close(similarity, torch.ones_like(similarity))
                origins = [self.origins[i] for i in nearest.tolist()]
                assert origins == [(label, image) for image in self.pixel_images[label]]
                assert len(set(nearest.tolist())) == len(keys)


def test_contents_are_those_of_one_key_at_a_time() -> None:
    for num_images in (1, 2, 7):
        bank, reference = build().double(), Reference(pixels_per_image=2)
        for step in range(8):
            batch = random_batch(num_images)
            if step == 3:
                batch[1][:] = 255
            bank.enqueue(*batch)
            reference.enqueue(*batch)
            reference.check(bank)
        # Rings have gone round; seven images at once bring more keys than there are slots.
        assert all((bank.filled[rings] == bank.sizes[rings]).any() for rings in RINGS.values())


def test_pixels_are_drawn_at_random() -> None:
    labels = torch.zeros(1, 1, 6, dtype=torch.long)
    bank = build(pixels_per_class=2000, pixels_per_image=2)
    embeddings = torch.eye(6)[:, :WIDTH].T[None, :, None]  # (1, D, 1, 6); the sixth is zero
    bank.enqueue(embeddings.expand(1000, -1, -1, -1), labels.expand(1000, -1, -1))
    pairs = kind(bank, "pixels")[0].view(1000, 2, WIDTH)
    assert not (pairs[:, 0] * pairs[:, 1]).any()  # never the same pixel twice
    counts = torch.cat([pairs.sum((0, 1)), (~pairs.any(dim=2)).sum()[None]])
    # Fewer repetitions than of independent draws: if anything, the test is too lenient.
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    assert pairs[:, 0].sum(0).min() > 100


def test_one_kind_alone() -> None:
    banks = {
        "both": build(),
        "regions": build(pixels_per_class=0),
        "pixels": build(regions_per_class=0),
    }
    for seed in range(6):
        batch = random_batch()
        for bank in banks.values():
            bank.enqueue(*batch, seeded(seed))
    regions, pixels = banks["both"].keys.split([3 * NUM_CLASSES, 8 * NUM_CLASSES])
    for name, keys in (("regions", regions), ("pixels", pixels)):
        assert torch.equal(banks[name].keys, keys) and keys.any()
        filled = banks["both"].filled[RINGS[name]]
        found = banks[name].contrast_set().labels
        assert found[found >= 0].bincount(minlength=NUM_CLASSES).tolist() == filled.tolist()


def test_an_overflow_costs_one_step() -> None:
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]).expand(2, 1, 8)
    embeddings = torch.randn(2, WIDTH, 1, 8)
    embeddings[0, 0, 0, 0], embeddings[0, 1, 0, 4] = torch.inf, torch.nan
    bank = build(pixels_per_class=20, pixels_per_image=4)
    bank.enqueue(embeddings, labels)
    # Of the image that has one, no region is kept.
    assert bank.filled.tolist() == [1, 1, 1, 0, 7, 3, 4, 0]
    torch.testing.assert_close(bank.keys.norm(dim=1).sum(), torch.tensor(17.0))


# ---- what comes out


def counted(keys: PixelSet) -> Counter:
    """How often each label and key is there, without empty slots."""
    rows = zip(keys.labels.tolist(), keys.embeddings.tolist(), strict=True)
    return Counter((label, *key) for label, key in rows if label >= 0)


def test_the_contrast_set_is_of_filled_slots_and_none_twice() -> None:
    whole = build()
    assert (whole.contrast_set().labels == -1).all() and whole.fill_fraction() == 0
    for _ in range(5):
        everything = counted(whole.contrast_set())
        # A region of one pixel and the pixel are equal keys.
        assert everything == Counter(
            (label, *key)
            for name in RINGS
            for label, keys in enumerate(kind(whole, name))
            for key in keys.tolist()
        )
        per_class = Counter(label for label, *_ in everything.elements())
        for most in (1, 4, 9, 11, 50):
            bank = build(max_keys=most * NUM_CLASSES)
            bank.load_state_dict(whole.state_dict())
            part = bank.contrast_set()
            assert len(part.embeddings) == len(part.labels) == min(most, 11) * NUM_CLASSES
            assert counted(part) <= everything
            found = Counter(label for label, *_ in counted(part).elements())
            assert found == {label: min(most, n) for label, n in per_class.items()}
        whole.enqueue(*random_batch())


def test_every_filled_slot_is_equally_likely_and_the_generator_fixes_all_choices() -> None:
    bank = build(max_keys=4 * NUM_CLASSES)
    labels = torch.tensor([[[0] * 9 + [1]]])
    for seed in range(3):
        bank.enqueue(torch.randn(1, WIDTH, 1, 10), labels, seeded(seed))
    # Class 0 has three regions and six pixels.
    whole = torch.cat([kind(bank, "regions")[0], kind(bank, "pixels")[0]])
    generator, counts = seeded(0), torch.zeros(9)
    for _ in range(400):
        keys = bank.contrast_set(generator)
        counts += (keys.embeddings[keys.labels == 0] @ whole.T > 1 - 1e-6).sum(0)
    assert counts.sum() == 400 * 4
    assert stats.chisquare(counts.numpy()).pvalue > 1e-4
    sets = [bank.contrast_set(seeded(seed)).embeddings for seed in (1, 1, 2)]
    assert torch.equal(sets[0], sets[1]) and not torch.equal(sets[0], sets[2])
    banks = [build() for _ in range(3)]
    batch = random_batch()
    for bank, seed in zip(banks, (1, 1, 2), strict=True):
        bank.enqueue(*batch, seeded(seed))
    assert torch.equal(banks[0].keys, banks[1].keys)
    assert not torch.equal(banks[0].keys, banks[2].keys)


def test_anchors_are_the_newest_and_as_many_of_each_class() -> None:
    memory = AnchorMemory(num_classes=3, embed_dim=1, size=4)
    assert (memory.contrast_set().labels == -1).all()
    for rings, expected in (
        ([0], {0: [1]}),
        ([0, 0, 1], {0: [3], 1: [4]}),
        ([0, 0, 0], {0: [7], 1: [4]}),
        ([1, 1, 0], {0: [6, 7, 10], 1: [4, 8, 9]}),  # class 2 has none, which does not count
        ([2], {0: [10], 1: [9], 2: [11]}),
        ([2] * 9, {0: [6, 7, 10], 1: [4, 8, 9], 2: [18, 19, 20]}),
    ):
        first = 1 + int(memory.keys.max())
        memory.push(torch.arange(first, first + len(rings)).float()[:, None], torch.tensor(rings))
        keys = memory.contrast_set()
        assert len(keys.labels) == 12
        assert counted(keys) == Counter((n, x) for n, xs in expected.items() for x in xs)


# ---- storage


def test_half_precision_slots() -> None:
    exact, half = build(), build(dtype="fp16")
    assert half.keys.dtype == torch.float16
    for seed in range(6):
        batch = random_batch()
        for bank in (exact, half):
            bank.enqueue(*batch, seeded(seed))
    for most in (None, 5 * NUM_CLASSES):
        exact.max_keys = half.max_keys = most
        expected, found = exact.contrast_set(seeded(0)), half.contrast_set(seeded(0))
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.embeddings, expected.embeddings.half())


def test_mixed_precision_and_memory_formats_of_maps() -> None:
    embeddings, labels = random_batch()
    for dtype in (torch.float16, torch.bfloat16):
        lowered = embeddings.to(dtype)
        exact, mixed = build(), build()
        exact.enqueue(lowered.float(), labels, seeded(0))
        with torch.autocast("cpu", dtype=dtype):
            last = lowered.contiguous(memory_format=torch.channels_last)
            mixed.enqueue(last, labels, seeded(0))
        # What has been rounded already is rounded no further: sums are fp32.
        torch.testing.assert_close(mixed.keys, exact.keys, rtol=0, atol=1e-6)


def test_its_size_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="contrast_d2.contrast.memory"):
        for dtype in ("fp32", "fp16"):
            MemoryBank(19, 256, regions_per_class=50, pixels_per_class=50, dtype=dtype)
    assert [size in text for size, text in zip(("1.9 MB", "1.0 MB"), caplog.messages, strict=True)]


# ---- several processes

# Images of each rank; 255 for one of ignored pixels alone.
SPLITS = {"even": [[0, 1], [2, 3]], "uneven": [[0], [1, 2, 3]], "blank": [[255, 255], [1, 2]]}


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


def fill_on_rank() -> dict[str, dict[str, Tensor]]:
    rank, states = dist.get_rank(), {}
    for split in SPLITS:
        bank = build(pixels_per_image=1).double()
        for step in range(3):
            bank.enqueue(*make_step(split, step)[rank], seeded(10 * step + rank))
        states[split] = dict(bank.state_dict())
    return states


def test_two_processes_hold_the_same_bank() -> None:
    ranks = run_processes(fill_on_rank, 2)
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
        regions = NUM_CLASSES * 3
        torch.testing.assert_close(first["keys"][:regions], bank.keys[:regions])
        # Which pixels they are is chance.
        torch.testing.assert_close(first["keys"].norm(dim=1), bank.keys.norm(dim=1))


# ---- errors


def test_wrong_arguments_are_named() -> None:
    for arguments, named in (
        ({"regions_per_class": -1}, "regions_per_class=-1"),
        ({"pixels_per_class": -1}, "pixels_per_class=-1"),
        ({"pixels_per_image": 0}, "pixels_per_image=0"),
        ({"max_keys": 0}, "max_keys=0"),
        ({"regions_per_class": 0, "pixels_per_class": 0}, "regions_per_class=0"),
        ({"pixels_per_class": 1}, "pixels_per_class=1.*pixels_per_image=2"),
        ({"dtype": "bf16"}, "dtype='bf16'.*fp16"),
    ):
        with pytest.raises(ValueError, match=named):
            build(**arguments)
    for sizes, named in (((0, 4), "num_classes=0"), ((4, 0), "embed_dim=0")):
        with pytest.raises(ValueError, match=named):
            AnchorMemory(*sizes)
    with pytest.raises(ValueError, match="size=0"):
        AnchorMemory(4, 4, 0)
    for sizes, named in (((3, WIDTH), "num_classes=4.*3"), ((4, 7), "embed_dim=5.*7")):
        with pytest.raises(ValueError, match=named):
            build().check_sizes(*sizes)
    build().check_sizes(NUM_CLASSES, WIDTH)
    # A bank that is read at another stride than it was labelled at holds keys of other classes.
    for width, size, named in ((WIDTH, 8, r"\(1, 8, 8\)"), (3, 4, r"\(1, 3, 4, 4\)")):
        with pytest.raises(ValueError, match=named):
            build().enqueue(torch.randn(1, width, 4, 4), torch.zeros(1, size, size).long())

"""The kernel of the CPU: every way through its blocks and tiles gives the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from contrast_d2.contrast import PixelSet, info_nce
from contrast_d2.contrast.kernels import sorted as sorted_kernel
from contrast_d2.contrast.kernels.masked import masked_info_nce

from ..rounding import largest_error, rounding

# Sizes of classes: small ones that share blocks, large ones that make up several, a class of one.
CLASS_SIZES = {
    "small": [3, 1, 4, 2, 5, 1, 1, 2],
    "large": [30, 25, 41],
    "one and many": [1, 60, 1, 1, 1],
    "balanced": [8] * 9,
    "with absent classes": [0, 7, 0, 0, 20, 3, 0],
    "two of one": [1, 1],
}
# Rows and columns of a tile, rows of a block of small classes, bytes of the cache.
TILES = {
    "single rows": (1, 1, 1, 1 << 20),
    "odd": (5, 7, 4, 1 << 20),
    "nothing kept": (8, 16, 6, 0),
    "some kept": (8, 16, 6, 8 * 24 * 16 * 3),
    "one tile": (1000, 1000, 1000, 1 << 20),
    "small classes apart": (16, 32, 2, 1 << 20),
}


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("_ROWS", "_COLUMNS", "_MIXED_ROWS", "_CACHE_BYTES")
    for name, value in zip(names, TILES[request.param], strict=True):
        monkeypatch.setattr(sorted_kernel, name, value)
    monkeypatch.setattr(sorted_kernel, "_WIDE_COLUMNS", TILES[request.param][1])
    monkeypatch.setattr(sorted_kernel, "_LEAST_ROWS", 1)
    monkeypatch.setattr(sorted_kernel, "_TILE_ELEMENTS", 0)
    monkeypatch.setattr(sorted_kernel, "_FEW_ROWS", 0)
    monkeypatch.setattr(sorted_kernel, "_BLOCK_ELEMENTS", 500)


def samples(sizes: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Unit vectors in the order of their classes, which have directions of their own."""
    labels = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
    centres = torch.randn(len(sizes), 12, dtype=torch.float64)
    rows = torch.randn(len(labels), 12, dtype=torch.float64) + 0.7 * centres[labels]
    return normalize(rows, dim=1).to(dtype), labels


def run(kernel, anchors, labels, contrast, contrast_labels, counts, lead, temperature):
    return kernel(
        PixelSet(anchors, labels, counts[0]),
        None if contrast is None else PixelSet(contrast, contrast_labels, counts[1]),
        temperature=temperature,
        holds_anchors=lead,
        needs_gradient=(True, contrast is not None),
    )


def reference(anchors, labels, contrast=None, contrast_labels=None, lead=False, temperature=0.1):
    counts = (None, None)
    return run(
        masked_info_nce, anchors, labels, contrast, contrast_labels, counts, lead, temperature
    )


def run_sorted(
    anchors,
    labels,
    contrast=None,
    contrast_labels=None,
    counts=(None, None),
    lead=False,
    temperature=0.1,
):
    kernel = sorted_kernel.sorted_info_nce
    return run(kernel, anchors, labels, contrast, contrast_labels, counts, lead, temperature)


def assert_same(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sizes", CLASS_SIZES.values(), ids=CLASS_SIZES)
def test_among_themselves(sizes: list[int], tiles: None) -> None:
    anchors, labels = samples(sizes)
    expected = reference(anchors, labels)
    assert_same(run_sorted(anchors, labels, counts=(sizes, None)), expected)
    shuffle = torch.randperm(len(labels))
    result = run_sorted(anchors[shuffle], labels[shuffle])
    assert_same(result._replace(d_anchors=result.d_anchors[shuffle.argsort()]), expected)


@pytest.mark.parametrize("sizes", CLASS_SIZES.values(), ids=CLASS_SIZES)
@pytest.mark.parametrize("contrast_sizes", [[2, 0, 9, 1, 0, 30, 1, 0, 4], [0, 0, 6, 0], [0]])
def test_against_a_set(sizes: list[int], contrast_sizes: list[int], tiles: None) -> None:
    anchors, labels = samples(sizes)
    contrast, contrast_labels = samples(contrast_sizes)
    expected = reference(anchors, labels, contrast, contrast_labels)
    counts = (sizes, contrast_sizes)
    assert_same(run_sorted(anchors, labels, contrast, contrast_labels, counts), expected)
    rows, columns = torch.randperm(len(labels)), torch.randperm(len(contrast_labels))
    result = run_sorted(anchors[rows], labels[rows], contrast[columns], contrast_labels[columns])
    result = result._replace(
        d_anchors=result.d_anchors[rows.argsort()], d_contrast=result.d_contrast[columns.argsort()]
    )
    assert_same(result, expected)


@pytest.mark.parametrize("sizes", CLASS_SIZES.values(), ids=CLASS_SIZES)
@pytest.mark.parametrize("counts_known", [True, False])
def test_anchors_that_lead_a_bank_with_unfilled_slots(
    sizes: list[int], counts_known: bool, tiles: None
) -> None:
    anchors, labels = samples(sizes)
    bank, bank_labels = samples([4, 0, 3, 11, 2])
    order = torch.randperm(len(bank))
    bank_labels = torch.where(torch.rand(len(bank)) < 0.3, -1, bank_labels[order])
    contrast = torch.cat([anchors, bank[order]])
    contrast_labels = torch.cat([labels, bank_labels])
    expected = reference(anchors, labels, contrast, contrast_labels, lead=True)
    actual = run_sorted(
        anchors,
        labels,
        contrast,
        contrast_labels,
        (sizes if counts_known else None, None),
        lead=True,
    )
    assert_same(actual, expected)


def test_padding_is_no_anchor(tiles: None) -> None:
    anchors, labels = samples([9, 0, 14, 3])
    padded = labels.clone()
    padded[torch.randperm(len(labels))[:8]] = -1
    kept = padded >= 0
    result = run_sorted(anchors, padded)
    expected = reference(anchors[kept], labels[kept])
    assert_same(result._replace(d_anchors=result.d_anchors[kept]), expected)
    assert result.d_anchors[~kept].eq(0).all()


def test_cache_keeps_what_it_can_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("_ROWS", 8),
        ("_MIXED_ROWS", 8),
        ("_COLUMNS", 16),
        ("_WIDE_COLUMNS", 16),
        ("_FEW_ROWS", 0),
    ):
        monkeypatch.setattr(sorted_kernel, name, value)
    anchors, labels = samples([10] * 20)
    computed_again, places = [], []
    again, place = sorted_kernel._TileCache.again, sorted_kernel._TileCache._buffer

    def count_again(self, tile):
        computed_again.append(tile)
        return again(self, tile)

    def count_places(self, stop):
        memory = place(self, stop)
        places.append(memory is not None and memory.data_ptr())
        return memory

    monkeypatch.setattr(sorted_kernel._TileCache, "again", count_again)
    monkeypatch.setattr(sorted_kernel._TileCache, "_buffer", count_places)
    results, again_of = {}, {}
    for cache_bytes in (1 << 20, 8 * 10 * 16 * 30, 0):
        computed_again.clear(), places.clear()
        monkeypatch.setattr(sorted_kernel, "_CACHE_BYTES", cache_bytes)
        results[cache_bytes] = run_sorted(anchors, labels)
        assert len({p for p in places if p}) * 8 * 10 * 16 <= cache_bytes
        # Those without a place, and those that had to give theirs to one that waits less long.
        assert len(computed_again) >= sum(1 for p in places if not p)
        assert (len(computed_again) == 0) == (cache_bytes == 1 << 20)
        assert (len(computed_again) == len(places)) == (cache_bytes == 0)
        again_of[cache_bytes] = len(computed_again)
    # It would be 62 if no tile gave its place to one that waits less long.
    assert again_of[8 * 10 * 16 * 30] == 53
    assert_same(results[0], results[1 << 20])
    assert_same(results[8 * 10 * 16 * 30], results[1 << 20])


def test_places_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles are freed as soon as both of their classes have met all others: about half of the upper
    # triangle is alive at a time.
    for name, value in (
        ("_ROWS", 10),
        ("_MIXED_ROWS", 10),
        ("_COLUMNS", 10),
        ("_WIDE_COLUMNS", 10),
        ("_FEW_ROWS", 0),
    ):
        monkeypatch.setattr(sorted_kernel, name, value)
    taken = []
    place = sorted_kernel._TileCache._buffer

    def count(self, stop):
        memory = place(self, stop)
        taken.append(memory.data_ptr())
        return memory

    monkeypatch.setattr(sorted_kernel._TileCache, "_buffer", count)
    run_sorted(*samples([10] * 30))
    assert len(taken) == 30 * 29 // 2
    assert len(set(taken)) <= 0.56 * len(taken)


@pytest.mark.parametrize("temperature", [0.026, 0.05, 0.1])
def test_the_error_is_that_of_rounding_where_it_is_chosen(temperature: float) -> None:
    # Two opposite directions: similarities reach both ends of their range.
    signs = torch.where(torch.rand(400, 1) < 0.5, -1.0, 1.0)
    anchors = normalize(signs * torch.ones(1, 16) + 0.05 * torch.randn(400, 16), dim=1)
    labels = torch.randint(5, (400,))
    assert sorted_kernel.is_exact(temperature, len(anchors))
    exact = reference(anchors.double(), labels, temperature=temperature)
    ours = run_sorted(anchors, labels, temperature=temperature)
    for index in (0, 2):
        assert largest_error(ours[index], exact[index]) <= rounding(16, temperature)


def test_terms_that_point_the_same_way_are_summed_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The case that sorting makes worse: the positives of an anchor follow each other. Summed in one
    # product, they would cost digits, how many depends on the BLAS.
    steps: list[int] = []
    add = sorted_kernel._add_in_steps

    def record(target, weights, factor, step, scale=1.0) -> None:
        with _Products() as products:
            add(target, weights, factor, step, scale)
        steps.append(max(products.terms))

    monkeypatch.setattr(sorted_kernel, "_add_in_steps", record)
    for sizes in ([300, 300], [900, 10], [90] * 7):
        anchors, labels = samples(sizes)
        run_sorted(anchors, labels, counts=(sizes, None))
        assert max(steps) == sorted_kernel._OWN_STEP
        steps.clear()
        run_sorted(anchors, labels, *samples(sizes))
        assert max(steps) == sorted_kernel._SET_STEP
        steps.clear()


class _Products(TorchDispatchMode):
    """Notes how many terms the products add up at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.addmm_:
            self.terms.append(args[1].shape[1])
        return func(*args, **(kwargs or {}))


def test_small_losses_keep_their_digits() -> None:
    # A softplus of -14 is 8e-7: lost in 1 + 8e-7 unless what the sum rounds away is kept.
    anchors = torch.eye(4)[[0, 0, 1, 1]]
    labels = torch.tensor([0, 0, 1, 1])
    loss = run_sorted(anchors, labels, temperature=1 / 14).total / 4
    expected = np.log1p(2 * np.exp(-14))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("temperature", "chosen"), [(0.1, True), (0.03, True), (0.02, False), (0.01, False)]
)
def test_low_temperatures_go_to_the_kernel_with_a_shift(temperature: float, chosen: bool) -> None:
    assert sorted_kernel.is_exact(temperature, 10_000) == chosen


def test_chosen_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    anchors, labels = samples([3, 4], torch.float32)
    chosen = []
    for name in ("sorted_info_nce", "masked_info_nce"):
        kernel = info_nce.__globals__[name]

        def record(*args, _kernel=kernel, _name=name, **kwargs):
            chosen.append(_name)
            return _kernel(*args, **kwargs)

        monkeypatch.setitem(info_nce.__globals__, name, record)
    info_nce(anchors, labels)
    info_nce(anchors, labels, temperature=0.01)
    info_nce(anchors, labels, pairs=lambda _, positive, negative: (positive, negative))
    assert chosen == ["sorted_info_nce", "masked_info_nce", "masked_info_nce"]

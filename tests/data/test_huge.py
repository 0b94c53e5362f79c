"""A dataset of a million entries: what takes the less time and memory the less it does."""

from __future__ import annotations

import gc
import itertools
import math
import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import contrast_d2.data.class_counts as class_counts
import contrast_d2.data.repeat_factors as module
from contrast_d2.data import ResumableTrainingSampler, build_train_loader
from contrast_d2.data.repeat_factors import factors_of_counts

from .labelled_files import COUNTS, NAME, register, write

MILLION = 1_000_000


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epochs whose order was drawn."""
    drawn: list[int] = []
    epoch_indices = ResumableTrainingSampler.epoch_indices

    def recorded(self, epoch):
        drawn.append(epoch)
        return epoch_indices(self, epoch)

    monkeypatch.setattr(ResumableTrainingSampler, "epoch_indices", recorded)
    return drawn


def test_a_run_of_many_epochs_resumes_at_once(orders: list[int]) -> None:
    start = 10**9 * MILLION + 7  # to go through so many epochs would take years
    sampler = ResumableTrainingSampler(MILLION, seed=0, start=start)
    position, _ = next(iter(sampler))
    assert position == start and orders == [10**9]


def test_with_repeat_factors_no_order_of_earlier_epochs_is_drawn(orders: list[int]) -> None:
    factors = np.linspace(1, 3, MILLION)
    start = 10 * 2 * MILLION
    sampler = ResumableTrainingSampler(MILLION, seed=0, repeat_factors=factors, start=start)
    position, _ = next(iter(sampler))
    assert position == start and orders in ([9], [10])


def test_the_loader_holds_no_object_per_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects would be copied, page by page, into every worker that counts references to them."""

    def records() -> list[dict]:
        return [{"file_name": f"{i}.jpg", "image_id": str(i)} for i in range(50_000)]

    register("many", [], monkeypatch)
    monkeypatch.setitem(DatasetCatalog.data, "many", records)
    assert MetadataCatalog.get("many").ignore_label == 255
    gc.collect()
    before = sys.getallocatedblocks()
    loader = build_train_loader(dataset="many", mapper=lambda r: r, total_batch_size=4, seed=0)
    loader.start_at(1000)
    gc.collect()
    assert sys.getallocatedblocks() - before < 10_000
    assert len(loader.dataset) == 50_000


def test_repeat_factors_of_many_images_take_no_call_each() -> None:
    counts = np.zeros((MILLION // 4, 60), dtype=np.int64)
    rows = np.arange(len(counts))
    counts[:, 0] = 1
    counts[rows, 1 + rows % 59] = 5
    counts[:100, 59] = 5
    calls = itertools.count()
    sys.setprofile(lambda *event: next(calls))
    try:
        factors = factors_of_counts(counts, 0.5)
    finally:
        sys.setprofile(None)
    assert next(calls) < len(counts) / 10  # where a dict for every class of every image takes many
    share = [0.0, *np.count_nonzero(counts[:, 1:], axis=0) / len(counts)]
    for row in (0, 1, 58, 100, len(counts) - 1):
        rarest = min(share[1 + row % 59], share[59] if row < 100 else 1)
        assert factors[row] == pytest.approx(math.sqrt(0.5 / rarest))


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_blocks_change_no_factor(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(0).integers(0, 3, (10, 4))
    expected = factors_of_counts(counts, 1.0)
    monkeypatch.setattr(module, "_ROWS", rows)
    assert factors_of_counts(counts, 1.0).tolist() == expected.tolist()
    assert len(set(expected)) > 1


@pytest.mark.parametrize("queued", [1, 3, 4096])
def test_few_label_files_wait_at_a_time(tmp_path, monkeypatch, queued: int) -> None:
    paths = [str(path) for path in write(tmp_path, monkeypatch)]
    listed = list(itertools.islice(itertools.cycle(paths), 7))
    register(NAME, listed, monkeypatch)
    parts = []

    class Pool(class_counts.ThreadPoolExecutor):
        def map(self, function, items):
            parts.append(len(items))
            return super().map(function, items)

    monkeypatch.setattr(class_counts, "_QUEUED", queued)
    monkeypatch.setattr(class_counts, "ThreadPoolExecutor", Pool)
    counts = class_counts.count_classes(NAME)
    assert counts.tolist() == list(itertools.islice(itertools.cycle(COUNTS), 7))
    assert sum(parts) == 7 and max(parts) == min(queued, 7)

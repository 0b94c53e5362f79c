"""Data loaders that a run can continue exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset

from .datasets import check_registered
from .labels import LabelMap
from .repeat_factors import repeat_factors
from .samplers import ResumableTrainingSampler, sample_rng

Record = dict[str, Any]
Mapper = Callable[[Record], Record]


class MappedRecords(Dataset):
    """Records of a dataset, mapped when they are taken. Errors of the mapper reach the caller.

    Args:
        records: detectron2 dataset records.
        mapper: turns a record into a sample.
    """

    def __init__(self, records: list[Record], mapper: Mapper) -> None:
        # Serialised, so that worker processes share the pages instead of copying them one by one.
        self.records = DatasetFromList(records, copy=False)
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        record: Any = self.records[index]
        return self.mapper(record)


class SeededRecords(MappedRecords):
    """Mapped records, taken by (position, index) and augmented by random numbers of the position.

    Args:
        records: detectron2 dataset records.
        mapper: turns a record into a sample.
        seed: the run's seed.
    """

    def __init__(self, records: list[Record], mapper: Mapper, seed: int) -> None:
        super().__init__(records, mapper)
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Record:
        position, index = key
        with sample_rng(self.seed, position):
            return super().__getitem__(index)


class TrainLoader(DataLoader):
    """An endless loader of batches that can start at any iteration.

    Args:
        dataset: takes the keys of the sampler.
        total_batch_size: images per iteration over all processes and accumulation steps.
        options: of the `DataLoader`, with a `ResumableTrainingSampler`.
    """

    sampler: ResumableTrainingSampler

    def __init__(self, dataset: Dataset, *, total_batch_size: int, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.total_batch_size = total_batch_size

    def start_at(self, iteration: int) -> None:
        """Makes the loader begin with the batches of an iteration when it is iterated next.

        Args:
            iteration: 0 or more.
        """
        self.sampler.start = iteration * self.total_batch_size


def build_train_loader(
    *,
    dataset: str | Sequence[str],
    mapper: Mapper,
    total_batch_size: int,
    seed: int,
    num_workers: int = 2,
    accumulation_steps: int = 1,
    repeat_threshold: float | None = None,
) -> TrainLoader:
    """Builds the infinite training loader of this process.

    Iteration i consumes the positions ``i * total_batch_size`` up to ``(i + 1) * total_batch_size``
    of a stream that depends only on the dataset and the seed, and a sample's augmentation depends
    only on the seed and its position. Any number of workers, processes or accumulation steps, and
    a run that is stopped and resumed, therefore see the same samples bit for bit.

    Args:
        dataset: name of a registered dataset, or several with the same classes and label values.
        mapper: turns a record into a sample, usually a ``SemSegMapper``.
        total_batch_size: images per iteration over all processes and accumulation steps.
        seed: seed of order and augmentation, not negative.
        num_workers: loading processes per training process; 0 loads in the training process.
        accumulation_steps: micro-batches per iteration.
        repeat_threshold: share of the images; those with a class that fewer images hold come more
            than once an epoch, by `repeat_factors`. None for once each.

    Returns:
        A loader of lists of ``total_batch_size / (processes * accumulation_steps)`` samples;
        ``accumulation_steps`` consecutive lists make an iteration.

    Raises:
        ValueError: if the batch does not divide, a number lies outside its range, or a dataset
            is unknown, empty, or unlike the others.
    """
    world_size = comm.get_world_size()
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps}: needs at least 1.")
    parts = world_size * accumulation_steps
    if total_batch_size < 1 or total_batch_size % parts:
        raise ValueError(
            f"total_batch_size {total_batch_size} must be a positive multiple of {parts}: "
            f"{world_size} process(es) times accumulation_steps {accumulation_steps}"
        )
    names = [dataset] if isinstance(dataset, str) else list(dataset)
    records = SeededRecords(_load_records(names), mapper, seed)
    factors = None if repeat_threshold is None else repeat_factors(names, repeat_threshold)
    return TrainLoader(
        records,
        total_batch_size=total_batch_size,
        batch_size=total_batch_size // parts,
        sampler=ResumableTrainingSampler(len(records), seed=seed, repeat_factors=factors),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        generator=torch.Generator(),
    )


def build_test_loader(*, dataset: str, mapper: Mapper, num_workers: int = 2) -> DataLoader:
    """Builds the loader of this process' share of a dataset, one image at a time.

    Args:
        dataset: name of a registered dataset.
        mapper: turns a record into a sample, usually a ``SemSegMapper`` with ``is_train=False``.
        num_workers: loading processes per process; 0 loads in the calling process.

    Returns:
        A loader of lists of one sample, in the dataset's order.

    Raises:
        ValueError: if the dataset is unknown or empty.
    """
    records = MappedRecords(_load_records([dataset]), mapper)
    return DataLoader(
        records,
        batch_size=1,
        sampler=InferenceSampler(len(records)),
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        generator=torch.Generator(),
    )


# Both loaders get a generator of their own because a DataLoader draws a seed for its workers
# whenever it is iterated. Drawn from torch's global state, each evaluation would change the random
# numbers of the training that follows, and a resumed run would part from an uninterrupted one.


def _load_records(names: Sequence[str]) -> list[Record]:
    """The records of datasets that share classes and label values."""
    if not names:
        raise ValueError("No dataset given: name at least one registered dataset")
    for name in names:
        check_registered(name)
    first, *others = [MetadataCatalog.get(name) for name in names]
    for other in others:
        if (first.stuff_classes, LabelMap.from_metadata(first)) != (
            other.stuff_classes,
            LabelMap.from_metadata(other),
        ):
            raise ValueError(
                f"Datasets {first.name!r} and {other.name!r} differ in classes or label values and "
                "cannot be trained on together"
            )
    records = [DatasetCatalog.get(name) for name in names]
    empty = [name for name, part in zip(names, records, strict=True) if not part]
    if empty:
        raise ValueError(f"Datasets without a single image: {empty}")
    return [record for part in records for record in part]

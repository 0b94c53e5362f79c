import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.utils import comm

from contrast_d2.data import (
    SemSegMapper,
    build_test_loader,
    build_train_loader,
    train_augmentations,
)

TRAIN, VAL = "shapes_sem_seg_train", "shapes_sem_seg_val"
TOTAL = 8


def loader(dataset=TRAIN, total_batch_size=TOTAL, seed=0, num_workers=0, **arguments):
    mapper = SemSegMapper(
        dataset_name=TRAIN, augmentations=train_augmentations((48, 64)), is_train=True
    )
    return build_train_loader(
        dataset=dataset,
        mapper=mapper,
        total_batch_size=total_batch_size,
        seed=seed,
        num_workers=num_workers,
        **arguments,
    )


def samples(batches, start=0, **arguments):
    """The samples of the batches from an iteration on, in order."""
    found = loader(**arguments)
    found.start_at(start)
    return [s for batch in itertools.islice(found, batches) for s in batch]


def assert_same(first, second):
    assert [s["image_id"] for s in first] == [s["image_id"] for s in second]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["sem_seg"], b["sem_seg"])


@pytest.fixture(scope="module")
def reference():
    """Four iterations, one process, no workers."""
    return samples(4)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(reference, num_workers):
    assert_same(samples(4, num_workers=num_workers), reference)


def test_accumulation_changes_nothing(reference):
    assert_same(samples(8, accumulation_steps=2), reference)


@pytest.mark.parametrize("start", [1, 3])
def test_a_later_start_continues(reference, start):
    assert_same(samples(4 - start, start, num_workers=2), reference[TOTAL * start :])


def test_rare_classes_are_repeated_and_a_resumed_run_continues():
    threshold = {"repeat_threshold": 1.0, "total_batch_size": 128}
    sampler = loader(**threshold).sampler
    factors = sampler.repeat_factors
    assert factors.min() < 1.5 < 2 < factors.max()
    epoch = sampler.epoch_indices(0)
    assert len(epoch) == pytest.approx(factors.sum(), rel=0.1)
    whole = [index for _, index in itertools.islice(sampler, 640)]
    resumed = loader(**threshold)
    resumed.start_at(3)
    assert [index for _, index in itertools.islice(resumed.sampler, 256)] == whole[384:]
    with pytest.raises(ValueError, match="repeat_threshold=2"):
        loader(repeat_threshold=2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_every_iteration(monkeypatch, reference, world_size):
    """Together the processes see the same iterations, however each splits its part."""
    parts = []
    for rank in range(world_size):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)
        parts.append(samples(4, accumulation_steps=2))
    merged = [sample for step in zip(*parts, strict=True) for sample in step]
    assert_same(merged, reference[: len(merged)])


def test_a_repeated_image_is_augmented_anew(reference):
    """The augmentation follows the position, not the image."""
    mapper = SemSegMapper(
        dataset_name=TRAIN, augmentations=train_augmentations((48, 64)), is_train=True
    )
    DatasetCatalog.register("one_shape", lambda: DatasetCatalog.get(TRAIN)[:1])
    MetadataCatalog.get("one_shape").set(**_metadata(TRAIN))
    try:
        one = build_train_loader(
            dataset="one_shape", mapper=mapper, total_batch_size=2, seed=0, num_workers=0
        )
        first, second = next(iter(one))
    finally:
        DatasetCatalog.remove("one_shape")
        MetadataCatalog.remove("one_shape")
    assert first["file_name"] == second["file_name"]
    assert not torch.equal(first["image"], second["image"])


def test_seed_changes_order_and_augmentation(reference):
    other = samples(4, seed=1)
    assert [s["image_id"] for s in other] != [s["image_id"] for s in reference]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_global_random_states_are_untouched(num_workers):
    """Neither loading nor evaluating may change what training draws next."""

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    samples(1, num_workers=num_workers)
    mapper = SemSegMapper(dataset_name=VAL, is_train=False)
    next(iter(build_test_loader(dataset=VAL, mapper=mapper, num_workers=num_workers)))
    assert states() == before


def test_several_datasets_are_concatenated():
    combined = loader(dataset=[TRAIN, VAL])
    assert len(combined.dataset) == 256 + 64
    assert combined.dataset.records[256]["image_id"] == "val_00000"


def test_datasets_that_differ_are_rejected():
    with pytest.raises(ValueError, match="'shapes_sem_seg_train' and 'camvid_sem_seg_train'"):
        loader(dataset=[TRAIN, "camvid_sem_seg_train"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_errors_reach_the_caller(num_workers):
    """One broken label must stop the run and name the file, not be replaced by another image."""

    def broken(record):
        if record["image_id"] != "train_00003":
            return record
        raise ValueError(f"{record['sem_seg_file_name']} is broken")

    batches = build_train_loader(
        dataset=TRAIN, mapper=broken, total_batch_size=16, seed=0, num_workers=num_workers
    )
    with pytest.raises(ValueError, match=r"shapes://train/00003/label\.png is broken"):
        for _ in itertools.islice(batches, 256 // 16):
            pass


def test_arguments_are_checked(subtests: pytest.Subtests) -> None:
    for arguments, message in [
        ({"total_batch_size": 10, "accumulation_steps": 4}, "total_batch_size 10 .* multiple of 4"),
        ({"total_batch_size": 0}, "total_batch_size 0"),
        ({"accumulation_steps": 0}, "accumulation_steps"),
        ({"seed": -1}, "seed.*-1"),
        ({"dataset": "shapes_sem_seg_tran"}, "'shapes_sem_seg_tran'.*shapes_sem_seg_train"),
        ({"dataset": []}, "at least one"),
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(ValueError, match=message):
                loader(**arguments)


def test_empty_dataset_is_named():
    DatasetCatalog.register("no_shapes", list)
    MetadataCatalog.get("no_shapes").set(**_metadata(TRAIN))
    mapper = SemSegMapper(dataset_name="no_shapes", is_train=False)
    try:
        with pytest.raises(ValueError, match="no_shapes"):
            build_test_loader(dataset="no_shapes", mapper=mapper)
        with pytest.raises(ValueError, match="no_shapes"):
            loader(dataset=[TRAIN, "no_shapes"])
    finally:
        DatasetCatalog.remove("no_shapes")
        MetadataCatalog.remove("no_shapes")


class _Files(DatasetEvaluator):
    """Notes what it is given."""

    def reset(self):
        self.files = []

    def process(self, inputs, outputs):
        assert len(inputs) == len(outputs) == 1
        self.files.append(inputs[0]["file_name"])

    def evaluate(self):
        return {"files": self.files}


class _Model(torch.nn.Module):
    def forward(self, batched_inputs):
        return [None for _ in batched_inputs]


def test_test_loader_works_with_detectron2s_evaluation_loop():
    mapper = SemSegMapper(dataset_name=VAL, is_train=False)
    batches = build_test_loader(dataset=VAL, mapper=mapper, num_workers=1)
    assert len(batches) == len(batches.dataset) == 64
    seen = inference_on_dataset(_Model(), batches, _Files())["files"]
    assert seen == [record["file_name"] for record in DatasetCatalog.get(VAL)]


def test_test_loader_is_sharded(monkeypatch):
    mapper = SemSegMapper(dataset_name=VAL, is_train=False)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 3)
        shard = build_test_loader(dataset=VAL, mapper=mapper, num_workers=0)
        assert 21 <= len(shard) <= 22
        seen += [sample["image_id"] for (sample,) in shard]
    assert seen == [record["image_id"] for record in DatasetCatalog.get(VAL)]


def _metadata(name):
    return {k: v for k, v in MetadataCatalog.get(name).as_dict().items() if k != "name"}

"""Weights of classes from a dataset's labels. K: number of classes."""

from __future__ import annotations

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyCall, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from omegaconf import OmegaConf
from PIL import Image

import contrast_d2.data.class_weights as module
from contrast_d2.data.class_weights import class_weights, count_classes
from contrast_d2.losses import CrossEntropyLoss

NAME = "counted_sem_seg_train"
# Values 10, 20, 30 and 40 are the classes, 7 is void; the last class is absent.
LABELS = [
    [[10, 10, 10, 10], [10, 10, 20, 7]],  # 6 and 1 of 7
    [[10, 30, 30, 7], [7, 7, 7, 7]],  # 1 and 2 of 3
]
PIXELS, IMAGE_PIXELS = [7, 1, 2, 0], [10, 7, 3, 0]


def register(name: str, files: list[str], monkeypatch: pytest.MonkeyPatch) -> Metadata:
    metadata = Metadata(
        name=name,
        stuff_classes=["road", "pole", "car", "train"],
        ignore_label=255,
        stuff_dataset_id_to_contiguous_id={10: 0, 20: 1, 30: 2, 40: 3},
        void_dataset_ids=(7,),
    )
    records = [{"file_name": "x.jpg", "sem_seg_file_name": file} for file in files]
    monkeypatch.setitem(DatasetCatalog.data, name, lambda: records)
    monkeypatch.setitem(MetadataCatalog.data, name, metadata)
    return metadata


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The label files of the dataset, registered as NAME; an empty folder takes the counts."""
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path / "cache"))
    paths = []
    for i, labels in enumerate(LABELS):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.array(labels, dtype=np.uint8)).save(paths[-1])
    register(NAME, [str(path) for path in paths], monkeypatch)
    return paths


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The label files that have been read, in the order of reading."""
    read: list[str] = []
    load = module.load_labels

    def recorded(path, label_map):
        read.append(path)
        return load(path, label_map)

    monkeypatch.setattr(module, "load_labels", recorded)
    return read


def counts_of(name: str) -> list[list[int]]:
    return [column.tolist() for column in count_classes(name)]


def test_pixels_are_counted_by_class_without_void(files) -> None:
    assert counts_of(NAME) == [PIXELS, IMAGE_PIXELS]


def test_formulas(files, caplog: pytest.LogCaptureFixture) -> None:
    # Shares in the images that hold the class: 7/10, 1/7 and 2/3, of which 2/3 is the median.
    with caplog.at_level(logging.WARNING):
        assert class_weights(NAME) == pytest.approx([2 / 3 / 0.7, 2 / 3 * 7, 1.0, 1.0])
    assert "['train']" in caplog.text  # the absent class
    shares = [0.7, 0.1, 0.2]
    expected = [1 / math.log(1.02 + share) for share in shares]
    assert class_weights(NAME, scheme="inverse_log") == pytest.approx([*expected, 1.0])


def test_several_datasets_count_as_one(files, monkeypatch) -> None:
    for i, file in enumerate(files):
        register(f"half_{i}", [str(file)], monkeypatch)
    assert class_weights(["half_0", "half_1"]) == class_weights(NAME) != class_weights("half_0")


def test_files_are_read_once(files, reads, caplog) -> None:
    with caplog.at_level(logging.INFO):
        first = counts_of(NAME)
        assert sorted(reads) == [str(file) for file in files]
        assert counts_of(NAME) == first
    assert len(reads) == len(files)
    assert caplog.text.count("Counting the classes in 2 label files of counted") == 1


def test_of_several_at_once_one_reads(files, reads) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(counts_of, [NAME] * 4))
    assert results == [[PIXELS, IMAGE_PIXELS]] * 4
    assert len(reads) == len(files)


def test_a_changed_file_is_counted_anew(files, reads) -> None:
    counts_of(NAME)
    status = os.stat(files[0])
    Image.fromarray(np.full((2, 4), 20, dtype=np.uint8)).save(files[0])
    assert counts_of(NAME) == [[1, 8, 2, 0], [3, 8, 3, 0]]
    # The time counts even where the size is the same.
    os.utime(files[0], ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    counts_of(NAME)
    assert len(reads) == 3 * len(files)


def test_another_label_map_is_another_count(files, monkeypatch) -> None:
    counts_of(NAME)
    metadata = register(NAME, [str(file) for file in files], monkeypatch)
    metadata.stuff_dataset_id_to_contiguous_id.update({10: 1, 20: 0})
    assert counts_of(NAME) == [[1, 7, 2, 0], [7, 10, 3, 0]]


@pytest.mark.parametrize(
    "content",
    [
        "",
        '{"pixels": [1',
        "[]",
        '{"pixels": [7, 1, 2, 0]}',
        '{"pixels": [1], "image_pixels": [1]}',
        '{"pixels": [9, 9, 9, 9], "image_pixels": [1, 1, 1, 1]}',
        '{"pixels": ["a", 1, 2, 0], "image_pixels": [7, 1, 2, 0]}',
    ],
)
def test_a_broken_cached_file_is_made_anew(files, reads, caplog, content: str) -> None:
    counts_of(NAME)
    (cached,) = (files[0].parent / "cache").glob("*.json")
    whole = cached.read_text()
    cached.write_text(content)
    assert counts_of(NAME) == [PIXELS, IMAGE_PIXELS]
    assert "made anew" in caplog.text
    assert cached.read_text() == whole
    assert len(reads) == 2 * len(files)


def test_without_a_folder_for_the_cache_it_counts(files, tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path / "file" / "cache"))
    assert counts_of(NAME) == [PIXELS, IMAGE_PIXELS]
    assert "cannot be written to" in caplog.text


def test_in_a_config(files, reads) -> None:
    cfg = OmegaConf.create({"dataset": {"train": [NAME]}}, flags={"allow_objects": True})
    cfg.loss = LazyCall(CrossEntropyLoss)(
        class_weights=LazyCall(class_weights)(dataset="${dataset.train}", scheme="inverse_log")
    )
    for _ in range(2):  # as in each process
        loss = instantiate(cfg.loss)
    assert loss.weight.tolist() == pytest.approx(class_weights(NAME, scheme="inverse_log"))
    assert len(reads) == len(files)


def test_shapes_are_counted_without_files(tmp_path, monkeypatch) -> None:
    """They are rendered; rare classes weigh more."""
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path / "cache"))
    weights = class_weights("shapes_sem_seg_val")
    assert len(weights) == 9 and weights[0] < 0.2 < 5 < weights[-1] == max(weights)
    assert not (tmp_path / "cache").exists()


def test_camvid(camvid: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path))
    pixels = count_classes("camvid_sem_seg_val").pixels
    labels = [
        np.asarray(Image.open(path)) for path in sorted((camvid / "annotations/val").iterdir())
    ]
    expected = [sum(int((x == c).sum()) for x in labels) for c in range(11)]
    assert pixels.tolist() == expected


def test_mistakes_are_named(files, monkeypatch) -> None:
    with pytest.raises(ValueError, match="scheme='median'.*'median_frequency', 'inverse_log'"):
        class_weights(NAME, scheme="median")
    with pytest.raises(ValueError, match="'camvid' is not registered"):
        class_weights("camvid")
    with pytest.raises(ValueError, match="empty list"):
        class_weights([])
    with pytest.raises(ValueError, match=f"{NAME} has the classes .* but shapes_sem_seg_val has"):
        class_weights([NAME, "shapes_sem_seg_val"])

    monkeypatch.setitem(DatasetCatalog.data, NAME, lambda: [{"file_name": "a.jpg"}])
    with pytest.raises(ValueError, match=f"{NAME} has no labels for a.jpg"):
        class_weights(NAME)
    register(NAME, [str(files[0]), "/nowhere/b.png"], monkeypatch)
    with pytest.raises(ValueError, match="/nowhere/b.png"):
        class_weights(NAME)
    Image.fromarray(np.full((2, 2), 7, dtype=np.uint8)).save(files[0])
    register(NAME, [str(files[0])], monkeypatch)
    with pytest.raises(ValueError, match="no labelled pixel"):
        class_weights(NAME)

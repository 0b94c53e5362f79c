"""A dataset of two small label files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from PIL import Image

NAME = "counted_sem_seg_train"
# Values 10, 20, 30 and 40 are the classes, 7 is void; the last class is absent.
LABELS = [
    [[10, 10, 10, 10], [10, 10, 20, 7]],
    [[10, 30, 30, 7], [7, 7, 7, 7]],
]
COUNTS = [[6, 1, 0, 0], [1, 0, 2, 0]]


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


def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Writes the label files and registers them as NAME; a folder beside them takes the counts."""
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(folder / "cache"))
    paths = []
    for i, labels in enumerate(LABELS):
        paths.append(folder / f"{i}.png")
        Image.fromarray(np.array(labels, dtype=np.uint8)).save(paths[-1])
    register(NAME, [str(path) for path in paths], monkeypatch)
    return paths

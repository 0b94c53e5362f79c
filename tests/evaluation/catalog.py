"""Registers small datasets in detectron2's catalog."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image


def register(
    name: str, folder: Path, label_maps: Sequence[np.ndarray], classes: Sequence[str]
) -> None:
    """Writes label maps (contiguous ids, 255 is void) and registers them as a dataset."""
    records = []
    for i, labels in enumerate(label_maps):
        path = folder / f"{name}_{i}.png"
        Image.fromarray(labels.astype(np.uint8)).save(path)
        height, width = labels.shape
        records.append(
            {
                "file_name": str(path.with_suffix(".jpg")),
                "sem_seg_file_name": str(path),
                "height": height,
                "width": width,
                "image_id": path.stem,
            }
        )
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(stuff_classes=list(classes), ignore_label=255)

"""From a dataset record to the dict that a segmentation model takes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from .cache import PixelCache
from .datasets import check_registered
from .labels import LabelMap, load_labels
from .reading import read_rgb


class SemSegMapper:
    """Reads one image and its labels, augments both, and turns them into tensors.

    Args:
        dataset_name: a registered dataset, whose metadata define the labels.
        augmentations: detectron2 augmentations, applied in order to RGB images.
        is_train: whether labels are read.
        image_format: "RGB" or "BGR", the order of the channels that the model takes.
        cache_dir: a folder where decoded images are kept for later epochs and runs, as
            `PixelCache` says; None keeps none.

    Raises:
        ValueError: if the dataset is not registered or has no usable metadata, image_format is
            neither, or cache_dir cannot be written to.
    """

    def __init__(
        self,
        *,
        dataset_name: str,
        augmentations: Sequence[T.Augmentation | Transform] = (),
        is_train: bool,
        image_format: str = "RGB",
        cache_dir: str | None = None,
    ) -> None:
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', got {image_format!r}")
        check_registered(dataset_name)
        self.label_map = LabelMap.from_metadata(MetadataCatalog.get(dataset_name))
        self.augmentations = T.AugmentationList(list(augmentations))
        self.is_train = is_train
        self.image_format = image_format
        self.cache = None if cache_dir is None else PixelCache(cache_dir)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps one record; the record itself is left unchanged.

        Args:
            dataset_dict: a record with ``file_name`` and, in training, ``sem_seg_file_name``;
                ``height`` and ``width`` are checked where given.

        Returns:
            The record's own entries, ``height`` and ``width`` of the image as stored, ``image``:
            (3, H, W) uint8 in 0..255, and in training ``sem_seg``: (H, W) uint8 with values in
            0..K-1 or the ignored label. Losses of torch take its ``.long()``.

        Raises:
            ValueError: if a file cannot be read, sizes differ, or a label is not defined. The
                message names the file.
        """
        try:
            image, labels = self._read(dataset_dict)
        except ValueError as error:
            name = self.label_map.dataset_name
            raise ValueError(f"{error}. All files: python tools/check_dataset.py {name}") from error
        height, width = image.shape[:2]

        sample = T.AugInput(image, sem_seg=labels)
        self.augmentations(sample)
        image = sample.image if self.image_format == "RGB" else sample.image[:, :, ::-1]

        # np.array copies: augmentations may hand back read-only or negatively strided views.
        result = dict(dataset_dict, height=height, width=width)
        result["image"] = torch.from_numpy(np.array(image.transpose(2, 0, 1), order="C"))
        if sample.sem_seg is not None:
            result["sem_seg"] = torch.from_numpy(sample.sem_seg.astype(np.uint8))
        return result

    def _read(self, dataset_dict: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
        """Reads the (H, W, 3) image and, in training, the (H, W) labels of a record."""
        file_name = dataset_dict["file_name"]
        read = read_rgb if self.cache is None else partial(self.cache.read, decode=read_rgb)
        image = read(file_name)
        height, width = image.shape[:2]
        declared = dataset_dict.get("height", height), dataset_dict.get("width", width)
        if declared != (height, width):
            raise ValueError(
                f"{file_name} has size (height, width) {(height, width)}, but its dataset record "
                f"says {declared}: correct the record or the file"
            )
        labels = self._read_labels(dataset_dict, (height, width)) if self.is_train else None
        return image, labels

    def _read_labels(self, dataset_dict: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """Reads the (H, W) uint8 labels of a record whose image has the given (H, W)."""
        if "sem_seg_file_name" not in dataset_dict:
            raise ValueError(
                f"The record of {dataset_dict['file_name']} has no 'sem_seg_file_name': train on a "
                "split that has labels"
            )
        path = dataset_dict["sem_seg_file_name"]
        labels = load_labels(path, self.label_map)
        if labels.shape != size:
            raise ValueError(
                f"Image and labels differ in size (height, width): {dataset_dict['file_name']} has "
                f"{size}, {path} has {labels.shape}"
            )
        return labels

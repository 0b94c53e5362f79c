"""Class-balanced pixels of many images, with their embeddings in one or more models.

Shape letters: A drawn pixels, C channels, K classes, H W an image as the network takes it, h w a
feature map, P the side of a patch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ...contrast import downsample_labels
from ...losses import upsample
from .layers import LayerOutput, LayerTap

Columns = dict[str, np.ndarray]

# Further rows of a reservoir beyond those that it keeps, before it is sorted anew.
_SLACK_ROWS = 4096


class PixelSet(NamedTuple):
    """Pixels drawn from some images, sorted by class, image and position.

    Attributes:
        embeddings: by model, (A, C) float32, as the layer gives them.
        predictions: by model, (A,) int64, the class that it gives the pixel.
        labels: (A,) int64.
        image: (A,) int64, number of the image in the order of the data.
        position: (A, 2) int64, x and y of the pixel whose label was read, in the image's file.
        one_class: (A,) bool, whether all pixels that the map's pixel stands for have one label.
        patches: (A, P, P, 3) uint8 RGB, what lies around the pixel.
        file_names: of all images, by number.
    """

    embeddings: dict[str, np.ndarray]
    predictions: dict[str, np.ndarray]
    labels: np.ndarray
    image: np.ndarray
    position: np.ndarray
    one_class: np.ndarray
    patches: np.ndarray
    file_names: tuple[str, ...]


class PixelReservoir:
    """Keeps for each class the rows with the lowest keys, however many are added.

    With random keys these are a random draw of all rows of the class, in memory for no more than
    those that are kept.

    Args:
        per_class: most rows of a class.
    """

    def __init__(self, per_class: int) -> None:
        self._per_class = per_class
        self._rows: Columns = {}
        self._parts: list[Columns] = []
        self._waiting = 0

    def add(self, rows: Columns) -> None:
        """Adds rows.

        Args:
            rows: arrays of one length by name, always the same names, among them "label" and "key".
        """
        self._parts.append(rows)
        self._waiting += len(rows["label"])
        if self._waiting > _SLACK_ROWS:
            self._prune()

    def rows(self) -> Columns:
        """Those that are kept; {} if none were ever added."""
        self._prune()
        return self._rows

    def _prune(self) -> None:
        parts = [self._rows, *self._parts] if self._rows else self._parts
        if self._parts:
            rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            kept = lowest_of_each_class(rows["label"], rows["key"], self._per_class)
            self._rows = {name: values[kept] for name, values in rows.items()}
        self._parts, self._waiting = [], 0


def lowest_of_each_class(labels: np.ndarray, keys: np.ndarray, most: int) -> np.ndarray:
    """Indices of the `most` rows of each class with the lowest keys, in ascending order.

    Args:
        labels: (A,) integers.
        keys: (A,) floats.
        most: at least 1.
    """
    order = np.lexsort((keys, labels))
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(order[rank < most])


def collect_pixels(
    taps: Mapping[str, LayerTap],
    samples: Iterable[dict[str, Any]],
    *,
    num_classes: int,
    ignore_label: int,
    per_class: int,
    per_image: int,
    seed: int,
    image_format: str = "RGB",
    patch_reach: int = 32,
    patch_side: int = 48,
) -> PixelSet:
    """Draws pixels at random, the same number of each class, and reads them off every model.

    Labels are brought to the size of the layer's map as in training: the map's pixel takes the
    label of the image's pixel at its upper left corner. Which pixels are drawn follows from labels
    and seed alone, so it is the same for all models, and for all layers of one size.

    Args:
        taps: the models by name; their maps have one size.
        samples: of a mapper with `is_train=True`: "image" (3, H, W), "sem_seg" (H, W), "file_name",
            and "height" and "width" of the file.
        num_classes: K.
        ignore_label: label of pixels that are not drawn.
        per_class: most pixels of a class; a class with fewer gives what it has.
        per_image: most pixels of a class that one image gives.
        seed: of the draw, not negative.
        image_format: "RGB" or "BGR", order of the images' channels.
        patch_reach: a patch shows so many pixels to each side.
        patch_side: P, to which it is resized.

    Raises:
        ValueError: a number is out of its range, the models' maps differ in size, or no pixel is
            labelled.
    """
    for name, value, least in (
        ("per_class", per_class, 1),
        ("per_image", per_image, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: needs {least} or more.")
    reservoir = PixelReservoir(per_class)
    file_names = []
    for number, sample in enumerate(samples):
        file_names.append(sample["file_name"])
        outputs = {name: tap(sample) for name, tap in taps.items()}
        labels = _map_labels(sample["sem_seg"].long(), _checked_sizes(outputs), ignore_label)
        rng = np.random.default_rng([seed, number])
        keys = rng.random(labels.grid.size)
        classes = np.where(labels.grid == ignore_label, -1, labels.grid).reshape(-1)
        drawn = lowest_of_each_class(classes, keys, per_image)
        drawn = drawn[(classes[drawn] >= 0) & (classes[drawn] < num_classes)]
        rows = {"label": classes[drawn], "key": keys[drawn]}
        rows["image"] = np.full(len(drawn), number)
        rows["one_class"] = labels.one_class.reshape(-1)[drawn]
        rows |= _places(sample, labels, drawn, image_format, patch_reach, patch_side)
        for name, output in outputs.items():
            rows[f"embeddings {name}"] = output.features.flatten(1).T[drawn].numpy()
            predictions = upsample(output.logits[None], labels.grid.shape).argmax(dim=1)
            rows[f"predictions {name}"] = predictions.flatten()[drawn].numpy()
        reservoir.add(rows)
    return _pixel_set(reservoir.rows(), list(taps), file_names)


class _MapLabels(NamedTuple):
    """Labels at the size of a feature map.

    Attributes:
        grid: (h, w) int64.
        one_class: (h, w) bool, whether the pixels that a pixel of the map stands for have one
            label.
        y, x: (h,) and (w,) int64, where the labels were read.
    """

    grid: np.ndarray
    one_class: np.ndarray
    y: np.ndarray
    x: np.ndarray


class _Sizes(NamedTuple):
    padded: tuple[int, int]
    map: tuple[int, int]


def _checked_sizes(outputs: Mapping[str, LayerOutput]) -> _Sizes:
    sizes = {
        name: _Sizes(output.padded_size, tuple(output.features.shape[-2:]))  # pyright: ignore[reportArgumentType]
        for name, output in outputs.items()
    }
    if len(set(sizes.values())) > 1:
        shapes = {name: size.map for name, size in sizes.items()}
        raise ValueError(
            f"the models' maps differ in size, {shapes}: compare models whose layer has one stride."
        )
    return next(iter(sizes.values()))


def _map_labels(labels: Tensor, sizes: _Sizes, ignore_label: int) -> _MapLabels:
    """Brings (H, W) labels to the size of a map, padded as the image is."""
    height, width = sizes.padded
    bottom, right = height - labels.shape[0], width - labels.shape[1]
    labels = F.pad(labels, (0, right, 0, bottom), value=ignore_label)
    y, x = (
        downsample_labels(torch.arange(n)[None, :, None], (m, 1)).flatten().numpy()
        for n, m in zip(sizes.padded, sizes.map, strict=True)
    )
    dense = labels.numpy()
    lowest, highest = (
        reduce.reduceat(reduce.reduceat(dense, y, axis=0), x, axis=1)
        for reduce in (np.minimum, np.maximum)
    )
    grid = downsample_labels(labels[None], sizes.map)[0].numpy()
    return _MapLabels(grid, lowest == highest, y, x)


def _places(
    sample: dict[str, Any],
    labels: _MapLabels,
    drawn: np.ndarray,
    image_format: str,
    reach: int,
    side: int,
) -> Columns:
    """Position in the file and patch of each drawn pixel."""
    rows, columns = np.divmod(drawn, labels.grid.shape[1])
    y, x = labels.y[rows], labels.x[columns]
    image = sample["image"].numpy().transpose(1, 2, 0)
    if image_format == "BGR":
        image = image[:, :, ::-1]
    height, width = image.shape[:2]
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    patches = [
        Image.fromarray(np.ascontiguousarray(padded[b : b + 2 * reach + 1, a : a + 2 * reach + 1]))
        for a, b in zip(x, y, strict=True)
    ]
    small = [np.asarray(patch.resize((side, side), Image.Resampling.BOX)) for patch in patches]
    # A mapper may have resized the image.
    x = x * sample.get("width", width) // width
    y = y * sample.get("height", height) // height
    return {
        "position": np.stack([x, y], axis=1),
        "patches": np.array(small, np.uint8).reshape(-1, side, side, 3),
    }


def _pixel_set(rows: Columns, models: Sequence[str], file_names: Sequence[str]) -> PixelSet:
    if not rows or not len(rows["label"]):
        raise ValueError(f"none of {len(file_names)} images has a labelled pixel to draw.")
    position = rows["position"]
    order = np.lexsort((position[:, 0], position[:, 1], rows["image"], rows["label"]))
    rows = {name: values[order] for name, values in rows.items()}
    return PixelSet(
        embeddings={name: rows[f"embeddings {name}"] for name in models},
        predictions={name: rows[f"predictions {name}"] for name in models},
        labels=rows["label"],
        image=rows["image"],
        position=rows["position"],
        one_class=rows["one_class"],
        patches=rows["patches"],
        file_names=tuple(file_names),
    )

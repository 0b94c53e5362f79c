"""The same augmentations in OpenCV, on the crop alone: what one writes where speed is the aim.

Images shrink without averaging, nearest labels are to within a pixel, hues have 180 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_TRIES = 10


def opencv_mapper(
    crop_size: tuple[int, int],
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    max_class_area: float,
    ignore_label: int,
) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """A mapper that draws as `contrast_d2.data.train_augmentations` does, if OpenCV is installed.

    Args:
        crop_size, scale, aspect, max_class_area: as there.
        ignore_label: the value of unlabelled pixels in the label files, and of padding.
    """
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)
    levels = np.arange(256, dtype=np.float32)

    def table(values: np.ndarray) -> np.ndarray:
        return values.clip(0, 255).astype(np.uint8)

    def brightness(image: np.ndarray, factor: float) -> np.ndarray:
        return cv2.LUT(image, table(levels * factor))

    def contrast(image: np.ndarray, factor: float) -> np.ndarray:
        mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
        return cv2.LUT(image, table(levels * factor + (1 - factor) * mean))

    def saturation(image: np.ndarray, factor: float) -> np.ndarray:
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(image, factor, grey, 1 - factor, 0)

    def hue(image: np.ndarray, shift: float) -> np.ndarray:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        turned = ((levels + 180 * shift) % 180).astype(np.uint8)
        same = levels.astype(np.uint8)
        hsv = cv2.LUT(hsv, np.stack([turned, same, same], axis=-1)[None])
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    def jitter(image: np.ndarray) -> np.ndarray:
        changes = [brightness, contrast, saturation, hue]
        amounts = [np.random.uniform(2 / 3, 1.5) for _ in range(3)]
        amounts.append(np.random.uniform(-0.05, 0.05))
        for i in np.random.permutation(4):
            image = changes[i](image, amounts[i])
        return image

    def window(labels: np.ndarray) -> tuple[tuple[slice, slice], tuple[int, int]]:
        """Part of the image that becomes the crop, and the size that it is resized to."""
        factor, stretch = np.random.uniform(*scale), math.sqrt(np.random.uniform(*aspect))
        factors = factor / stretch, factor * stretch
        sizes = [
            min(n, round(c / f)) for n, c, f in zip(labels.shape, crop_size, factors, strict=True)
        ]
        height, width = (
            min(c, max(1, round(n * f))) for n, c, f in zip(sizes, crop_size, factors, strict=True)
        )
        for _ in range(_TRIES):
            y, x = (np.random.randint(n - m + 1) for n, m in zip(labels.shape, sizes, strict=True))
            part = slice(y, y + sizes[0]), slice(x, x + sizes[1])
            counts = np.bincount(labels[part].ravel(), minlength=256)
            counts[ignore_label] = 0
            if counts.max() < counts.sum() * max_class_area:
                break
        return part, (width, height)

    def pad(array: np.ndarray, offset: list[int], value: int) -> np.ndarray:
        (top, left), (height, width) = offset, array.shape[:2]
        bottom, right = crop_size[0] - height - top, crop_size[1] - width - left
        border = cv2.BORDER_CONSTANT
        return cv2.copyMakeBorder(array, top, bottom, left, right, border, value=[value] * 3)

    def mapper(record: dict[str, Any]) -> dict[str, Any]:
        image = cv2.imread(record["file_name"], cv2.IMREAD_COLOR_RGB)
        labels = cv2.imread(record["sem_seg_file_name"], cv2.IMREAD_UNCHANGED)
        part, size = window(labels)
        image = cv2.resize(image[part], size, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels[part], size, interpolation=cv2.INTER_NEAREST)
        if size != crop_size[::-1]:
            offset = [
                np.random.randint(c - n + 1) for c, n in zip(crop_size, size[::-1], strict=True)
            ]
            image, labels = pad(image, offset, 0), pad(labels, offset, ignore_label)
        if np.random.uniform() < 0.5:
            image, labels = cv2.flip(image, 1), cv2.flip(labels, 1)
        image = jitter(image)
        return {
            "image": torch.from_numpy(np.stack(cv2.split(image))),
            "sem_seg": torch.from_numpy(labels.astype(np.int64)),
        }

    return mapper

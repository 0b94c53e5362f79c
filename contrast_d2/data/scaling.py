"""Random scale, padding and crop, one by one and in one step that resizes the crop's pixels alone.

Images are (H, W, 3) uint8, label maps (H, W) uint8. Every random number is drawn from numpy's
global state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, PadTransform, Transform
from PIL import Image

from .checks import checked_probability, checked_range, checked_size
from .labels import IGNORE_LABEL

# So often is a crop drawn at most, as detectron2 does.
_TRIES = 10


class RandomScale(T.Augmentation):
    """Resizes by a random factor, optionally with a random change of the aspect ratio.

    With a factor s and an aspect change a, the width is multiplied by s * sqrt(a) and the height by
    s / sqrt(a), so that a changes the shape and not the area. Images are resized bilinearly,
    labels to the nearest pixel.

    Args:
        scale: range of s, uniform.
        aspect: range of a, uniform, or None to keep the aspect ratio.

    Raises:
        ValueError: if a range is not 0 < low <= high.
    """

    def __init__(
        self, scale: Sequence[float] = (0.5, 2.0), aspect: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.scale = checked_range("scale", scale)
        self.aspect = None if aspect is None else checked_range("aspect", aspect)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a resize of the image."""
        height, width = image.shape[:2]
        return T.ResizeTransform(
            height, width, *self.draw_size(height, width), Image.Resampling.BILINEAR
        )

    def draw_size(self, height: int, width: int) -> tuple[int, int]:
        """Draws the (height, width) that an image is resized to, in pixels."""
        scale = np.random.uniform(*self.scale)
        stretch = 1.0 if self.aspect is None else math.sqrt(np.random.uniform(*self.aspect))
        return max(1, round(height * scale / stretch)), max(1, round(width * scale * stretch))


class RandomPad(T.Augmentation):
    """Pads an image that is smaller than a size, placing it at a random offset.

    Args:
        size: (height, width) in pixels that the result has at least.
        pad_value: value of the padded image pixels, 0..255.
        ignore_label: label of the padded pixels.

    Raises:
        ValueError: if size is not two positive integers, or pad_value lies outside 0..255.
    """

    def __init__(
        self, size: Sequence[int], pad_value: int = 0, ignore_label: int = IGNORE_LABEL
    ) -> None:
        super().__init__()
        if not 0 <= pad_value <= 255:
            raise ValueError(f"pad_value must lie in 0..255, got {pad_value}")
        self.size = checked_size("size", size)
        self.pad_value = pad_value
        self.ignore_label = ignore_label

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a padding of the image."""
        height, width = image.shape[:2]
        if height >= self.size[0] and width >= self.size[1]:
            return NoOpTransform()
        top, left = self.draw_offset(height, width)
        return PadTransform(
            left,
            top,
            max(0, self.size[1] - width) - left,
            max(0, self.size[0] - height) - top,
            orig_w=width,
            orig_h=height,
            pad_value=self.pad_value,
            seg_pad_value=self.ignore_label,
        )

    def draw_offset(self, height: int, width: int) -> tuple[int, int]:
        """Draws how many rows are padded above an image, and how many columns to its left."""
        extra_height, extra_width = max(0, self.size[0] - height), max(0, self.size[1] - width)
        if extra_height == 0 and extra_width == 0:
            return 0, 0
        return int(np.random.randint(extra_height + 1)), int(np.random.randint(extra_width + 1))


class ScaledCropTransform(Transform):
    """Resizes an image and cuts a window out of the result, padding what lies outside.

    The result is that of ``ResizeTransform`` with bilinear interpolation and of the crop after it:
    label maps exactly, images to within two grey levels, as `_part` says, and few pixels differ
    at all. PyTorch's filter is Pillow's, in a fifth of the time.

    Args:
        size: (height, width) of the image in pixels.
        scaled_size: (height, width) that it is resized to.
        corner: (y, x) of the window's first pixel in the resized image; negative where it begins
            in the padding. The window has to have a part of the image.
        crop_size: (height, width) of the window.
        pad_value: value of padded image pixels, 0..255.
        ignore_label: label of padded pixels.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scaled_size: tuple[int, int],
        corner: tuple[int, int],
        crop_size: tuple[int, int],
        pad_value: int = 0,
        ignore_label: int = IGNORE_LABEL,
    ) -> None:
        super().__init__()
        self.size = size
        self.scaled_size = scaled_size
        self.corner = corner
        self.crop_size = crop_size
        self.pad_value = pad_value
        self.ignore_label = ignore_label

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Resizes the window bilinearly, averaging where the image shrinks.

        Args:
            img: (H, W) or (H, W, 3) uint8.

        Raises:
            ValueError: if img is of another size or type.
        """
        self._check(img)
        if img.dtype != np.uint8 or img.shape[2:] not in ((), (3,)):
            raise ValueError(
                f"Images must be (H, W) or (H, W, 3) of uint8, got {img.shape} of {img.dtype}: "
                "convert them before this augmentation"
            )
        spans = [self._span(axis) for axis in (0, 1)]
        (rows, y, all_rows), (columns, x, all_columns) = (
            _part(*span, old, new)
            for span, old, new in zip(spans, self.size, self.scaled_size, strict=True)
        )
        # Channels last in memory, for which PyTorch's filter is the fastest.
        source = np.array(img[None, rows, columns], order="C")
        resized = torch.ops.aten._upsample_bilinear2d_aa(
            torch.from_numpy(source.reshape(*source.shape[:3], -1)).permute(0, 3, 1, 2),
            [all_rows, all_columns],
            False,
            *np.divide(self.scaled_size, self.size).tolist(),
        )
        resized = resized[0].permute(1, 2, 0).numpy().reshape(all_rows, all_columns, *img.shape[2:])
        return self._padded(resized[y, x], self.pad_value)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Resizes the window to the nearest pixel.

        Args:
            segmentation: (H, W), any type.

        Raises:
            ValueError: if it is of another size.
        """
        self._check(segmentation)
        rows, columns = (
            _nearest(old, new)[slice(*self._span(axis))]
            for axis, (old, new) in enumerate(zip(self.size, self.scaled_size, strict=True))
        )
        # Columns are slower to take than rows, so of the fewer rows.
        if self.scaled_size[0] > self.size[0]:
            first = rows[0]
            window = segmentation[first : rows[-1] + 1].take(columns, axis=1)[rows - first]
        else:
            window = segmentation[rows].take(columns, axis=1)
        return self._padded(window, self.ignore_label)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Moves (N, 2) points, x first, in pixels of the image, to pixels of the window."""
        scale = np.divide(self.scaled_size[::-1], self.size[::-1])
        return coords * scale - np.array(self.corner[::-1])

    def _check(self, array: np.ndarray) -> None:
        if array.shape[:2] != self.size:
            raise ValueError(
                f"This transform was drawn for images of {self.size} (height, width), got one of "
                f"{array.shape[:2]}"
            )

    def _span(self, axis: int) -> tuple[int, int]:
        """First and last + 1 pixel of the resized image that lie in the window."""
        last = self.corner[axis] + self.crop_size[axis]
        return max(self.corner[axis], 0), min(last, self.scaled_size[axis])

    def _padded(self, window: np.ndarray, value: int) -> np.ndarray:
        """Places what was resized where it lies in the window."""
        if window.shape[:2] == self.crop_size:
            return window
        result = np.full((*self.crop_size, *window.shape[2:]), value, dtype=window.dtype)
        top, left = (max(0, -start) for start in self.corner)
        result[top : top + window.shape[0], left : left + window.shape[1]] = window
        return result


class RandomScaledCrop(T.Augmentation):
    """Resizes by a random factor, pads at a random offset what is too small, and crops at random.

    The crop is drawn up to ten times, until it has at least two classes and none of them covers
    more than a share of its labelled pixels. Draws and result are those of RandomScale, RandomPad
    and detectron2's RandomCrop_CategoryAreaConstraint one after the other, as ScaledCropTransform
    says, but a large image is never resized as a whole.

    With `class_crop`, some crops are aware of the classes: they lie over a random pixel of a class
    that is drawn from those of the image, each as likely as the others, however few its pixels. An
    object of a pixel or two may still be lost where the image shrinks.

    Args:
        crop_size: (height, width) of the result in pixels.
        scale: range of the scale factor, uniform.
        aspect: range of the change of the aspect ratio, uniform, or None to keep it.
        max_class_area: largest share of one class in the labelled pixels of the crop, in (0, 1];
            1 accepts every crop.
        pad_value: value of padded image pixels, 0..255.
        ignore_label: label of padded pixels; it does not count as labelled.
        class_crop: probability that a crop lies over a pixel of a drawn class. Labels may be
            missing only where this is 0 and max_class_area 1.

    Raises:
        ValueError: if an argument lies outside its range.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        scale: Sequence[float] = (0.5, 2.0),
        aspect: Sequence[float] | None = None,
        max_class_area: float = 1.0,
        pad_value: int = 0,
        ignore_label: int = IGNORE_LABEL,
        class_crop: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < max_class_area <= 1:
            raise ValueError(f"max_class_area must lie in (0, 1], got {max_class_area}")
        self.crop_size = checked_size("crop_size", crop_size)
        self.scale = RandomScale(scale, aspect)
        self.pad = RandomPad(crop_size, pad_value, ignore_label)
        self.max_class_area = max_class_area
        self.class_crop = checked_probability("class_crop", class_crop)

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None) -> Transform:
        """Draws a window.

        Raises:
            ValueError: if classes play a part and there are no labels.
        """
        if sem_seg is None and (self.max_class_area < 1 or self.class_crop > 0):
            raise ValueError(
                f"max_class_area {self.max_class_area} and class_crop {self.class_crop} need "
                "labels: set them to 1 and 0 to crop images that have none"
            )
        size = image.shape[:2]
        scaled_size = self.scale.draw_size(*size)
        offset = self.pad.draw_offset(*scaled_size)
        room = np.maximum(scaled_size, self.crop_size) - self.crop_size
        by_class = self.class_crop > 0 and np.random.uniform() < self.class_crop
        for _ in range(_TRIES):
            first, last = np.zeros(2, dtype=int), room
            pixel = self._draw_class_pixel(sem_seg) if by_class else None  # pyright: ignore[reportArgumentType]
            if pixel is not None:
                # Where there is padding there is no room, and its offset plays no part.
                moved = (2 * pixel + 1) * scaled_size // (2 * np.array(size))
                first, last = np.maximum(moved - self.crop_size + 1, 0), np.minimum(moved, room)
            y, x = (int(np.random.randint(a, b + 1)) for a, b in zip(first, last, strict=True))
            transform = ScaledCropTransform(
                size,
                scaled_size,
                (y - offset[0], x - offset[1]),
                self.crop_size,
                self.pad.pad_value,
                self.pad.ignore_label,
            )
            if self.max_class_area == 1 or self._is_mixed(transform.apply_segmentation(sem_seg)):  # pyright: ignore[reportArgumentType]
                break
        return transform

    def _draw_class_pixel(self, labels: np.ndarray) -> np.ndarray | None:
        """Draws a class of the (H, W) uint8 labels and a pixel (y, x) of it; None without any."""
        classes = np.flatnonzero(self._counts(labels))
        if len(classes) == 0:
            return None
        drawn = classes[np.random.randint(len(classes))]
        pixels = np.flatnonzero(labels == drawn)
        return np.array(divmod(int(pixels[np.random.randint(len(pixels))]), labels.shape[1]))

    def _is_mixed(self, labels: np.ndarray) -> bool:
        """Whether no class of the (H, W) uint8 labels covers too much."""
        counts = self._counts(labels)
        return counts.max() < counts.sum() * self.max_class_area

    def _counts(self, labels: np.ndarray) -> np.ndarray:
        """(256,) pixels of each class in (H, W) uint8 labels."""
        flat = labels.ravel()
        # As four channels, which Pillow counts side by side: a quarter of the time of bincount.
        fours = flat.size // 4
        image = Image.frombuffer("CMYK", (fours, 1), flat[: 4 * fours], "raw", "CMYK", 0, 1)
        counts = np.reshape(image.histogram(), (4, 256)).sum(axis=0)
        counts += np.bincount(flat[4 * fours :], minlength=256)
        counts[self.pad.ignore_label] = 0
        return counts


def _part(first: int, last: int, old: int, new: int) -> tuple[slice, slice, int]:
    """A part of an axis that gives pixels first..last - 1 when it is resized by itself.

    It begins where a resized pixel begins with one of the old ones, to within 1/256 of the larger
    of both: that changes no value by a grey level.

    Args:
        first, last: pixels of the resized axis.
        old, new: pixels of the axis before and after.

    Returns:
        The part, where in the resized part the pixels are, and its size.
    """
    ratio = old / new
    # Bilinear interpolation reaches over so many old pixels beyond the centre of a resized one.
    reach = max(1.0, ratio)
    begins = np.arange(max(0, first - math.ceil(reach / ratio)), -1, -1)
    off = abs(begins * ratio - (begins * ratio).round())
    begin = int(begins[np.argmax(off <= reach / 256)])
    part = slice(round(begin * ratio), min(old, math.ceil(last * ratio + reach)))
    size = last - begin
    # PyTorch does not filter where the size stays, so that one pixel more is asked for. At the end
    # of the axis there is none, nor need for it: nothing is then off by 1/256.
    if size == part.stop - part.start and last < new:
        size += 1
    return part, slice(first - begin, last - begin), size


def _nearest(old: int, new: int) -> np.ndarray:
    """The pixel of `old` ones that Pillow's nearest-neighbour resize takes for each of `new` ones.

    Pillow adds the step up in float64; so does this, for the same choice where two are as near.
    """
    if old == new:
        return np.arange(old)
    steps = np.full(new, old / new)
    steps[0] *= 0.5
    return np.add.accumulate(steps).astype(np.intp)

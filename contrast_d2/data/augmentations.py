"""The augmentations of semantic segmentation, as detectron2 Augmentations.

Images are (H, W, 3) uint8, RGB, 0..255; label maps are (H, W) uint8. Every random number is drawn
from numpy's global state, detectron2's convention, so that seeding it fixes the sample.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, PadTransform, Transform
from PIL import Image, ImageFilter
from torchvision.transforms import functional as tvf

from .labels import IGNORE_LABEL


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
        self.scale = _checked_range("scale", scale)
        self.aspect = None if aspect is None else _checked_range("aspect", aspect)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a resize of the image."""
        height, width = image.shape[:2]
        scale = np.random.uniform(*self.scale)
        stretch = 1.0 if self.aspect is None else math.sqrt(np.random.uniform(*self.aspect))
        new_height = max(1, round(height * scale / stretch))
        new_width = max(1, round(width * scale * stretch))
        return T.ResizeTransform(height, width, new_height, new_width, Image.BILINEAR)


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
        self.size = _checked_size("size", size)
        self.pad_value = pad_value
        self.ignore_label = ignore_label

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a padding of the image."""
        height, width = image.shape[:2]
        extra_height, extra_width = max(0, self.size[0] - height), max(0, self.size[1] - width)
        if extra_height == 0 and extra_width == 0:
            return NoOpTransform()
        top = np.random.randint(extra_height + 1)
        left = np.random.randint(extra_width + 1)
        return PadTransform(
            left,
            top,
            extra_width - left,
            extra_height - top,
            orig_w=width,
            orig_h=height,
            pad_value=self.pad_value,
            seg_pad_value=self.ignore_label,
        )


class ReflectPad(T.Augmentation):
    """Pads an image to multiples of a number, mirroring it and its labels at the edges.

    Args:
        multiple: what height and width become multiples of, in pixels. An odd row or column of
            padding goes to the bottom or right.

    Raises:
        ValueError: if multiple is no positive integer.
    """

    def __init__(self, multiple: int) -> None:
        super().__init__()
        if int(multiple) != multiple or multiple < 1:
            raise ValueError(f"multiple must be a positive integer, got {multiple}")
        self.multiple = int(multiple)

    def get_transform(self, image: np.ndarray) -> Transform:
        """The padding of the image; nothing is drawn."""
        pads = [(-size % self.multiple) for size in image.shape[:2]]
        if pads == [0, 0]:
            return NoOpTransform()
        return ReflectPadTransform(*((pad // 2, pad - pad // 2) for pad in pads))


class ReflectPadTransform(Transform):
    """Mirrors pixels and labels at the edges; the outermost pixels are not repeated.

    Args:
        rows: number of rows to add at top and bottom.
        columns: number of columns to add at left and right.
    """

    def __init__(self, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Pads an image (H, W) or (H, W, C), and label maps alike."""
        channels = [(0, 0)] * (img.ndim - 2)
        return np.pad(img, [self.rows, self.columns, *channels], mode="reflect")

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Moves (N, 2) points (x, y) along with the image."""
        return coords + np.array([self.columns[0], self.rows[0]], dtype=coords.dtype)


class RandomGaussianBlur(T.Augmentation):
    """Blurs some images.

    Args:
        probability: of a blur, in 0..1.
        radius: range of the standard deviation of the Gaussian in pixels, uniform.

    Raises:
        ValueError: if probability lies outside 0..1, or radius is not 0 < low <= high.
    """

    def __init__(self, probability: float, radius: Sequence[float]) -> None:
        super().__init__()
        self.probability = _checked_probability("probability", probability)
        self.radius = _checked_range("radius", radius)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a blur of the image, or none."""
        if np.random.uniform() >= self.probability:
            return NoOpTransform()
        blur = ImageFilter.GaussianBlur(np.random.uniform(*self.radius))
        return T.PILColorTransform(lambda pil_image: pil_image.filter(blur))


class ColorJitter(T.Augmentation):
    """Changes brightness, contrast, saturation and hue, in random order, of an RGB uint8 image.

    Args:
        brightness, contrast, saturation: range of the factor, uniform; 1 changes nothing.
        hue: largest shift of the hue, as a part of the colour circle in 0..0.5.

    Raises:
        ValueError: if a range is not 0 < low <= high, or hue lies outside 0..0.5.
    """

    def __init__(
        self,
        brightness: Sequence[float] = (2 / 3, 1.5),
        contrast: Sequence[float] = (2 / 3, 1.5),
        saturation: Sequence[float] = (2 / 3, 1.5),
        hue: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue must lie in 0..0.5, got {hue}")
        self.brightness = _checked_range("brightness", brightness)
        self.contrast = _checked_range("contrast", contrast)
        self.saturation = _checked_range("saturation", saturation)
        self.hue = hue

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a change of the colours."""
        changes = [
            (tvf.adjust_brightness, np.random.uniform(*self.brightness)),
            (tvf.adjust_contrast, np.random.uniform(*self.contrast)),
            (tvf.adjust_saturation, np.random.uniform(*self.saturation)),
            (tvf.adjust_hue, np.random.uniform(-self.hue, self.hue)),
        ]
        order = np.random.permutation(len(changes))

        def apply(pil_image: Image.Image) -> Image.Image:
            for i in order:
                adjust, amount = changes[i]
                pil_image = adjust(pil_image, amount)
            return pil_image

        return T.PILColorTransform(apply)


def train_augmentations(
    crop_size: Sequence[int],
    *,
    short_side: int | None = None,
    scale: Sequence[float] = (0.5, 2.0),
    aspect: Sequence[float] | None = (0.9, 1.1),
    max_class_area: float = 0.75,
    flip: float = 0.5,
    jitter: bool = True,
    pad_value: int = 0,
    ignore_label: int = IGNORE_LABEL,
) -> list[T.Augmentation]:
    """The training augmentations of multi- and cross-scale contrast.

    Random scale, padding at a random offset, a crop that is drawn up to 10 times until no class
    covers more than a share of its labelled pixels, horizontal flip, colour jitter.

    Args:
        crop_size: (height, width) of the result in pixels.
        short_side: what the shorter side of every image is resized to before the random scale, in
            pixels, or None to start from the image's own size.
        scale: range of the scale factor.
        aspect: range of the change of the aspect ratio, or None to keep it.
        max_class_area: largest share of one class in the labelled pixels of the crop, in (0, 1];
            1 accepts every crop.
        flip: probability of the horizontal flip.
        jitter: whether colours are changed.
        pad_value: value of padded image pixels, 0..255.
        ignore_label: label of padded pixels; these do not count as labelled.

    Returns:
        The augmentations, in order.

    Raises:
        ValueError: if an argument lies outside its range.

    Reference: Pissas et al., "Multi-scale and Cross-scale Contrastive Learning for Semantic
        Segmentation", ECCV 2022, training settings.
    """
    crop_size = _checked_size("crop_size", crop_size)
    if not 0 < max_class_area <= 1:
        raise ValueError(f"max_class_area must lie in (0, 1], got {max_class_area}")
    _checked_probability("flip", flip)
    augmentations: list[T.Augmentation] = [
        RandomScale(scale, aspect),
        RandomPad(crop_size, pad_value, ignore_label),
        T.RandomCrop_CategoryAreaConstraint(
            "absolute",
            crop_size,
            single_category_max_area=max_class_area,
            ignored_category=ignore_label,
        ),
        T.RandomFlip(flip),
    ]
    if short_side is not None:
        if int(short_side) != short_side or short_side < 1:
            raise ValueError(f"short_side must be a positive integer or None, got {short_side}")
        augmentations.insert(0, T.ResizeShortestEdge(int(short_side), max_size=sys.maxsize))
    if jitter:
        augmentations.append(ColorJitter())
    return augmentations


def full_frame_augmentations(
    *,
    multiple: int = 32,
    flip: float = 0.5,
    blur: float = 0.05,
    blur_radius: Sequence[float] = (3.0, 6.0),
) -> list[T.Augmentation]:
    """The training augmentations of CaDIS, whose frames are neither scaled nor cropped.

    Mirroring at the edges to a size that the network divides (540x960 to 544x960), horizontal
    flip, rare Gaussian blur, colour jitter.

    Args:
        multiple: what height and width become multiples of.
        flip: probability of the horizontal flip.
        blur: probability of the blur.
        blur_radius: range of its standard deviation in pixels.

    Returns:
        The augmentations, in order.

    Raises:
        ValueError: if an argument lies outside its range.

    Reference: Pissas et al., "Effective Semantic Segmentation in Cataract Surgery: What Matters
        Most?", MICCAI 2021, training settings of its release.
    """
    return [
        ReflectPad(multiple),
        T.RandomFlip(_checked_probability("flip", flip)),
        RandomGaussianBlur(blur, blur_radius),
        ColorJitter(),
    ]


def _checked_range(name: str, value: Sequence[float]) -> tuple[float, float]:
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} must be a range (low, high) with 0 < low <= high, got {value}")
    return float(value[0]), float(value[1])


def _checked_probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability and must lie in 0..1, got {value}")
    return float(value)


def _checked_size(name: str, value: Sequence[int]) -> tuple[int, int]:
    if len(value) != 2 or any(int(v) != v or v < 1 for v in value):
        raise ValueError(f"{name} must be (height, width), two positive integers, got {value}")
    return int(value[0]), int(value[1])

"""The augmentations of semantic segmentation, as detectron2 Augmentations.

Images are (H, W, 3) uint8, RGB, 0..255; label maps are (H, W) uint8. Every random number is drawn
from numpy's global state, detectron2's convention, so that seeding it fixes the sample.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform
from PIL import ImageFilter

from .checks import checked_probability, checked_range
from .colors import ColorJitter
from .labels import IGNORE_LABEL
from .scaling import RandomScaledCrop


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
        self.probability = checked_probability("probability", probability)
        self.radius = checked_range("radius", radius)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a blur of the image, or none."""
        if np.random.uniform() >= self.probability:
            return NoOpTransform()
        blur = ImageFilter.GaussianBlur(np.random.uniform(*self.radius))
        return T.PILColorTransform(lambda pil_image: pil_image.filter(blur))


def train_augmentations(
    crop_size: Sequence[int],
    *,
    short_side: int | None = None,
    scale: Sequence[float] = (0.5, 2.0),
    aspect: Sequence[float] | None = (0.9, 1.1),
    max_class_area: float = 0.75,
    class_crop: float = 0.0,
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
        class_crop: probability that a crop lies over a pixel of a class drawn from those of the
            image; 0 in the paper.
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
    checked_probability("flip", flip)
    augmentations: list[T.Augmentation] = [
        RandomScaledCrop(
            crop_size, scale, aspect, max_class_area, pad_value, ignore_label, class_crop
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
        T.RandomFlip(checked_probability("flip", flip)),
        RandomGaussianBlur(blur, blur_radius),
        ColorJitter(),
    ]

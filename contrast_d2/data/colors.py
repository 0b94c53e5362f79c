"""Random changes of colour.

Images are (H, W, 3) uint8, RGB, 0..255. H, W: height and width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform
from PIL import Image, ImageStat
from torchvision.transforms import functional as tvf

from .checks import checked_range

# The hue is changed in blocks of about so many pixels, whose intermediate values fit in a cache.
_BLOCK = 1 << 15


class ColorJitter(T.Augmentation):
    """Changes brightness, contrast, saturation and hue, in random order, of an RGB uint8 image.

    The changes are torchvision's, to the bit for the first three. The shift of the hue is that of
    `shift_hue`, which is nearer to the exact one.

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
        self.brightness = checked_range("brightness", brightness)
        self.contrast = checked_range("contrast", contrast)
        self.saturation = checked_range("saturation", saturation)
        self.hue = hue

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draws a change of the colours."""
        changes = [
            (_adjust_brightness, np.random.uniform(*self.brightness)),
            (_adjust_contrast, np.random.uniform(*self.contrast)),
            (tvf.adjust_saturation, np.random.uniform(*self.saturation)),
            (_adjust_hue, np.random.uniform(-self.hue, self.hue)),
        ]
        order = np.random.permutation(len(changes))

        def apply(pil_image: Image.Image) -> Image.Image:
            for i in order:
                adjust, amount = changes[i]
                pil_image = adjust(pil_image, amount)
            return pil_image

        return T.PILColorTransform(apply)


def shift_hue(image: np.ndarray, shift: float) -> np.ndarray:
    """Turns the hue of every pixel, keeping its saturation and value.

    With a pixel's largest channel V, its smallest one v and chroma C = V - v, the hue in steps of
    60 degrees moves one channel between v and V at a time: a turn by 60 degrees makes each channel
    V + v minus the next one, and one by t <= 1/2 steps moves each as far as the next one is from
    the interval [v + t C, V - t C]. No hue is computed and nothing is divided, so integers do, and
    the result is within one grey level of the exact one. Pillow's hues are 256 steps of the
    circle, with which channels are off by several levels.

    Args:
        image: (H, W, 3) uint8, RGB.
        shift: part of the colour circle, -0.5..0.5; positive from red to green.

    Returns:
        (H, W, 3) uint8.
    """
    turns = round(6 * shift)
    rest = 6 * shift - turns
    result = np.empty_like(image, order="C")
    rows = max(1, _BLOCK // image.shape[1])
    for y in range(0, len(image), rows):
        # One copy, into whole planes, of which each operation below takes one.
        channels = image[y : y + rows].transpose(2, 0, 1).astype(np.int16, order="C")
        _turn(channels, turns, rest, result[y : y + rows])
    return result


def _turn(channels: np.ndarray, turns: int, rest: float, result: np.ndarray) -> None:
    """Turns the hue of (3, H, W) int16 channels by `turns + rest` times 60 degrees."""
    high = channels.max(axis=0)
    low = channels.min(axis=0)
    turned = [channels[(i + turns) % 3] for i in range(3)]
    if turns % 2:
        turned = [high + low - channel for channel in turned]
    # At most 255 * 128 + 127: the largest int16.
    reach = ((high - low) * np.int16(round(abs(rest) * 256)) + np.int16(127)) >> 8
    begin, end = low + reach, high - reach
    for i, channel in enumerate(turned):
        following = turned[(i + (1 if rest > 0 else -1)) % 3]
        moved = np.maximum(following, begin)
        np.minimum(moved, end, out=moved)
        moved -= following
        moved += channel
        np.maximum(moved, low, out=moved)
        np.minimum(moved, high, out=moved)
        result[..., i] = moved


def _adjust_hue(image: Image.Image, shift: float) -> Image.Image:
    return Image.fromarray(shift_hue(np.asarray(image), shift))


def _adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    return _blend(image, 0, factor)


def _adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    mean = ImageStat.Stat(image.convert("L")).mean[0]
    return _blend(image, int(mean + 0.5), factor)


def _blend(image: Image.Image, grey: int, factor: float) -> Image.Image:
    """Mixes an image with one grey level, which takes one look-up for each value."""
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    table = Image.blend(Image.new("L", levels.size, grey), levels, factor)
    return image.point(list(table.tobytes()) * len(image.getbands()))

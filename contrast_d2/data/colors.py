"""Random changes of colour.

Images are (H, W, 3) uint8, RGB, 0..255. H, W: height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from .checks import checked_range

# Colours are changed in blocks of about so many pixels, whose intermediate values fit in a cache.
_BLOCK = 1 << 15
# What a pixel's channels add to its grey, of 256.
_GREY = (77, 150, 29)

# Takes the (3, R, W) int16 channels of some rows, which it may overwrite, and returns others.
_Change = Callable[..., np.ndarray]


class ColorJitter(T.Augmentation):
    """Changes brightness, contrast, saturation and hue, in random order, of an RGB uint8 image.

    The first three are torchvision's `adjust_brightness` and so on, each to within two grey levels.
    The shift of the hue is that of `shift_hue`. The result's planes lie one after the other in
    memory, as a network's input has them.

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
        brightness, contrast, saturation = (
            np.random.uniform(*limits)
            for limits in (self.brightness, self.contrast, self.saturation)
        )
        hue = np.random.uniform(-self.hue, self.hue)
        order = np.random.permutation(4).tolist()

        def apply(pixels: np.ndarray) -> np.ndarray:
            planes = _planes(pixels)
            changes: list[_Change] = [
                partial(_scale_brightness, factor=brightness),
                partial(_scale_contrast, factor=contrast),
                partial(_scale_saturation, factor=saturation),
                partial(_turn_hue, shift=hue),
            ]
            at_contrast = order.index(1)
            _change(planes, [changes[i] for i in order[:at_contrast]])
            changes[1] = partial(changes[1], grey=_mean_grey(planes))
            _change(planes, [changes[i] for i in order[at_contrast:]])
            return planes.transpose(1, 2, 0)

        return T.ColorTransform(apply)


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
    planes = _planes(image)
    _change(planes, [partial(_turn_hue, shift=shift)])
    return planes.transpose(1, 2, 0)


def _planes(image: np.ndarray) -> np.ndarray:
    """A copy of an (H, W, 3) image, as (3, H, W)."""
    return np.array(image.transpose(2, 0, 1), order="C")


def _change(planes: np.ndarray, changes: Sequence[_Change]) -> None:
    """Applies changes to (3, H, W) uint8 planes, block by block."""
    rows = max(1, _BLOCK // planes.shape[2])
    for y in range(0, planes.shape[1] if changes else 0, rows):
        channels = planes[:, y : y + rows].astype(np.int16)
        for change in changes:
            channels = change(channels)
        planes[:, y : y + rows] = channels


def _mean_grey(planes: np.ndarray) -> int:
    means = planes.sum(axis=1, dtype=np.uint32).sum(axis=1) / planes[0].size
    return int(np.dot(means, _GREY) / 256 + 0.5)


def _scale_brightness(channels: np.ndarray, factor: float) -> np.ndarray:
    return _stretch(channels, channels, factor)


def _scale_contrast(channels: np.ndarray, grey: int, factor: float) -> np.ndarray:
    return _stretch(channels, channels - np.int16(grey), factor)


def _scale_saturation(channels: np.ndarray, factor: float) -> np.ndarray:
    red, green, blue = channels.view(np.uint16)
    grey = red * np.uint16(_GREY[0])  # the sum is at most 255 * 256 + 128
    grey += green * np.uint16(_GREY[1])
    grey += blue * np.uint16(_GREY[2])
    grey += np.uint16(128)
    grey >>= 8
    return _stretch(channels, channels - grey.view(np.int16), factor)


def _stretch(channels: np.ndarray, distances: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies distances, which are part of the channels, rounding down as Pillow does."""
    amount = round((factor - 1) * 256)
    # At most 255 * 128: the largest int16.
    change = distances * (np.int16 if abs(amount) <= 128 else np.int32)(amount)
    change >>= 8
    channels += change
    if factor > 1:
        channels.clip(0, 255, out=channels)
    return channels


def _turn_hue(channels: np.ndarray, shift: float) -> np.ndarray:
    turns = round(6 * shift)
    rest = 6 * shift - turns
    high = channels.max(axis=0)
    low = channels.min(axis=0)
    turned = np.roll(channels, -turns, axis=0) if turns else channels
    if turns % 2:
        turned = high + low - turned
    # At most 255 * 128 + 127: the largest int16.
    reach = ((high - low) * np.int16(round(abs(rest) * 256)) + np.int16(127)) >> 8
    begin, end = low + reach, high - reach
    result = np.empty_like(channels)
    for i, moved in enumerate(result):
        following = turned[(i + (1 if rest > 0 else -1)) % 3]
        np.maximum(following, begin, out=moved)
        np.minimum(moved, end, out=moved)
        moved -= following
        moved += turned[i]
        np.maximum(moved, low, out=moved)
        np.minimum(moved, high, out=moved)
    return result

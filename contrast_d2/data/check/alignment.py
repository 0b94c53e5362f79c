"""Whether labels lie on the image that they are for.

Where two classes meet, images change. The mean change of an image under the boundaries of its
labels is therefore higher than under the same boundaries moved elsewhere. All moves are tried at
once by the Fourier transform, cyclically, so that labels that wrap around are found as well.

The papers of the datasets do not describe such a check; it and its constants are ours. Over the
701 label files of CamVid (480x360), the one that is known to be shifted has its peak at the shift
that is known, 11.2 standard deviations high, and 1.7 at no shift. Of the 700 others each has its
peak within 3 pixels of no shift, 5.7 standard deviations high or more.

H, W: height and width of an image. h, w: those at which it is looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

# Larger images are reduced to it. Annotators are not more precise than that.
_LONG_SIDE = 512
# Shifts up to it, in reduced pixels, are the precision of annotation.
_TOLERANCE = 3
# The window in which changes are compared: textures would else outweigh the boundaries.
_WINDOW = 31
# Grey values by which noise is kept down in even windows.
_FLOOR = 2.0
# Pixels of boundary (reduced) under which a mean means nothing.
_FEWEST_PIXELS = 100
# Standard deviations over all shifts that a peak must reach, and its lead over no shift. Noise has
# peaks of 4 to 5, since it has some hundred thousand tries.
_PEAK, _LEAD = 6.0, 3.0
# How far outside the dataset's habit a lead must be, in robust standard deviations, and from how
# many images on there is a habit.
_HABIT, _FEWEST_IMAGES = 3.0, 10


class Alignment(NamedTuple):
    """How well labels fit their image where they are, and where they would fit best."""

    here: float
    """The highest score within the tolerance of no shift, in standard deviations over all shifts
    above their mean."""
    elsewhere: float
    """The highest score at any other shift."""
    shift: tuple[int, int]
    """By how many pixels of the image (down, right) the labels must move to get there."""

    @property
    def lead(self) -> float:
        """By how much another place is better; negative where labels fit."""
        return self.elsewhere - self.here


def measure_alignment(gray: np.ndarray, classes: np.ndarray) -> Alignment | None:
    """Compares the changes of an image with the boundaries of its labels, over all shifts.

    Args:
        gray: (H, W) uint8 of the image.
        classes: (H, W) integers, class ids; negative where there is no label.

    Returns:
        The comparison, or None where there is too little boundary or no change in the image.
    """
    gray, classes, factor = _reduce(gray, classes)
    edges = _boundaries(classes, classes >= 0)
    if _pixels(edges) < _FEWEST_PIXELS:
        # Some datasets draw void around every object. Elsewhere it is best left out: it is noisy.
        edges = _boundaries(classes, np.ones(classes.shape, dtype=bool))
    if _pixels(edges) < _FEWEST_PIXELS:
        return None
    spectrum = 0.0
    for change, edge in zip(_changes(gray), edges, strict=True):
        spectrum = spectrum + np.fft.rfft2(change) * np.conj(np.fft.rfft2(edge))
    scores = np.fft.irfft2(spectrum, s=gray.shape)
    spread = scores.std()
    if not spread > 1e-6:
        return None
    scores = (scores - scores.mean()) / spread
    return _peaks(scores, factor)


def misaligned(measured: Sequence[Alignment]) -> list[bool]:
    """Which labels lie elsewhere than their image, given those of the whole dataset.

    Args:
        measured: one for each image.

    Returns:
        For each, whether another place is clearly better than where it is: by itself, and against
        the habit of the dataset where there are enough images to have one.
    """
    if not measured:
        return []
    leads = np.array([each.lead for each in measured])
    clear = (leads >= _LEAD) & (np.array([each.elsewhere for each in measured]) >= _PEAK)
    # A dataset that is shifted as a whole is in the habit of it: this is for single ones.
    if len(leads) >= _FEWEST_IMAGES and clear.mean() <= 0.5:
        median = np.median(leads)
        spread = 1.4826 * np.median(abs(leads - median))  # of a normal distribution, if it is one
        clear &= leads - median > _HABIT * spread
    return clear.tolist()


def _reduce(gray: np.ndarray, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Both at (h, w), and how many pixels one of them was."""
    height, width = gray.shape
    factor = max(1.0, max(height, width) / _LONG_SIDE)
    if factor == 1.0:
        return gray.astype(np.float32), classes, factor
    h, w = max(1, round(height / factor)), max(1, round(width / factor))
    small = Image.fromarray(gray).resize((w, h), Image.Resampling.BOX)
    rows = ((np.arange(h) + 0.5) * height / h).astype(int)
    columns = ((np.arange(w) + 0.5) * width / w).astype(int)
    return np.asarray(small, dtype=np.float32), classes[rows[:, None], columns], factor


def _changes(gray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Change to the left and to the upper neighbour, relative to the surroundings, mean 0."""
    across, down = np.zeros_like(gray), np.zeros_like(gray)
    across[:, 1:] = abs(np.diff(gray, axis=1))
    down[1:] = abs(np.diff(gray, axis=0))
    relative = (change / (_window_mean(change) + _FLOOR) for change in (across, down))
    across, down = (change - change.mean() for change in relative)
    return across, down


def _pixels(edges: tuple[np.ndarray, np.ndarray]) -> int:
    return sum(int(edge.sum()) for edge in edges)


def _boundaries(classes: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where two values meet on the left and above, both of them in valid pixels."""
    across, down = np.zeros(classes.shape, np.float32), np.zeros(classes.shape, np.float32)
    across[:, 1:] = (classes[:, 1:] != classes[:, :-1]) & valid[:, 1:] & valid[:, :-1]
    down[1:] = (classes[1:] != classes[:-1]) & valid[1:] & valid[:-1]
    return across, down


def _window_mean(values: np.ndarray) -> np.ndarray:
    """Mean over a square window around each pixel, the borders repeated."""
    half = _WINDOW // 2
    for axis in (0, 1):
        padding = [(0, 0), (0, 0)]
        padding[axis] = (half + 1, half)
        # float64: differences of long sums
        sums = np.cumsum(np.pad(values, padding, "edge"), axis=axis, dtype=np.float64)
        high, low = [slice(None)] * 2, [slice(None)] * 2
        high[axis], low[axis] = slice(_WINDOW, None), slice(None, -_WINDOW)
        values = (sums[tuple(high)] - sums[tuple(low)]) / _WINDOW
    return values


def _peaks(scores: np.ndarray, factor: float) -> Alignment:
    """The highest of cyclic scores near no shift and elsewhere."""
    height, width = scores.shape
    near = np.zeros(scores.shape, dtype=bool)
    close = np.arange(-_TOLERANCE, _TOLERANCE + 1)
    near[np.ix_(close % height, close % width)] = True
    elsewhere = np.where(near, -np.inf, scores)
    down, right = np.unravel_index(int(elsewhere.argmax()), scores.shape)
    # The second half of a cyclic range stands for negative shifts.
    down = int(down) - height * (down > height // 2)
    right = int(right) - width * (right > width // 2)
    shift = round(down * factor), round(right * factor)
    return Alignment(float(scores[near].max()), float(elsewhere.max()), shift)

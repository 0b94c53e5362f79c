"""Where two predictions of an image differ, and which of them is right there.

Shape letters: H W the image, R regions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

FIRST, SECOND, NEITHER = "first", "second", "neither"

_MOST_REGIONS = 8


class Region(NamedTuple):
    """A box around pixels that two predictions give to different classes."""

    top: int
    left: int
    bottom: int
    """The row below the last one."""
    right: int
    """The column behind the last one."""
    pixels: int
    """How many pixels of the box differ and belong to what it is drawn around."""
    better: str | None
    """FIRST or SECOND: the prediction that is right in more than half of those of them that are
    labelled; NEITHER; None without ground truth, or where no such pixel is labelled."""


class Agreement(NamedTuple):
    """Shares of an image."""

    differing: float
    """Of all pixels, those that the predictions give to different classes, 0..1."""
    first: float
    """Of the labelled pixels that differ, those that the first prediction has right, 0..1; nan
    without such pixels."""
    second: float
    """Likewise of the second."""


def agreement(
    first: np.ndarray, second: np.ndarray, labels: np.ndarray | None, ignore_label: int = 255
) -> Agreement:
    """Counts where two predictions differ.

    Args:
        first, second: (H, W) class ids.
        labels: (H, W) class ids or `ignore_label`; None where they are not known.
        ignore_label: label of the pixels that count for neither.

    Raises:
        ValueError: the sizes differ.
    """
    _check_sizes(first, second, labels)
    differs = first != second
    if labels is None:
        return Agreement(float(differs.mean()), float("nan"), float("nan"))
    scored = differs & (labels != ignore_label)
    count = scored.sum() or float("nan")
    right = [float((p == labels)[scored].sum() / count) for p in (first, second)]
    return Agreement(float(differs.mean()), *right)


def differing_regions(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    ignore_label: int = 255,
    least_area: float = 0.004,
    least_width: float = 0.02,
) -> list[Region]:
    """Finds the regions in which two predictions differ, the largest first.

    Seams along the boundaries of objects are left out: only what remains of the differing pixels
    after an opening by a square counts. The connected components of this that are large enough get
    a box each; boxes that overlap become one.

    Args:
        first, second: (H, W) class ids.
        labels: (H, W) class ids or `ignore_label`; None where they are not known.
        ignore_label: label of the pixels that count for neither.
        least_area: of a component, as a part of the image, 0..1.
        least_width: side of the square, as a part of the shorter side of the image, 0..1; it is
            rounded to an odd number of pixels.

    Returns:
        At most eight regions.

    Raises:
        ValueError: the sizes differ, a limit is not in 0..1, or scipy is not installed.
    """
    _check_sizes(first, second, labels)
    for name, value in (("least_area", least_area), ("least_width", least_width)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value} is a part of the image and must lie in 0..1")
    ndimage = _ndimage()
    differs = first != second
    side = 2 * (round(least_width * min(differs.shape)) // 2) + 1
    # An opening in two filters, each of which goes along rows, then columns: far faster than one by
    # a square. Beyond the border all differs, so that regions may touch it.
    eroded = ndimage.minimum_filter(differs.astype(np.uint8), side, mode="constant", cval=1)
    solid = ndimage.maximum_filter(eroded, side, mode="constant", cval=0).astype(bool)
    # Diagonal neighbours are connected.
    components, _ = ndimage.label(solid, np.ones((3, 3)))
    sizes = np.bincount(components.ravel())
    boxes = [
        [rows.start, columns.start, rows.stop, columns.stop]
        for i, (rows, columns) in enumerate(ndimage.find_objects(components), start=1)
        if sizes[i] >= least_area * differs.size
    ]
    regions = [_region(box, solid, first, second, labels, ignore_label) for box in _merged(boxes)]
    return sorted(regions, key=lambda r: (-r.pixels, r))[:_MOST_REGIONS]


def _merged(boxes: list[list[int]]) -> list[list[int]]:
    """Joins boxes until none overlap."""
    merged: list[list[int]] = []
    waiting = list(boxes)
    while waiting:
        box = waiting.pop()
        touching = [other for other in merged if _overlap(box, other)]
        if touching:
            # The joined box may reach others: it is looked at again.
            merged = [other for other in merged if other not in touching]
            corners = np.array([box, *touching])
            waiting.append([*corners[:, :2].min(axis=0), *corners[:, 2:].max(axis=0)])
        else:
            merged.append(box)
    return merged


def _overlap(a: list[int], b: list[int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _region(
    box: list[int],
    solid: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray | None,
    ignore_label: int,
) -> Region:
    top, left, bottom, right = (int(x) for x in box)
    window = np.s_[top:bottom, left:right]
    inside = solid[window]
    better = None
    if labels is not None:
        scored = inside & (labels[window] != ignore_label)
        if scored.any():
            right_of = {
                name: (prediction[window] == labels[window])[scored].mean()
                for name, prediction in ((FIRST, first), (SECOND, second))
            }
            better = next((name for name, share in right_of.items() if share > 0.5), NEITHER)
    return Region(top, left, bottom, right, int(inside.sum()), better)


def _check_sizes(first: np.ndarray, second: np.ndarray, labels: np.ndarray | None) -> None:
    maps = {"first": first, "second": second, "labels": labels}
    sizes = {name: array.shape for name, array in maps.items() if array is not None}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"sizes (height, width) differ: {sizes}; resize them to the image first")


def _ndimage() -> Any:
    try:
        from scipy import ndimage
    except ImportError as error:
        raise ValueError(
            "boxes around differences need scipy: pip install scipy, or install with the extra "
            "[demo]."
        ) from error
    return ndimage

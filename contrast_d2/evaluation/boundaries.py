"""Scores of a segmentation near the boundaries of its regions.

All classes are treated at once, on label maps: a pixel is near a boundary of its own region if the
square window around it holds another label. That is the erosion of each class's mask by the window.

Shape letters: K classes, H W, T widths of a band.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .measure import Measure
from .metrics import (
    AbsentClasses,
    count_pairs,
    mean_over_classes,
    ratio_of_present,
    segmentation_scores,
)


def near_other_label(labels_HW: Tensor, distance: int) -> Tensor:
    """Whether another label lies within a distance of each pixel, as a chessboard measures it.

    Equal to as many erosions of each label's mask by 3x3 pixels as the distance says, at the cost
    of a few passes that grows with the logarithm of the distance.

    Args:
        labels_HW: (H, W) integers. What lies beyond the border of the image is no label.
        distance: in pixels, at least 1.

    Returns:
        (H, W) bool.
    """
    highest = _window_extremum(labels_HW, distance, torch.maximum)
    return highest != _window_extremum(labels_HW, distance, torch.minimum)


def _window_extremum(
    values_HW: Tensor, distance: int, extremum: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Extremum of the pixels within the distance, along columns and then along rows."""
    for _ in range(2):
        height = len(values_HW)
        # Repeated pixels of the border add nothing to windows that reach beyond it.
        rows = torch.arange(-distance, height + distance, device=values_HW.device)
        found = values_HW[rows.clamp(0, height - 1)]
        size, window = 1, 2 * distance + 1
        while 2 * size <= window:  # extrema over 2, 4, 8 ... pixels
            found = extremum(found[:-size], found[size:])
            size *= 2
        rest = window - size  # two windows that overlap make up the last
        values_HW = extremum(found[:height], found[rest : rest + height]).mT.contiguous()
    return values_HW


def boundary_counts(
    predictions_HW: Tensor,
    labels_HW: Tensor,
    num_classes: int,
    ignore_label: int,
    distance: int,
) -> Tensor:
    """Count pixels near the boundary of their region, in the labels, the predictions, and both.

    As in the authors' code, the border of the image bounds a region, and distances are those of a
    chessboard. The paper does not state what becomes of unlabelled pixels; ours: they are taken
    out of labels and predictions alike, so that both are bounded by them.

    Args:
        predictions_HW: (H, W) integers in 0..K-1.
        labels_HW: (H, W) integers in 0..K-1 or `ignore_label`, on the same device.
        num_classes: K.
        ignore_label: of unlabelled pixels.
        distance: width of the bands inside of the regions, in pixels.

    Returns:
        (3, K) int64: pixels in the bands of the labels, in those of the predictions, and pixels
        that lie in both and have the right class.

    Reference: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation
        Evaluation", CVPR 2021: the sets G_d and P_d of its definition of Boundary IoU.
    """
    labelled = labels_HW != ignore_label
    predictions_HW = torch.where(labelled, predictions_HW, ignore_label).to(labels_HW.dtype)
    frame = torch.ones_like(labelled)
    frame[distance:-distance, distance:-distance] = False
    in_label_band, in_predicted_band = (
        (near_other_label(x, distance) | frame) & labelled for x in (labels_HW, predictions_HW)
    )
    in_both = in_label_band & in_predicted_band & (labels_HW == predictions_HW)
    return torch.stack(
        [
            torch.bincount(x[band].int(), minlength=num_classes)
            for x, band in (
                (labels_HW, in_label_band),
                (predictions_HW, in_predicted_band),
                (labels_HW, in_both),
            )
        ]
    )


class BoundaryIoU(Measure):
    """Boundary IoU of each class: that of the bands inside the boundaries of its regions.

    A class's bands are those of its mask, as a whole, in each image; counts are summed over the
    images before they are divided, as in the usual IoU. The paper measures single objects; the
    sum over images is ours. Scores: "boundary_mIoU" and "boundary_IoU-<class>".

    Args:
        dataset_name: the dataset that is evaluated.
        ratio: width of the bands as part of the image's diagonal, at least one pixel. The default
            is 46 pixels of a 2048x1024 image.

    Raises:
        ValueError: the dataset is not registered, or `ratio` is not in (0, 1).

    Reference: Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation
        Evaluation", CVPR 2021.
    """

    def __init__(self, dataset_name: str, ratio: float = 0.02) -> None:
        super().__init__(dataset_name)
        if not 0 < ratio < 1:
            raise ValueError(f"ratio={ratio}: must lie between 0 and 1, such as 0.02")
        self.ratio = ratio

    def count(self, predictions_HW: Tensor, labels_HW: Tensor, label_file: str) -> Tensor:
        """(3, K), see `boundary_counts`."""
        distance = max(1, round(self.ratio * math.hypot(*labels_HW.shape)))
        return boundary_counts(
            predictions_HW, labels_HW, self.num_classes, self.ignore_label, distance
        )

    def scores(
        self, counts: Tensor, confusion: Tensor, absent_classes: AbsentClasses
    ) -> dict[str, float]:
        """See `Measure.scores`."""
        labelled, predicted, both = counts.numpy().astype(np.float64)
        union = labelled + predicted - both
        class_iou = ratio_of_present(both, union, labelled)
        named = zip(self.class_names, class_iou.tolist(), strict=True)
        return {
            "boundary_mIoU": mean_over_classes(class_iou, union, absent_classes),
            **{f"boundary_IoU-{name}": iou for name, iou in named},
        }


class TrimapIoU(Measure):
    """The mIoU of the pixels in a band around the boundaries of the ground truth.

    The band holds the pixels with another label within a distance, as a chessboard measures it, on
    either side. Unlabelled regions have boundaries as others do, the border of the image is none.
    Scores: "trimap_mIoU_<width>px".

    Args:
        dataset_name: the dataset that is evaluated.
        widths: of the bands on either side of a boundary, in pixels.

    Raises:
        ValueError: the dataset is not registered, or a width is no positive integer.

    Reference: Kohli, Ladicky, and Torr, "Robust Higher Order Potentials for Enforcing Label
        Consistency", IJCV 2009, section on the evaluation around object boundaries.
    """

    def __init__(self, dataset_name: str, widths: Sequence[int] = (5, 7, 10, 20)) -> None:
        super().__init__(dataset_name)
        self.widths = tuple(widths)
        if not self.widths or not all(isinstance(w, int) and w >= 1 for w in self.widths):
            raise ValueError(f"widths={self.widths}: must be integers from 1 on, such as (5, 10)")

    def count(self, predictions_HW: Tensor, labels_HW: Tensor, label_file: str) -> Tensor:
        """(T, K, K): the confusion matrix within each band."""
        bands = []
        for width in self.widths:
            near = near_other_label(labels_HW, width)
            in_band_HW = torch.where(near, labels_HW, self.ignore_label).to(labels_HW.dtype)
            bands.append(
                count_pairs(predictions_HW, in_band_HW, self.num_classes, self.ignore_label)
            )
        return torch.stack(bands)

    def scores(
        self, counts: Tensor, confusion: Tensor, absent_classes: AbsentClasses
    ) -> dict[str, float]:
        """See `Measure.scores`."""
        return {
            f"trimap_mIoU_{width}px": segmentation_scores(band, absent_classes=absent_classes).miou
            for width, band in zip(self.widths, counts, strict=True)
        }

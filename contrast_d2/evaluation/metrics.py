"""Scores of a segmentation from its confusion matrix, as pure functions.

Shape letters: K classes, H W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

AbsentClasses = Literal["zero_if_predicted", "exclude", "zero"]


class SegmentationScores(NamedTuple):
    """Scores in 0..1; nan where the ground truth holds no pixel to measure.

    Attributes:
        miou: mean intersection over union.
        fwiou: intersection over union weighted by each class's share of the labelled pixels.
        macc: mean over classes of the share of their pixels that is predicted correctly.
        pacc: share of all labelled pixels that is predicted correctly.
        class_iou: (K,) float64, nan for a class that is absent from the ground truth.
        class_acc: (K,) float64, nan for a class that is absent from the ground truth.
    """

    miou: float
    fwiou: float
    macc: float
    pacc: float
    class_iou: np.ndarray
    class_acc: np.ndarray


def confusion_matrix(
    predictions: Tensor, labels: Tensor, num_classes: int, ignore_label: int
) -> Tensor:
    """Count the pixels of every pair of true and predicted class.

    Runs on the device of `predictions`; one number, the count of illegal pixels, is read back.

    Args:
        predictions: integers in 0..K-1, any shape.
        labels: integers in 0..K-1 or `ignore_label`, same shape and device as `predictions`.
        num_classes: K.
        ignore_label: pixels with this label are not counted, whatever their prediction.

    Returns:
        (K, K) int64; rows are true classes, columns are predicted classes.

    Raises:
        ValueError: the shapes differ, or a labelled pixel has a label or prediction outside 0..K-1.
    """
    if predictions.shape != labels.shape:
        raise ValueError(
            f"predictions have shape {tuple(predictions.shape)}, labels {tuple(labels.shape)}; "
            "resize the predictions to the size of the labels"
        )
    predictions, labels = predictions.long().flatten(), labels.long().flatten()
    ignored = labels == ignore_label
    legal = (labels >= 0) & (labels < num_classes)
    legal &= (predictions >= 0) & (predictions < num_classes)
    ignored_bin, illegal_bin = num_classes**2, num_classes**2 + 1
    bins = torch.where(legal, labels * num_classes + predictions, illegal_bin)
    bins = torch.where(ignored, ignored_bin, bins)
    # Not bincount: on CUDA it waits for the device twice to size its output.
    counts = bins.new_zeros(num_classes**2 + 2)
    counts.scatter_add_(0, bins, torch.ones_like(bins))
    if counts[illegal_bin].item():
        illegal = ~(legal | ignored)
        raise ValueError(
            f"{int(illegal.sum())} pixels lie outside the {num_classes} classes: labels "
            f"{_outside(labels[illegal], num_classes)}, predictions "
            f"{_outside(predictions[illegal], num_classes)}; legal are 0..{num_classes - 1} and, "
            f"for labels, the ignore_label {ignore_label}"
        )
    return counts[:ignored_bin].view(num_classes, num_classes)


def _outside(values: Tensor, num_classes: int) -> list[int]:
    values = values.unique()
    return values[(values < 0) | (values >= num_classes)].tolist()


def segmentation_scores(
    confusion: Tensor, *, absent_classes: AbsentClasses = "zero_if_predicted"
) -> SegmentationScores:
    """Compute the usual scores of semantic segmentation from a confusion matrix.

    Classes absent from the ground truth have no score of their own (nan); how they enter the
    means is a choice on which published numbers differ:

    - "zero_if_predicted": mIoU counts an absent class as 0 if it is predicted anywhere and leaves
      it out otherwise, mACC leaves it out. These are the numbers of detectron2 v0.6.
    - "exclude": both means run over the classes of the ground truth only, as in later versions of
      detectron2; predicting an absent class then costs nothing but the pixels it takes.
    - "zero": both means run over all K classes and an absent class counts as 0, as in the
      released code of multi- and cross-scale contrast. Lower on small validation sets.

    The three agree when every class occurs in the ground truth.

    Args:
        confusion: (K, K) integers; rows are true classes, columns are predicted classes.
        absent_classes: how classes absent from the ground truth enter the means.

    Returns:
        The scores; all nan when the matrix holds no pixel.

    Raises:
        ValueError: `confusion` is not square, or `absent_classes` is unknown.
    """
    if confusion.dim() != 2 or confusion.shape[0] != confusion.shape[1]:
        raise ValueError(f"a confusion matrix is (K, K), not {tuple(confusion.shape)}")
    check_absent_classes(absent_classes)
    matrix_KK = confusion.cpu().numpy()
    correct = matrix_KK.diagonal().astype(np.float64)
    labelled = matrix_KK.sum(axis=1).astype(np.float64)
    predicted = matrix_KK.sum(axis=0).astype(np.float64)
    num_classes = len(correct)
    class_iou, class_acc = np.full(num_classes, np.nan), np.full(num_classes, np.nan)
    present = labelled > 0
    if not present.any():
        return SegmentationScores(math.nan, math.nan, math.nan, math.nan, class_iou, class_acc)

    union = labelled + predicted - correct
    class_iou[present] = correct[present] / union[present]
    class_acc[present] = correct[present] / labelled[present]
    iou_classes, acc_classes = {
        "zero_if_predicted": (np.sum(union > 0), np.sum(present)),
        "exclude": (np.sum(present), np.sum(present)),
        "zero": (num_classes, num_classes),
    }[absent_classes]
    frequency = labelled / np.sum(labelled)
    return SegmentationScores(
        miou=float(np.sum(class_iou[present]) / iou_classes),
        fwiou=float(np.sum(class_iou[present] * frequency[present])),
        macc=float(np.sum(class_acc[present]) / acc_classes),
        pacc=float(np.sum(correct) / np.sum(labelled)),
        class_iou=class_iou,
        class_acc=class_acc,
    )


def check_absent_classes(absent_classes: str) -> None:
    """Raise a ValueError unless `absent_classes` is one of the policies."""
    if absent_classes not in get_args(AbsentClasses):
        raise ValueError(
            f"absent_classes={absent_classes!r} is unknown; choose from {get_args(AbsentClasses)}"
        )


def finite_scores(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Replace what JSON cannot hold: scores that are nan or infinite become None."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}

"""Scores of a segmentation from its confusion matrix, as pure functions.

Shape letters: K classes, H W.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

AbsentClasses = Literal["zero_if_predicted", "exclude", "zero"]

# Pixels whose scores are compared at a time on a CPU: they should stay in its cache.
_CPU_PIXELS = 1 << 15


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


def predicted_classes(scores_KHW: Tensor) -> Tensor:
    """The class of the highest score, the first of equal ones.

    Args:
        scores_KHW: (K, H, W) floats, K at most 255.

    Returns:
        (H, W) uint8, on the device of the scores.
    """
    num_classes = len(scores_KHW)
    channels_last = scores_KHW.stride(0) == 1  # which argmax can do
    if scores_KHW.device.type != "cpu" or channels_last:
        return scores_KHW.argmax(dim=0).to(torch.uint8)
    # Several times as fast as argmax, which does not use the vector units over the first dimension:
    # of the classes that reach the maximum, the first has the highest rank.
    ranks_K1 = torch.arange(num_classes, 0, -1, dtype=torch.uint8)[:, None]
    scores_KN = scores_KHW.flatten(1)
    rank_N = torch.empty(scores_KN.shape[1], dtype=torch.uint8)
    for scores, rank in zip(
        scores_KN.split(_CPU_PIXELS, dim=1), rank_N.split(_CPU_PIXELS), strict=True
    ):
        reached = (scores == scores.amax(dim=0)).view(torch.uint8)
        torch.amax(reached.mul_(ranks_K1), dim=0, out=rank)
    if not rank_N.all():  # nan is equal to nothing
        return scores_KHW.argmax(dim=0).to(torch.uint8)
    return (num_classes - rank_N).view(scores_KHW.shape[1:])


def check_finite_scores(best: Mapping[str, Tensor]) -> None:
    """Refuses predictions of a network that computes nan.

    Args:
        best: the highest class score (0-dim) of each image by the image's file, on any device,
            which is waited for.

    Raises:
        FloatingPointError: one of them is nan or infinite.
    """
    if not best:
        return
    bad = (~torch.stack([score.float() for score in best.values()]).isfinite()).tolist()
    if any(bad):
        raise FloatingPointError(
            f"{list(best)[bad.index(True)]}: its class scores are not finite, as are those of "
            f"{sum(bad)} of {len(bad)} images. The weights are damaged, or train.amp overflows: "
            "evaluate another checkpoint, or set train.amp.enabled=False."
        )


def confusion_matrix(
    predictions: Tensor, labels: Tensor, num_classes: int, ignore_label: int
) -> Tensor:
    """Count the pixels of every pair of true and predicted class.

    Runs on the device of `predictions`, which is waited for.

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
    if predictions.device.type == "cpu" and predictions.dtype == labels.dtype == torch.uint8:
        counts = _byte_confusion_matrix(predictions, labels, num_classes, ignore_label)
        if counts is not None:
            return counts
    predictions, labels = predictions.long(), labels.long()
    legal = (labels >= 0) & (labels < num_classes)
    legal &= (predictions >= 0) & (predictions < num_classes)
    illegal = ~(legal | (labels == ignore_label))
    if illegal.any():
        raise ValueError(
            f"{int(illegal.sum())} pixels lie outside the {num_classes} classes: labels "
            f"{_outside(labels[illegal], num_classes)}, predictions "
            f"{_outside(predictions[illegal], num_classes)}; legal are 0..{num_classes - 1} and, "
            f"for labels, the ignore_label {ignore_label}"
        )
    return count_pairs(predictions, labels, num_classes, ignore_label)


def count_pairs(predictions: Tensor, labels: Tensor, num_classes: int, ignore_label: int) -> Tensor:
    """`confusion_matrix` of legal pixels, which does not check them and waits for no device.

    Args:
        predictions, labels, num_classes, ignore_label: as of `confusion_matrix`.
    """
    if predictions.device.type == "cpu" and predictions.dtype == labels.dtype == torch.uint8:
        counts = _byte_confusion_matrix(predictions, labels, num_classes, ignore_label)
        assert counts is not None
        return counts
    predictions, labels = predictions.long().flatten(), labels.long().flatten()
    bins = torch.where(labels == ignore_label, num_classes**2, labels * num_classes + predictions)
    # Not bincount: on CUDA it waits for the device twice to size its output.
    counts = bins.new_zeros(num_classes**2 + 1)
    counts.scatter_add_(0, bins, torch.ones_like(bins))
    return counts[:-1].view(num_classes, num_classes)


def _byte_confusion_matrix(
    predictions: Tensor, labels: Tensor, num_classes: int, ignore_label: int
) -> Tensor | None:
    """The confusion matrix of bytes in one pass; None where a pixel is illegal."""
    pairs = labels.int().mul_(256).add_(predictions).flatten()
    counts = torch.bincount(pairs, minlength=256**2).view(256, 256)
    if 0 <= ignore_label < 256:
        counts[ignore_label] = 0
    legal = counts[:num_classes, :num_classes]
    return legal.clone() if legal.sum() == counts.sum() else None


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
    union = labelled + predicted - correct
    class_iou, class_acc = (ratio_of_present(correct, x, labelled) for x in (union, labelled))
    if not labelled.any():
        return SegmentationScores(math.nan, math.nan, math.nan, math.nan, class_iou, class_acc)

    present = labelled > 0
    frequency = labelled / np.sum(labelled)
    return SegmentationScores(
        miou=mean_over_classes(class_iou, union, absent_classes),
        fwiou=float(np.sum(class_iou[present] * frequency[present])),
        macc=mean_over_classes(class_acc, labelled, absent_classes),
        pacc=float(np.sum(correct) / np.sum(labelled)),
        class_iou=class_iou,
        class_acc=class_acc,
    )


def ratio_of_present(
    numerator: np.ndarray, denominator: np.ndarray, labelled: np.ndarray
) -> np.ndarray:
    """The ratio, (K,) float64, of classes that have labelled pixels; nan for others.

    Args:
        numerator: (K,).
        denominator: (K,), positive where `labelled` is.
        labelled: (K,) pixels in the ground truth.
    """
    ratio = np.full(len(labelled), np.nan)
    np.divide(numerator, denominator, out=ratio, where=labelled > 0)
    return ratio


def mean_over_classes(
    class_scores: np.ndarray, union: np.ndarray, absent_classes: AbsentClasses
) -> float:
    """The mean of scores by class, under a policy of `segmentation_scores`.

    Args:
        class_scores: (K,) of all classes or of a group, nan for classes without ground truth.
        union: (K,) pixels that are labelled or predicted as the class.
        absent_classes: the policy.

    Returns:
        The mean; nan where the policy leaves no class to count.
    """
    present = ~np.isnan(class_scores)
    counted = {
        "zero_if_predicted": np.sum(union > 0),
        "exclude": np.sum(present),
        "zero": len(class_scores),
    }[absent_classes]
    return float(np.sum(class_scores[present]) / counted) if counted else math.nan


def group_miou(
    confusion: Tensor,
    groups: Mapping[str, Sequence[int]],
    *,
    absent_classes: AbsentClasses = "zero_if_predicted",
) -> dict[str, float]:
    """The mean intersection over union of the classes of each group.

    A confusion of two classes of a group counts as wrong, as it does in the mIoU.

    Args:
        confusion: (K, K) integers; rows are true classes, columns are predicted classes.
        groups: contiguous class ids by name of the group.
        absent_classes: how classes absent from the ground truth enter the means, see
            `segmentation_scores`.

    Returns:
        Scores in 0..1 by name of the group; nan where the policy leaves no class to count.
    """
    class_iou = segmentation_scores(confusion, absent_classes=absent_classes).class_iou
    matrix_KK = confusion.cpu().numpy()
    union = matrix_KK.sum(axis=0) + matrix_KK.sum(axis=1) - matrix_KK.diagonal()
    return {
        name: mean_over_classes(class_iou[list(members)], union[list(members)], absent_classes)
        for name, members in groups.items()
    }


def merge_classes(confusion: Tensor, groups: Mapping[str, Sequence[int]]) -> Tensor:
    """The confusion matrix of groups of classes, each taken as one class.

    Args:
        confusion: (K, K) integers; rows are true classes, columns are predicted classes.
        groups: contiguous class ids by name of the group; every class is in one group.

    Returns:
        (G, G) integers, in the order of the groups.

    Raises:
        ValueError: a class is in no group or in several.
    """
    members = sorted(k for group in groups.values() for k in group)
    if members != list(range(len(confusion))):
        raise ValueError(
            f"the groups {list(groups)} must hold each of {len(confusion)} classes once, but hold "
            f"the classes {members}"
        )
    membership_GK = confusion.new_zeros(len(groups), len(confusion))
    for row, group in zip(membership_GK, groups.values(), strict=True):
        row[list(group)] = 1
    return membership_GK @ confusion @ membership_GK.T


def frequency_groups(pixels: np.ndarray) -> dict[str, list[int]]:
    """Divides classes into head, mid and tail, thirds by how many pixels they have.

    Contextrast++ scores such groups; their boundaries are ours: a third of the classes each, and
    where three does not divide K the more frequent groups take the rest.

    Args:
        pixels: (K,) pixels of each class in the training set.

    Returns:
        Class ids by "head", "mid" and "tail", the most frequent first.
    """
    order = np.argsort(-np.asarray(pixels), kind="stable")
    return {
        name: part.tolist()
        for name, part in zip(("head", "mid", "tail"), np.array_split(order, 3), strict=True)
    }


def check_absent_classes(absent_classes: str) -> None:
    """Raise a ValueError unless `absent_classes` is one of the policies."""
    if absent_classes not in get_args(AbsentClasses):
        raise ValueError(
            f"absent_classes={absent_classes!r} is unknown; choose from {get_args(AbsentClasses)}"
        )


def finite_scores(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Replace what JSON cannot hold: scores that are nan or infinite become None."""
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}

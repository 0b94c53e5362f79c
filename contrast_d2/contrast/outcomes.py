"""What a network makes of each pixel: sorting by image, prediction and truth.

Shape letters: B images, K classes, h w a label map, N its B * h * w pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .sets import on_device


class Outcomes(NamedTuple):
    """The pixels of a map, sorted by image, prediction and truth.

    Attributes:
        order: (N,) int64 pixels, numbered through the batch: the correct ones by image and class,
            then the wrong ones by image, predicted and true class, then those without a class.
        correct: (B, K) pixels of each image that are of class k and predicted so.
        correct_first: (B, K), where they begin in `order`.
        wrong: (B, K, K) pixels of each image that are predicted as j and of class k; 0 for j = k.
        wrong_first: (B, K, K), where they begin in `order`.
    """

    order: Tensor
    correct: Tensor
    correct_first: Tensor
    wrong: Tensor
    wrong_first: Tensor


def sort_outcomes(
    labels: Tensor, predictions: Tensor, num_classes: int, visiting_order: Tensor | None = None
) -> Outcomes:
    """Sorts the pixels of a map by image, prediction and truth.

    Args:
        labels: (B, h, w) integers; a pixel outside of 0..K-1 has no class.
        predictions: (B, h, w) int64 classes 0..K-1.
        num_classes: K.
        visiting_order: (N,) int64 permutation of all pixels, from the host, in which those of the
            same outcome are listed; None for raster order.
    """
    num_images = len(labels)
    truth = labels.flatten(1).long()
    predicted = predictions.flatten(1)
    image = torch.arange(num_images, device=labels.device)[:, None] * num_classes
    num_correct, num_wrong = num_images * num_classes, num_images * num_classes**2
    no_class = num_correct + num_wrong
    keys = torch.where(
        truth == predicted,
        image + truth,
        num_correct + (image + predicted) * num_classes + truth,
    )
    keys.masked_fill_((truth < 0) | (truth >= num_classes), no_class)
    # The cost of the sort depends on the bytes of the keys.
    keys = keys.flatten().to(torch.int16 if no_class < 2**15 else torch.int32)
    if visiting_order is not None:
        visiting_order = on_device(visiting_order, keys.device)
        keys = keys[visiting_order]
    sorted_keys, order = keys.sort(stable=True)
    if visiting_order is not None:
        order = visiting_order[order]
    numbers = torch.arange(no_class + 1, dtype=keys.dtype, device=keys.device)
    bounds = torch.searchsorted(sorted_keys, numbers)
    correct, wrong = bounds.diff().split([num_correct, num_wrong])
    correct_first, wrong_first = bounds[:-1].split([num_correct, num_wrong])
    by_class = num_images, num_classes
    by_pair = num_images, num_classes, num_classes
    return Outcomes(
        order,
        correct.view(by_class),
        correct_first.view(by_class),
        wrong.view(by_pair),
        wrong_first.view(by_pair),
    )

"""Pixels shared out among the prototypes of their class.

Shape letters: A pixels, K classes, M prototypes of a class, N most pixels of a class.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .sets import on_device


def assign(logits: Tensor, class_counts: Sequence[int], rounds: int) -> Tensor:
    """Which prototype each pixel goes to, if those of a class share its pixels equally.

    Sinkhorn's algorithm in the log domain: it scales e^logits until all prototypes of a class have
    equal mass and all its pixels too. Classes with fewer pixels than prototypes are not scaled.

    Args:
        logits: (A, M) similarities to the prototypes of the pixel's class, grouped by class.
        class_counts: pixels of each class.
        rounds: how often both are scaled.

    Returns:
        (A,) int64 numbers of prototypes.

    Reference: Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport", NeurIPS
        2013.
    """
    counts = torch.tensor(class_counts)
    classes = torch.arange(len(counts)).repeat_interleave(counts)
    rank = torch.arange(len(classes)) - (counts.cumsum(dim=0) - counts)[classes]
    most, size = max(class_counts), logits.shape[1]
    place = on_device(classes * most + rank, logits.device)
    padded_KNM = logits.new_zeros(len(counts) * most, size).index_copy_(0, place, logits)
    padded_KNM = padded_KNM.view(len(counts), most, size)
    valid_KN1 = on_device(torch.arange(most) < counts[:, None], logits.device)[..., None]
    scaled_K11 = on_device(counts >= size, logits.device)[:, None, None]
    # Far below any logit, but of finite sums.
    least = torch.finfo(logits.dtype).min / 4
    of_pixels_KN1 = padded_KNM.new_zeros(len(counts), most, 1)
    of_prototypes = padded_KNM.new_zeros(len(counts), 1, size)
    for _ in range(rounds if most else 0):
        masses = torch.where(valid_KN1, padded_KNM - of_pixels_KN1, least)
        of_prototypes = torch.where(scaled_K11, masses.logsumexp(dim=1, keepdim=True), 0)
        of_pixels_KN1 = (padded_KNM - of_prototypes).logsumexp(dim=2, keepdim=True)
    return (padded_KNM - of_prototypes).flatten(0, 1)[place].argmax(dim=1)

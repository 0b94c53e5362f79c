"""How similar anchors are, from sums over classes: no matrix of pairs.

Shape letters: A anchors, D embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ClassSums(NamedTuple):
    """What the mean similarities of a set of embeddings follow from.

    Those of several sets can be stacked along dimensions that stand before these.

    Attributes:
        sums: (K, D), sum of the embeddings of each class.
        counts: (K,) number of them, as floats.
        squares: 0-dim, sum of all squared lengths.
    """

    sums: Tensor
    counts: Tensor
    squares: Tensor


class SimilarityStatistics(NamedTuple):
    """Mean cosine similarity over all (anchor, positive) and all (anchor, negative) pairs, 0-dim
    for each set; nan where there is no such pair."""

    positive: Tensor
    negative: Tensor


@torch.no_grad()
def class_sums(embeddings: Tensor, labels: Tensor, num_classes: int) -> ClassSums:
    """Sums up the embeddings of each class.

    Args:
        embeddings: (A, D).
        labels: (A,) integers below K; rows with a negative label do not count.
        num_classes: K.
    """
    # Slot 0 takes what does not count.
    slot = labels.clamp(min=-1).long() + 1
    lengths = embeddings.square().sum(dim=1)
    sums = embeddings.new_zeros(num_classes + 1, embeddings.shape[1])
    counts, squares = sums.new_zeros(num_classes + 1), sums.new_zeros(num_classes + 1)
    sums.index_add_(0, slot, embeddings)
    counts.index_add_(0, slot, torch.ones_like(lengths))
    squares.index_add_(0, slot, lengths)
    return ClassSums(sums[1:], counts[1:], squares[1:].sum())


def stack_class_sums(parts: Sequence[ClassSums]) -> ClassSums:
    """Stacks the sums of N sets along a new first dimension: (N, K, D), (N, K), (N,)."""
    return ClassSums(*(torch.stack(values) for values in zip(*parts, strict=True)))


@torch.no_grad()
def similarity_statistics(
    anchors: ClassSums, contrast: ClassSums, *, contrast_holds_anchors: bool = False
) -> SimilarityStatistics:
    """Mean similarity of positive and of negative pairs.

    Args:
        anchors: sums of unit vectors.
        contrast: those of the contrast set.
        contrast_holds_anchors: the anchors are part of the contrast set, and none is paired with
            itself.
    """
    same = (anchors.sums * contrast.sums).sum(dim=(-2, -1))
    same_pairs = (anchors.counts * contrast.counts).sum(dim=-1)
    everything = (anchors.sums.sum(dim=-2) * contrast.sums.sum(dim=-2)).sum(dim=-1)
    all_pairs = anchors.counts.sum(dim=-1) * contrast.counts.sum(dim=-1)
    negative = _mean(everything - same, all_pairs - same_pairs)
    if contrast_holds_anchors:
        same = same - anchors.squares
        same_pairs = same_pairs - anchors.counts.sum(dim=-1)
    return SimilarityStatistics(positive=_mean(same, same_pairs), negative=negative)


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """total / count; nan for a count of 0, where rounding leaves a total that is not quite 0."""
    return torch.where(count > 0, total / count, torch.nan)

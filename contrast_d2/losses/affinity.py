"""Adaptive affinity fields: predictions of neighbours shall agree where their labels do.

Of class c, with probabilities p_i(c) of a pixel and p_j(c) of its neighbour, both taken as those of
coin tosses, D_ij(c) is the Kullback-Leibler divergence of the pixel's from the neighbour's:

    D_ij(c) = p_j log(p_j / p_i) + (1 - p_j) log((1 - p_j) / (1 - p_i))
    l_ij(c) = D_ij(c)                  where both or neither are of class c (grouping)
    l_ij(c) = max(0, margin - D_ij(c)) where one of the two is (separating)

Each class has weights over kernel sizes, for grouping and for separating pairs. They sum to 1 and
are trained against the network, to make the loss as large as they can.

Shape letters: B images, K classes, H W size of the labels, h w the strided grid, S kernel sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .precision import full_precision

# Probabilities are clipped to [this, 1 - this], so that divergences are bounded.
_CLIP = 1e-4


class AffinitySums(NamedTuple):
    """Losses of all pairs of pixels, before they are weighted."""

    grouping: Tensor
    """(S, K) sums over the pairs that agree on a class."""
    separating: Tensor
    """(S, K) sums over the pairs that do not."""
    grouping_pairs: Tensor
    """(S,) number of terms in the sums over all classes."""
    separating_pairs: Tensor
    """(S,) the same of `separating`."""


@full_precision
def affinity_sums(
    logits: Tensor,
    labels: Tensor,
    *,
    kernel_sizes: Sequence[int] = (3, 5, 7),
    margin: float = 3.0,
    ignore_label: int = 255,
) -> AffinitySums:
    """Sums the losses of pairs of neighbours by kernel size and class.

    A kernel of size 2 r + 1 pairs each pixel with the eight at its corners and in the middles of
    its sides, so that a large kernel costs no more than a small one. Pairs that reach out of the
    image or hold an ignored pixel do not count.

    Args:
        logits: (B, K, h, w).
        labels: (B, h, w) int64 classes or `ignore_label`.
        kernel_sizes: S odd numbers of pixels.
        margin: divergence from which a separating pair costs nothing.
        ignore_label: pixels with this label do not count.
    """
    classes_K11 = torch.arange(logits.shape[1], device=labels.device)[:, None, None]
    valid = (labels != ignore_label)[:, None]
    belongs = labels[:, None] == classes_K11  # (B, K, h, w)
    p = logits.softmax(dim=1).clamp(_CLIP, 1 - _CLIP)
    log_not_p = (1 - p).log()
    log_odds = p.log() - log_not_p
    negative_entropy = p * log_odds + log_not_p

    rows: list[list[Tensor]] = []
    for size in kernel_sizes:
        sums: list[list[Tensor]] = []
        for here, there in _neighbours(size // 2, labels.shape[-2:]):
            divergence = negative_entropy[there] - p[there] * log_odds[here] - log_not_p[here]
            pair = valid[here] & valid[there]
            differ = belongs[here] != belongs[there]
            separate, group = pair & differ, pair & ~differ
            sums.append(
                [
                    (divergence * group).sum(dim=(0, 2, 3)),
                    ((margin - divergence).relu() * separate).sum(dim=(0, 2, 3)),
                    group.sum(),
                    separate.sum(),
                ]
            )
        rows.append([torch.stack(column).sum(dim=0) for column in zip(*sums, strict=True)])
    return AffinitySums(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _neighbours(distance: int, size: Sequence[int]) -> Iterator[tuple[tuple, tuple]]:
    """For each of eight directions, the indices of pixels and of their neighbours in a map."""

    def cut(step: int, length: int) -> tuple[slice, slice]:
        """Where along one axis a pixel and the one `step` further both lie in the map."""
        overlap = max(length - abs(step), 0)
        start, end = max(-step, 0), max(step, 0)
        return slice(start, start + overlap), slice(end, end + overlap)

    for y, x in itertools.product((-distance, 0, distance), repeat=2):
        if (y, x) != (0, 0):
            (rows, rows_there), (columns, columns_there) = cut(y, size[0]), cut(x, size[1])
            yield (..., rows, columns), (..., rows_there, columns_there)


class AdaptiveAffinityLoss(nn.Module):
    """The affinity terms of adaptive affinity fields, to be added to a loss of each pixel.

    The mean over grouping pairs and the mean over separating pairs, terms of all classes together,
    are taken for each kernel size, weighted, and added up. The weights of a class over the sizes
    are a softmax of parameters of this module, equal at first. Their gradient is reversed: the one
    optimizer that makes the loss small for the network makes it large for them. Weight decay draws
    them back towards equal weights.

    Args:
        num_classes: K.
        kernel_sizes: odd numbers of pixels, 3 or more.
        margin: divergence from which a separating pair costs nothing.
        grouping_weight, separating_weight: factors of the two kinds of pairs.
        decay: what the loss is divided by at the end of the training: its factor is decay^(-t / T)
            at step t. Steps are counted here, and passes are steps. 1 for a constant factor.
        max_iter: T; needed for a decay.
        stride: pairs are taken on every stride-th pixel of labels and scores. The default is about
            the grid of a decoder at stride 4: between its points, scores are interpolated.
        ignore_label: pixels with this label do not count.

    Raises:
        ValueError: an argument out of range.

    Reference: Ke et al., "Adaptive Affinity Fields for Semantic Segmentation", ECCV 2018, section
        3.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        kernel_sizes: Sequence[int] = (3, 5, 7),
        margin: float = 3.0,
        grouping_weight: float = 1.0,
        separating_weight: float = 1.0,
        decay: float = 1.0,
        max_iter: int | None = None,
        stride: int = 4,
        ignore_label: int = 255,
    ) -> None:
        super().__init__()
        if not decay >= 1:
            raise ValueError(
                f"decay={decay}: the factor falls from 1 to 1 / decay; give 1 or more."
            )
        if decay > 1 and (max_iter is None or max_iter < 1):
            raise ValueError(f"decay={decay} with max_iter={max_iter}: say how long training is.")
        if not kernel_sizes or any(size < 3 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes={list(kernel_sizes)}: odd numbers, 3 or more.")
        if not margin > 0:
            raise ValueError(f"margin={margin}: must be above 0.")
        if not (grouping_weight >= 0 and separating_weight >= 0):
            raise ValueError(
                f"grouping_weight={grouping_weight}, separating_weight={separating_weight}: both "
                "must be 0 or more."
            )
        if stride < 1:
            raise ValueError(f"stride={stride}: must be at least 1.")
        self.kernel_sizes = tuple(kernel_sizes)
        self.margin = margin
        self.grouping_weight = grouping_weight
        self.separating_weight = separating_weight
        self.decay = decay
        self.max_iter = max_iter
        if decay > 1:
            # A buffer, so that a resumed run goes on where it was.
            self.steps: Tensor
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.stride = stride
        self.ignore_label = ignore_label
        self.grouping_scores = nn.Parameter(torch.zeros(len(self.kernel_sizes), num_classes))
        self.separating_scores = nn.Parameter(torch.zeros(len(self.kernel_sizes), num_classes))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        if logits.shape[1] != self.grouping_scores.shape[1]:
            raise ValueError(
                f"num_classes={self.grouping_scores.shape[1]} of the affinity loss, but the logits "
                f"have {logits.shape[1]} classes: give both the same."
            )
        # From the middle of each square of stride x stride pixels.
        middle = slice(self.stride // 2, None, self.stride)
        sums = affinity_sums(
            logits[..., middle, middle],
            labels[..., middle, middle],
            kernel_sizes=self.kernel_sizes,
            margin=self.margin,
            ignore_label=self.ignore_label,
        )
        grouping = _adversarial_mean(sums.grouping, sums.grouping_pairs, self.grouping_scores)
        separating = _adversarial_mean(
            sums.separating, sums.separating_pairs, self.separating_scores
        )
        loss = self.grouping_weight * grouping + self.separating_weight * separating
        if self.max_iter is None or self.decay == 1:
            return loss
        part = self.steps.clamp(max=self.max_iter) / self.max_iter
        if self.training:
            self.steps += 1
        return loss * self.decay ** (-part)


def _adversarial_mean(sums_SK: Tensor, pairs_S: Tensor, scores_SK: Tensor) -> Tensor:
    """The weighted sum of the means over pairs, with the gradient of the scores reversed."""
    weights_SK = scores_SK.to(sums_SK.dtype).softmax(dim=0)
    weights_SK = 2 * weights_SK.detach() - weights_SK  # the same value
    means_SK = sums_SK / pairs_S.clamp(min=1)[:, None]
    return (weights_SK * means_SK).sum()

"""Cross entropy over the hard pixels only: online hard example mining.

Shape letters: B images, K classes, H W size of the labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .cross_entropy import CrossEntropyLoss, cross_entropy
from .precision import full_precision


@full_precision
def ohem_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    threshold: float,
    min_kept: int,
    ignore_label: int = 255,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean cross entropy over the pixels whose true class has a low probability.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 classes or `ignore_label`.
        threshold: in (0, 1]; a pixel counts if the probability of its class is below.
        min_kept: at least so many pixels of the batch count, the hardest ones (and any that tie
            with the last of them). With fewer valid pixels, all of them do.
        ignore_label: pixels with this label never count, neither as hard nor among `min_kept`.
        weight: (K,) weight of each class in the mean. It does not enter the choice.

    Returns:
        0-dim fp32 (or fp64) tensor, connected to the graph; 0 where no pixel counts.
    """
    with torch.no_grad():
        # Of the probability p of a pixel's class, -log p: larger is harder. Ignored pixels have 0,
        # so that with fewer than `min_kept` valid ones that is the bound, and all of them count.
        hardness = F.cross_entropy(logits, labels, ignore_index=ignore_label, reduction="none")
        hard = hardness > -math.log(threshold)
        count = min(min_kept, hardness.numel())
        if count > 0:
            hard |= hardness >= hardness.flatten().topk(count, sorted=False).values.min()
        chosen = labels.where(hard, ignore_label)
    return cross_entropy(logits, chosen, ignore_label=ignore_label, weight=weight)


class OhemCrossEntropyLoss(CrossEntropyLoss):
    """`ohem_cross_entropy` with its settings.

    The number of pixels that count at least is stated per image, so that it does not depend on how
    a batch is divided among processes: of B images in a process, B times as many count, from
    whichever image they are.

    Args:
        threshold: in (0, 1]; a pixel counts if the probability of its class is below.
        min_kept_per_image: pixels, 0 or more; 0 leaves the choice to the threshold.
        ignore_label: pixels with this label do not count.
        class_weights: K weights, or None for equal ones.

    Raises:
        ValueError: an argument out of range.

    Reference: Shrivastava et al., "Training Region-based Object Detectors with Online Hard Example
        Mining", CVPR 2016, for the idea. The form for pixels, a threshold and a smallest number, is
        common practice.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        min_kept_per_image: int = 32_768,
        ignore_label: int = 255,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(ignore_label=ignore_label, class_weights=class_weights)
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold}: a probability, above 0 and at most 1.")
        if min_kept_per_image < 0:
            raise ValueError(f"min_kept_per_image={min_kept_per_image}: must be 0 or more.")
        self.threshold = threshold
        self.min_kept_per_image = min_kept_per_image

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        self._check_classes(logits)
        return ohem_cross_entropy(
            logits,
            labels,
            threshold=self.threshold,
            min_kept=self.min_kept_per_image * len(labels),
            ignore_label=self.ignore_label,
            weight=self.weight,
        )

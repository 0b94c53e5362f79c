"""Cross entropy, safe where a crop has no valid pixel.

Shape letters: B images, K classes, H W size of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .precision import full_precision


@full_precision
def cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_label: int = 255, weight: Tensor | None = None
) -> Tensor:
    """Mean pixel cross entropy over the valid pixels, and 0 where there is none.

    `torch.nn.functional.cross_entropy` gives nan for a crop whose pixels are all ignored.

    Args:
        logits: (B, K, H, W).
        labels: (B, H, W) int64 classes or `ignore_label`.
        ignore_label: pixels with this label do not count.
        weight: (K,) weight of each class; the mean is then the weighted one.

    Returns:
        0-dim fp32 (or fp64) tensor, connected to the graph.
    """
    weight = None if weight is None else weight.to(logits.dtype)
    # Summed apart: on GPUs torch's own sum has no deterministic algorithm.
    total = F.cross_entropy(
        logits, labels, weight=weight, ignore_index=ignore_label, reduction="none"
    ).sum()
    valid = labels != ignore_label
    if weight is None:
        return total / valid.sum().clamp(min=1)
    norm = torch.where(valid, weight[labels.where(valid, 0)], 0).sum()
    return total / torch.where(norm > 0, norm, 1)


class CrossEntropyLoss(nn.Module):
    """`cross_entropy` with its settings.

    Args:
        ignore_label: pixels with this label do not count.
        class_weights: K weights, or None for equal ones.
    """

    def __init__(
        self, *, ignore_label: int = 255, class_weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        self.ignore_label = ignore_label
        weight = None if class_weights is None else torch.tensor([float(w) for w in class_weights])
        self.weight: Tensor | None
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        self._check_classes(logits)
        return cross_entropy(logits, labels, ignore_label=self.ignore_label, weight=self.weight)

    def _check_classes(self, logits: Tensor) -> None:
        if self.weight is not None and len(self.weight) != logits.shape[1]:
            raise ValueError(
                f"class_weights has {len(self.weight)} entries for {logits.shape[1]} classes: "
                "give one per class."
            )

"""Segmentation losses, safe where a crop has no valid pixel.

Shape letters: B images, K classes, H W size of the labels, h w size of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .structures import SegOutput


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
        0-dim tensor, connected to the graph.
    """
    total = F.cross_entropy(
        logits, labels, weight=weight, ignore_index=ignore_label, reduction="sum"
    )
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
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        if self.weight is not None and len(self.weight) != logits.shape[1]:
            raise ValueError(
                f"class_weights has {len(self.weight)} entries for {logits.shape[1]} classes: "
                "give one per class."
            )
        return cross_entropy(logits, labels, ignore_label=self.ignore_label, weight=self.weight)


class SegLoss(nn.Module):
    """The segmentation losses of a decoder's output, at the resolution of the labels.

    Args:
        main: loss of the logits, (logits, labels) -> scalar.
        aux: loss of the auxiliary logits; None for the same as `main`.
        aux_weight: weight of the auxiliary loss.
    """

    def __init__(
        self, main: nn.Module, aux: nn.Module | None = None, *, aux_weight: float = 0.4
    ) -> None:
        super().__init__()
        if not aux_weight >= 0:
            raise ValueError(f"aux_weight={aux_weight}: must be 0 or more.")
        self.main = main
        self.aux = main if aux is None else aux
        self.aux_weight = aux_weight

    def forward(self, output: SegOutput, labels: Tensor) -> dict[str, Tensor]:
        """Computes `loss_sem_seg`, and `loss_aux` where the decoder has an auxiliary head.

        Args:
            output: of the decoder.
            labels: (B, H, W) int64.
        """
        size = labels.shape[-2:]
        losses = {"loss_sem_seg": self.main(upsample(output.logits, size), labels)}
        if output.aux_logits is not None:
            aux = self.aux(upsample(output.aux_logits, size), labels)
            losses["loss_aux"] = self.aux_weight * aux
        return losses


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes class scores (B, K, h, w) to (H, W), bilinearly and in fp32: sums over a bf16 softmax
    of a whole crop lose digits."""
    return F.interpolate(logits.float(), size=tuple(size), mode="bilinear", align_corners=False)

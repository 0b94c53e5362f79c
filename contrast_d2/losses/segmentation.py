"""The losses of a decoder's output, and sums of losses.

Shape letters: B images, K classes, H W size of the labels, h w size of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..structures import SegOutput


class LossSum(nn.Module):
    """The weighted sum of losses of the same logits.

    Args:
        losses: by name, each (logits, labels) -> scalar.
        weights: factor of each; 1 where none is given.

    Raises:
        ValueError: no losses, or a weight without loss or below 0.
    """

    def __init__(
        self, losses: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        weights = dict(weights or {})
        if not losses:
            raise ValueError("losses is empty: name at least one.")
        for name, weight in weights.items():
            if name not in losses:
                raise ValueError(f"weights names {name!r}, which is none of {list(losses)}.")
            if not weight >= 0:
                raise ValueError(f"weights[{name!r}]={weight}: must be 0 or more.")
        self.losses = nn.ModuleDict(losses)
        self.weights = {name: weights.get(name, 1.0) for name in losses}

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Args: logits (B, K, H, W), labels (B, H, W). Returns a 0-dim tensor."""
        return sum(self.weights[name] * loss(logits, labels) for name, loss in self.losses.items())  # pyright: ignore[reportReturnType]


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
        losses = {
            "loss_sem_seg": self.main(upsample(output.logits, size, output.align_corners), labels)
        }
        if output.aux_logits is not None:
            aux = self.aux(upsample(output.aux_logits, size, output.align_corners), labels)
            losses["loss_aux"] = self.aux_weight * aux
        return losses


def upsample(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Resizes class scores (B, K, h, w) to (H, W), bilinearly and in fp32: sums over a bf16 softmax
    of a whole crop lose digits."""
    return F.interpolate(
        logits.float(), size=tuple(size), mode="bilinear", align_corners=align_corners
    )

"""What makes a decoder one of detectron2's semantic heads.

Shape letters: B images, C channels, K classes, H W the labels, h w a feature map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from ..registries import arguments_of
from ..structures import SegOutput
from .layers import resize, shape_of

_AUX_WEIGHT = 0.4


class Decoder(nn.Module):
    """A semantic head of detectron2's, for decoders that implement `decode`.

    `ContrastiveSegmentor` calls `decode` and has losses of its own. `forward` is for the others,
    such as detectron2's `SemanticSegmentor`.

    Args:
        common_stride: stride of the logits.
        ignore_value: pixels with this label do not count in the losses of `forward`.
    """

    def __init__(self, common_stride: int, ignore_value: int) -> None:
        super().__init__()
        self.common_stride = common_stride
        self.ignore_value = ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """The arguments that a yaml config holds; those that detectron2 has no keys for are in
        MODEL.SEM_SEG_HEAD.OPTIONS."""
        head = cfg.MODEL.SEM_SEG_HEAD
        return arguments_of(
            cls,
            head.OPTIONS,
            "MODEL.SEM_SEG_HEAD.OPTIONS",
            input_shape=chosen_maps(cfg, input_shape),
            num_classes=head.NUM_CLASSES,
            norm=head.NORM,
            ignore_value=head.IGNORE_VALUE,
        )

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Args: maps (B, C, h, w) by name."""
        raise NotImplementedError

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Args: maps (B, C, h, w) by name. Returns logits (B, K, h, w)."""
        return self.decode(features).logits

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Runs the head by detectron2's contract.

        Args:
            features: maps (B, C, h, w) by name.
            targets: labels (B, H, W) int64, in training.

        Returns:
            In training, None and the losses: cross entropies of the logits and the auxiliary ones.
            In evaluation, logits (B, K, H, W) at the size of the images, and no losses.
        """
        output = self.decode(features)
        if not self.training:
            height, width = output.logits.shape[-2:]
            size = height * self.common_stride, width * self.common_stride
            return resize(output.logits, size, output.align_corners), {}
        losses = {"loss_sem_seg": self._loss(output.logits, targets, output.align_corners)}
        if output.aux_logits is not None:
            losses["loss_aux"] = _AUX_WEIGHT * self._loss(
                output.aux_logits, targets, output.align_corners
            )
        return None, losses

    def _loss(self, logits: Tensor, targets: Tensor | None, align_corners: bool) -> Tensor:
        assert targets is not None
        logits = resize(logits.float(), targets.shape[-2:], align_corners)
        return F.cross_entropy(logits, targets, ignore_index=self.ignore_value)


def chosen_maps(cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, ShapeSpec]:
    """The maps that MODEL.SEM_SEG_HEAD.IN_FEATURES names.

    Raises:
        ValueError: the backbone has no such map.
    """
    names = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES
    return {n: shape_of(input_shape, "MODEL.SEM_SEG_HEAD.IN_FEATURES", n) for n in names}

"""UPerNet: pyramid pooling of the deepest map, and a feature pyramid from it.

Shape letters: B images, C channels, K classes, h w a feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ..structures import SegOutput
from .head import Decoder
from .layers import (
    AuxiliaryHead,
    channel_dropout,
    classifier,
    conv_norm_relu,
    finest_first,
    join,
    resize,
)


@SEM_SEG_HEADS_REGISTRY.register()
class UPerNetDecoder(Decoder):
    """Pyramid pooling on the deepest map, a feature pyramid down from it, and all levels joined.

    The maps of the pyramid are features for contrast methods, `p2` to `p5` of four maps: the
    deepest is always `p5`, which the pooling gives, and each has `channels` channels.

    Args:
        input_shape: channels and strides of the maps of the backbone. Any number of maps, whose
            strides need not double.
        num_classes: K.
        channels: width of each part.
        pool_sizes: rows, and columns, of each grid that the deepest map is pooled to.
        norm: norm of all convolutions, "" for none. Batch norms cannot train on one image per
            process where `pool_sizes` has a 1: the pooled map then has one value per channel.
        dropout: rate of channel dropout before the last convolution and in the auxiliary head.
        aux_feature: map of an auxiliary head, `res4` where UPerNet is used with Swin; None for no
            such head.
        aux_channels: width of the auxiliary head.
        ignore_value: as for `Decoder`.

    Raises:
        ValueError: no such map, or a rate outside of [0, 1).

    Reference: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018,
        section 3.1.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        channels: int = 512,
        pool_sizes: Sequence[int] = (1, 2, 3, 6),
        norm: str = "BN",
        dropout: float = 0.1,
        aux_feature: str | None = None,
        aux_channels: int = 256,
        ignore_value: int = 255,
    ) -> None:
        shapes = finest_first(input_shape)
        super().__init__(min(s.stride for s in shapes.values()), ignore_value)
        self.in_features = list(shapes)
        self.out_features = [f"p{6 - len(shapes) + i}" for i in range(len(shapes))]
        *finer, deepest = (shape.channels for shape in shapes.values())
        self.pooling = PyramidPooling(deepest, channels, pool_sizes, norm=norm)
        self.laterals = nn.ModuleList(conv_norm_relu(c, channels, 1, norm=norm) for c in finer)
        self.outputs = nn.ModuleList(
            conv_norm_relu(channels, channels, 3, norm=norm) for _ in finer
        )
        self.fuse = conv_norm_relu(len(shapes) * channels, channels, 3, norm=norm)
        self.dropout = channel_dropout(dropout)
        self.predictor = classifier(channels, num_classes)
        self.aux_head = None
        if aux_feature is not None:
            self.aux_head = AuxiliaryHead(
                input_shape, aux_feature, aux_channels, num_classes, norm=norm, dropout=dropout
            )

    def decode(self, features: Mapping[str, Tensor]) -> SegOutput:
        """Runs the decoder.

        Args:
            features: maps (B, C, h, w) by name.

        Returns:
            Logits (B, K, h, w) at the size of the finest map; in training those of the auxiliary
            head; as features the maps of the pyramid, and as `pre_logits` what is classified,
            before dropout.

        Raises:
            ValueError: training on one image with batch norms, see `norm`.
        """
        *finer, deepest = (features[name] for name in self.in_features)
        top = self.pooling(deepest)
        levels = [top]
        for i in reversed(range(len(finer))):
            x = self.laterals[i](finer[i])
            top = x + resize(top, x.shape[-2:])
            levels.insert(0, self.outputs[i](top))
        pre_logits = self.fuse(join(levels))
        logits = self.predictor(self.dropout(pre_logits))
        aux_logits = None if self.aux_head is None else self.aux_head(features)
        pyramid = dict(zip(self.out_features, levels, strict=True))
        return SegOutput(logits, aux_logits, features={**pyramid, "pre_logits": pre_logits})


class PyramidPooling(nn.Module):
    """Joins a map with its means over grids of several sizes.

    Args:
        in_channels: of the map.
        channels: width of each branch and of the output.
        pool_sizes: rows, and columns, of each grid.
        norm: norm of all convolutions, "" for none.

    Reference: Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017, section 3.2.
    """

    def __init__(
        self, in_channels: int, channels: int, pool_sizes: Sequence[int], *, norm: str = "BN"
    ) -> None:
        super().__init__()
        if not pool_sizes or min(pool_sizes) < 1:
            raise ValueError(f"pool_sizes={list(pool_sizes)}: give at least one, each 1 or more.")
        self.pool_sizes = tuple(pool_sizes)
        self.branches = nn.ModuleList(
            conv_norm_relu(in_channels, channels, 1, norm=norm) for _ in pool_sizes
        )
        self.fuse = conv_norm_relu(in_channels + len(pool_sizes) * channels, channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Args: map (B, in_channels, h, w). Returns (B, channels, h, w)."""
        self._check_batch(x)
        means = zip(self.branches, grid_means(x, self.pool_sizes), strict=True)
        return self.fuse(join([x, *(branch(mean) for branch, mean in means)]))

    def _check_batch(self, x: Tensor) -> None:
        for size, branch in zip(self.pool_sizes, self.branches, strict=True):
            # Not for its subclasses, some of which count the images of all processes.
            unsynced = type(branch.norm) is nn.BatchNorm2d and branch.norm.training
            if unsynced and size == 1 and x.shape[0] == 1:
                raise ValueError(
                    "pyramid pooling to one value per channel, on a batch of one image: batch "
                    'norms cannot train on it. Set model.sem_seg_head.norm="GN", or give each '
                    "process two images or more."
                )


def grid_means(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Means over the cells of grids: `F.adaptive_avg_pool2d(x, size)` for each size.

    As products with matrices of shares, which read the map once for all sizes, have a
    deterministic gradient on GPUs, and export to ONNX for maps of any height and width.

    Args:
        x: (B, C, h, w).
        sizes: rows, and columns, of each grid.

    Returns:
        For each size a map (B, C, size, size).
    """
    height, width = x.shape[-2:]
    rows = [_shares(height, size, x) for size in sizes]
    columns = torch.cat([_shares(width, size, x) for size in sizes])
    means = (x @ columns.T).split(list(sizes), dim=3)
    return [row @ mean for row, mean in zip(rows, means, strict=True)]


def _shares(length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, length) share of each position in the mean of each cell. Cells share a position
    where their border falls on it."""
    position = torch.arange(length, device=like.device)
    cell = torch.arange(cells, device=like.device).unsqueeze(1)
    start, end = cell * length // cells, ((cell + 1) * length + cells - 1) // cells
    inside = (start <= position) & (position < end)
    inside = inside.to(torch.promote_types(like.dtype, torch.float32))
    return (inside / inside.sum(dim=1, keepdim=True)).to(like.dtype)

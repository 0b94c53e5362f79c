"""Projection heads: from feature maps to the space in which embeddings are contrasted.

Shape letters: B images, C feature channels, D embedding width, h w the size of a feature map,
N drawn pixels.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .kernels.gather import gather_draws
from .sets import (
    PixelDraw,
    at_least_fp32,
    stack_processes,
    unit_vectors,
)

Norm = Literal["batch", "layer"] | None
Order = Literal["relu_norm", "norm_relu"]
Projection = Literal["dense", "sampled"]


class Projector(nn.Sequential):
    """Maps a feature map to embeddings: hidden blocks of 1x1 conv, ReLU and norm, then a 1x1 conv.

    Called on a map it projects every pixel; `project_rows` projects drawn pixels alone, with the
    same parameters.

    Args:
        in_channels: C, channels of the feature map, which is also the width of hidden blocks.
        embed_dim: D, width of the embeddings.
        num_hidden: number of hidden blocks; Pissas et al. describe 2, their official code has 1, as
            the other methods do.
        norm: "batch", "layer" (over the channels of each pixel), or None; only without one have the
            hidden convolutions a bias.
        order: of ReLU and norm in a block: "relu_norm" as in multi-scale contrast, or "norm_relu"
            as in the official code of pixel contrast and PNE.
        bn_momentum: momentum of the running statistics of batch norms. They are never used, because
            the projector does not run at test time.

    Shape: (B, C, h, w) -> (B, D, h, w). The output is not normalised: only drawn pixels are, which
    gives the same values.

    Raises:
        ValueError: an argument out of its range.

    Reference: Pissas et al., "Multi-scale and Cross-scale Contrastive Learning for Semantic
        Segmentation", ECCV 2022, section 3.2; Wang et al., "Exploring Cross-Image Pixel Contrast
        for Semantic Segmentation", ICCV 2021, section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int = 256,
        *,
        num_hidden: int = 2,
        norm: Norm = "batch",
        order: Order = "relu_norm",
        bn_momentum: float = 0.1,
    ) -> None:
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("embed_dim", embed_dim, 1),
            ("num_hidden", num_hidden, 0),
        ):
            if value < least:
                raise ValueError(f"Projector({name}={value}): needs at least {least}.")
        if norm not in ("batch", "layer", None):
            raise ValueError(f"Projector(norm={norm!r}): choose 'batch', 'layer' or None.")
        if order not in ("relu_norm", "norm_relu"):
            raise ValueError(f"Projector(order={order!r}): choose 'relu_norm' or 'norm_relu'.")
        layers: list[nn.Module] = []
        for _ in range(num_hidden):
            layers.append(nn.Conv2d(in_channels, in_channels, 1, bias=norm is None))
            after: list[nn.Module] = [nn.ReLU()]
            if norm == "batch":
                after.append(nn.BatchNorm2d(in_channels, momentum=bn_momentum))
            elif norm == "layer":
                after.append(ChannelLayerNorm(in_channels))
            layers += after if order == "relu_norm" else reversed(after)
        layers.append(nn.Conv2d(in_channels, embed_dim, 1))
        super().__init__(*layers)

    def project_rows(self, rows: Tensor, valid: Tensor) -> Tensor:
        """Projects pixels that have been read off the feature map.

        In training mode the batch norms use the statistics of the valid rows, through which
        gradients flow; with SyncBatchNorm those of the rows of all processes, each of which has to
        make the call, with or without rows.

        Args:
            rows: (N, C).
            valid: (N,) bool; other rows, which pad a draw, do not enter statistics.

        Returns:
            (N, D), connected to the graph and to every parameter even where N = 0.
        """
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                rows = F.linear(rows, layer.weight.flatten(1), layer.bias)
            elif isinstance(layer, _BatchNorm):
                # What pads the draw may lie many deviations from the others, and overflow.
                rows = _batch_norm(layer, rows, valid).where(valid[:, None], 0)
            else:
                rows = layer(rows)
        return rows


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, of maps (B, C, h, w) and of rows (N, C)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _batch_norm(layer: _BatchNorm, rows: Tensor, valid: Tensor) -> Tensor:
    """Normalises rows (N, C) as the layer would the pixels of a map that has the valid ones only.

    Without any pixel the running statistics stay as they are.
    """
    if not layer.training:
        return F.batch_norm(
            rows, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
        )
    values, weight = at_least_fp32(rows), valid.to(at_least_fp32(rows).dtype)[:, None]

    def total(of_rows: Tensor) -> Tensor:
        own = of_rows.sum(dim=0)
        return stack_processes(own).sum(dim=0) if isinstance(layer, nn.SyncBatchNorm) else own

    count = total(weight).detach()
    mean = total(values * weight) / count.clamp(min=1)
    var = total((values - mean).square() * weight) / count.clamp(min=1)
    with torch.no_grad():
        exists = (count > 0).to(mean.dtype)
        unbiased = var * count / (count - 1).clamp(min=1)
        # As PyTorch's own update, this one is none of autograd's business: the graph of a map that
        # went through the layer before holds these buffers, but makes no use of them in training.
        for running, new in ((layer.running_mean, mean), (layer.running_var, unbiased)):
            running.data.lerp_(new, layer.momentum * exists)  # pyright: ignore[reportOptionalMemberAccess, reportOptionalOperand]
        layer.num_batches_tracked.add_(exists[0].to(torch.int64))  # pyright: ignore[reportOptionalMemberAccess]
    return ((values - mean) * (var + layer.eps).rsqrt() * layer.weight + layer.bias).to(rows.dtype)  # pyright: ignore[reportOptionalOperand]


class MultiScaleProjector(nn.Module):
    """One `Projector` per feature map.

    Args:
        in_channels: channels of each feature map by name, e.g. {"res2": 64, "res5": 512}.
        embed_dim, num_hidden, norm, order, bn_momentum: as in `Projector`, the same for every map.
        projection: "dense" projects the maps, as in the papers; "sampled" the drawn pixels alone.
            Parameters and checkpoints are the same, and without batch norms losses and gradients
            too; batch norms then have the statistics of the drawn pixels, in which all classes
            weigh alike.

    Raises:
        ValueError: no map, a name that no module can have, or an unknown projection.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        embed_dim: int = 256,
        *,
        num_hidden: int = 2,
        norm: Norm = "batch",
        order: Order = "relu_norm",
        bn_momentum: float = 0.1,
        projection: Projection = "dense",
    ) -> None:
        super().__init__()
        if not in_channels:
            raise ValueError("MultiScaleProjector(in_channels={}): name at least one feature map.")
        for name in in_channels:
            if not name or "." in name:
                raise ValueError(
                    f"in_channels: {name!r} cannot name a head: rename the feature map to a name "
                    "without dots."
                )
        if projection not in ("dense", "sampled"):
            raise ValueError(f"projection={projection!r}: choose 'dense' or 'sampled'.")
        self.embed_dim = embed_dim
        self.projection = projection
        self.heads = nn.ModuleDict(
            {
                name: Projector(
                    channels,
                    embed_dim,
                    num_hidden=num_hidden,
                    norm=norm,
                    order=order,
                    bn_momentum=bn_momentum,
                )
                for name, channels in in_channels.items()
            }
        )

    def keep(self, names: Iterable[str]) -> None:
        """Drops the heads of all other maps, so that no parameter goes without a gradient.

        Raises:
            ValueError: a name has no head.
        """
        names = list(names)
        for name in names:
            if name not in self.heads:
                near = difflib.get_close_matches(name, list(self.heads), n=1, cutoff=0.0)
                raise ValueError(
                    f"no projector for feature map {name!r}: in_channels has "
                    f"{sorted(self.heads)}. Did you mean {near[0]!r}?"
                )
        for name in [name for name in self.heads if name not in names]:
            del self.heads[name]

    def forward(
        self, features: Mapping[str, Tensor], done: dict[nn.Module, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Projects every pixel of the maps that have a head, unless `projection` is "sampled".

        Args:
            features: feature maps (B, C, h, w) by name; others than the projector's are ignored.
            done: what heads have projected in this step, for methods that share them; is added to.

        Returns:
            Maps (B, D, h, w) by name, not normalised; or the feature maps, for `embed`.

        Raises:
            ValueError: a feature map is missing, or has another number of channels.
        """
        done = {} if done is None else done
        maps = {}
        for name, head in self.heads.items():
            if name not in features:
                raise ValueError(
                    f"feature map {name!r} is not among those of the model, {sorted(features)}: "
                    "name it in the contrast's in_channels as the backbone or the decoder does."
                )
            x = features[name]
            if self.projection == "dense":
                x = done[head] if head in done else done.setdefault(head, head(x))
            maps[name] = x
        return maps

    def embed(
        self, maps: Mapping[str, Tensor], draws: Mapping[str, Sequence[PixelDraw]]
    ) -> dict[str, Tensor]:
        """Unit vectors of the pixels drawn from maps that `forward` returned.

        Args:
            maps: by name.
            draws: from some of the maps.

        Returns:
            For each of these (N, D), the rows of one draw after those of the other.
        """
        dense = self.projection == "dense"
        every = gather_draws([maps[name] for name in draws], list(draws.values()), normalize=dense)
        rows = dict(zip(draws, every, strict=True))
        if dense:
            return rows
        for name, of_map in draws.items():
            valid = torch.cat([draw.labels for draw in of_map]) >= 0
            rows[name] = unit_vectors(self.heads[name].project_rows(rows[name], valid))  # pyright: ignore[reportCallIssue]
        return rows

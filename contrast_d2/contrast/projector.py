"""The training-only heads that map backbone features to the space where they are contrasted.

Shape letters: B images, C feature channels, D embedding width, h w the size of a feature map,
A drawn pixels, N parts of a population.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed import gather_rows, world_size

Norm = Literal["batch", "layer"] | None
Order = Literal["relu_norm", "norm_relu"]

# Elements of a hidden activation that `map_statistics` holds at a time.
_CHUNK_ELEMENTS = 1 << 22


class ChannelStatistics(NamedTuple):
    """What a batch norm knows of a population of pixels.

    Attributes:
        mean: (C,) fp32 (fp64 for fp64 input).
        var: (C,), divided by the number of pixels, not by one less.
        count: 0-dim, number of pixels; mean and var are 0 where it is 0.
    """

    mean: Tensor
    var: Tensor
    count: Tensor


class Projector(nn.Sequential):
    """Maps a feature map to embeddings: hidden blocks of 1x1 conv, ReLU and norm, then a 1x1 conv.

    Called on a map it projects every pixel. `project_rows` projects drawn pixels alone, with the
    same parameters: the two are equal to rounding when the norms use the same statistics.

    Args:
        in_channels: C, channels of the feature map.
        embed_dim: D, width of the embeddings.
        num_hidden: number of hidden blocks; Pissas et al. describe 2, their release has 1, as the
            other methods do.
        norm: "batch", "layer" (over the channels of each pixel, without statistics of other
            pixels), or None; only without one have the hidden convolutions a bias.
        order: of ReLU and norm in a block: "relu_norm" as in multi-scale contrast, or "norm_relu"
            as in the releases of pixel contrast and PNE.
        max_hidden_channels: hidden blocks are as wide as the feature map, but no wider than this;
            None for no bound.
        bn_momentum: momentum of the running statistics of batch norms. They are never used, because
            the projector does not run at test time; the release has 3e-4.

    Shape: (B, C, h, w) -> (B, D, h, w). The output is not normalised: that is done to the drawn
    pixels, which gives the same values without touching the whole map.

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
        max_hidden_channels: int | None = None,
        bn_momentum: float = 0.1,
    ) -> None:
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("embed_dim", embed_dim, 1),
            ("num_hidden", num_hidden, 0),
            ("max_hidden_channels", max_hidden_channels, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"Projector({name}={value}): needs at least {least}.")
        if norm not in ("batch", "layer", None):
            raise ValueError(f"Projector(norm={norm!r}): choose 'batch', 'layer' or None.")
        if order not in ("relu_norm", "norm_relu"):
            raise ValueError(f"Projector(order={order!r}): choose 'relu_norm' or 'norm_relu'.")
        hidden = min(in_channels, max_hidden_channels or in_channels)
        layers: list[nn.Module] = []
        width = in_channels
        for _ in range(num_hidden):
            layers.append(nn.Conv2d(width, hidden, 1, bias=norm is None))
            after: list[nn.Module] = [nn.ReLU()]
            if norm is not None:
                after.append(
                    nn.BatchNorm2d(hidden, momentum=bn_momentum)
                    if norm == "batch"
                    else ChannelLayerNorm(hidden)
                )
            layers += after if order == "relu_norm" else reversed(after)
            width = hidden
        layers.append(nn.Conv2d(width, embed_dim, 1))
        super().__init__(*layers)

    @property
    def has_batch_norm(self) -> bool:
        """Whether an embedding depends on the statistics of other pixels."""
        return any(isinstance(layer, _BatchNorm) for layer in self)

    def project_rows(
        self,
        rows: Tensor,
        valid: Tensor,
        statistics: Sequence[ChannelStatistics] | None = None,
    ) -> Tensor:
        """Projects pixels that have been read off the feature map.

        In training mode the batch norms use the given statistics, or else those of the valid rows,
        through which gradients then flow. With SyncBatchNorm they are those of the rows of all
        processes, each of which has to make the call; it may do so with no rows at all. A
        population without any pixel leaves the running statistics as they are.

        Args:
            rows: (A, C).
            valid: (A,) bool; other rows, which pad a draw, do not enter statistics.
            statistics: one for each batch norm, as `map_statistics` returns; constants.

        Returns:
            (A, D), connected to the graph and to every parameter even where A = 0.
        """
        given = iter(statistics or ())
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                rows = F.linear(rows, layer.weight.flatten(1), layer.bias)
            elif isinstance(layer, _BatchNorm):
                found = next(given) if statistics else _over_processes(layer, _of_rows(rows, valid))
                # What pads the draw may lie far from the others, in their deviations, and overflow.
                rows = _batch_norm(layer, rows, found).where(valid[:, None], 0)
            else:
                rows = layer(rows)
        return rows

    @torch.no_grad()
    def map_statistics(self, features: Tensor) -> list[ChannelStatistics]:
        """The statistics that the batch norms have in a training step on the whole map.

        They come without a graph: used in `project_rows` they are constants of the backward pass,
        whereas a batch norm also sends gradients through them. The cost is that of the hidden
        convolutions on the whole map, forward only and n (n + 1) / 2 of them for n hidden blocks,
        since each needs the statistics of the one before. The map is taken in chunks, so the memory
        is that of a chunk. With SyncBatchNorm they are those of the maps of all processes.

        Args:
            features: (B, C, h, w).
        """
        found: list[ChannelStatistics] = []
        for depth, layer in enumerate(self):
            if isinstance(layer, _BatchNorm):
                parts = [_of_map(self._hidden(chunk, depth, found)) for chunk in _chunks(features)]
                found.append(_over_processes(layer, _joined(parts)))
        return found

    def _hidden(
        self, features: Tensor, depth: int, statistics: Sequence[ChannelStatistics]
    ) -> Tensor:
        """The activation before layer `depth`, given the statistics of the norms up to there."""
        given = iter(statistics)
        hidden = features
        for layer in islice(self, depth):
            if isinstance(layer, _BatchNorm):
                mean, var, _ = next(given)
                hidden = F.batch_norm(hidden, mean, var, layer.weight, layer.bias, eps=layer.eps)
            else:
                hidden = layer(hidden)
        return hidden


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, of maps (B, C, h, w) and of rows (A, C)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def _of_rows(rows: Tensor, valid: Tensor) -> ChannelStatistics:
    """Statistics of the valid ones among rows (A, C), with a graph."""
    rows = _at_least_fp32(rows)
    weight = valid.to(rows.dtype)
    count = weight.sum()
    share = (weight / count.clamp(min=1))[:, None]
    mean = (rows * share).sum(dim=0)
    return ChannelStatistics(mean, ((rows - mean).square() * share).sum(dim=0), count)


def _of_map(hidden: Tensor) -> ChannelStatistics:
    """Statistics of all pixels of a map (B, C, h, w)."""
    hidden = _at_least_fp32(hidden)
    mean = hidden.mean(dim=(0, 2, 3))
    # As accurate as var_mean, which takes seven times as long on a CPU.
    var = (hidden - mean[:, None, None]).square_().mean(dim=(0, 2, 3))
    return ChannelStatistics(mean, var, mean.new_full((), hidden.numel() // hidden.shape[1]))


def _chunks(features: Tensor) -> Iterator[Tensor]:
    """Cuts a map into parts of several images, or of several rows of one image."""
    _, channels, height, width = features.shape
    images = max(1, _CHUNK_ELEMENTS // (channels * height * width))
    rows = max(1, _CHUNK_ELEMENTS // (channels * width))
    for part in features.split(images):
        yield from part.split(rows, dim=2)


def _over_processes(layer: _BatchNorm, statistics: ChannelStatistics) -> ChannelStatistics:
    """Those of all processes, for a norm that is synchronised."""
    if not isinstance(layer, nn.SyncBatchNorm) or world_size() == 1:
        return statistics
    mean, var, count = statistics
    parts = gather_rows(torch.cat([mean, var, count[None]])[None], [1] * world_size())
    channels = len(mean)
    return _joined(
        [ChannelStatistics(part[:channels], part[channels:-1], part[-1].detach()) for part in parts]
    )


def _joined(parts: Sequence[ChannelStatistics]) -> ChannelStatistics:
    """Statistics of a population from those of its parts."""
    means_NC, vars_NC, counts_N = (torch.stack(values) for values in zip(*parts, strict=True))
    count = counts_N.sum()
    share_N = (counts_N / count.clamp(min=1))[:, None]
    mean = (means_NC * share_N).sum(dim=0)
    var = ((vars_NC + (means_NC - mean).square()) * share_N).sum(dim=0)
    return ChannelStatistics(mean, var, count)


def _batch_norm(layer: _BatchNorm, rows: Tensor, statistics: ChannelStatistics) -> Tensor:
    """Normalises rows (A, C) as the layer would, and moves its running statistics."""
    mean, var = layer.running_mean, layer.running_var
    if layer.training:
        mean, var, count = statistics
        _move_running_statistics(layer, statistics)
    scale = layer.weight * (var + layer.eps).rsqrt()  # pyright: ignore[reportOptionalOperand]
    return ((rows - mean) * scale + layer.bias).to(rows.dtype)  # pyright: ignore[reportOperatorIssue]


@torch.no_grad()
def _move_running_statistics(layer: _BatchNorm, statistics: ChannelStatistics) -> None:
    mean, var, count = statistics
    exists = (count > 0).to(mean.dtype)
    unbiased = var * (count / (count - 1).clamp(min=1))
    # As PyTorch's own update, this one is none of autograd's business: the graph of a map that went
    # through the layer before holds these buffers, but makes no use of them in training.
    layer.running_mean.data.lerp_(mean, layer.momentum * exists)  # pyright: ignore[reportOptionalMemberAccess, reportOptionalOperand]
    layer.running_var.data.lerp_(unbiased, layer.momentum * exists)  # pyright: ignore[reportOptionalMemberAccess, reportOptionalOperand]
    layer.num_batches_tracked.add_(exists.to(layer.num_batches_tracked.dtype))  # pyright: ignore[reportOptionalMemberAccess]


def _at_least_fp32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


class MultiScaleProjector(nn.Module):
    """One `Projector` per feature map.

    Args:
        in_channels: channels of each feature map by name, e.g. {"res2": 64, "res5": 512}.
        embed_dim, num_hidden, norm, order, max_hidden_channels, bn_momentum: as in `Projector`, the
            same for every map.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        embed_dim: int = 256,
        *,
        num_hidden: int = 2,
        norm: Norm = "batch",
        order: Order = "relu_norm",
        max_hidden_channels: int | None = None,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if not in_channels:
            raise ValueError("MultiScaleProjector(in_channels={}): name at least one feature map.")
        self.embed_dim = embed_dim
        self.heads = nn.ModuleDict(
            {
                name: Projector(
                    channels,
                    embed_dim,
                    num_hidden=num_hidden,
                    norm=norm,
                    order=order,
                    max_hidden_channels=max_hidden_channels,
                    bn_momentum=bn_momentum,
                )
                for name, channels in in_channels.items()
            }
        )

    @property
    def has_batch_norm(self) -> bool:
        """Whether the heads have batch norms."""
        return any(head.has_batch_norm for head in self.heads.values())

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

    def select(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The feature maps that have a head, in the order of the heads.

        Raises:
            ValueError: a feature map is missing.
        """
        missing = [name for name in self.heads if name not in features]
        if missing:
            raise ValueError(
                f"feature maps {missing} are not among those of the model, {sorted(features)}: "
                "name them in the contrast's in_channels as the backbone or the decoder does."
            )
        return {name: features[name] for name in self.heads}

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Projects every pixel of the maps that have a head.

        Args:
            features: feature maps (B, C, h, w) by name; others than the projector's are ignored.

        Returns:
            Maps (B, D, h, w) by name, not normalised.

        Raises:
            ValueError: a feature map is missing.
        """
        return {name: self.heads[name](x) for name, x in self.select(features).items()}

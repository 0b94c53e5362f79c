"""The training-only heads that map backbone features to the space where they are contrasted.

Shape letters: B images, C feature channels, D embedding width, h w the size of a feature map.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Projector(nn.Sequential):
    """Maps a feature map to embeddings: hidden blocks of 1x1 conv-ReLU-BN, then a linear 1x1 conv.

    Args:
        in_channels: C, channels of the feature map.
        embed_dim: D, width of the embeddings.
        num_hidden: number of hidden C -> C blocks; the paper describes 2, its release has 1.
        bn_momentum: momentum of the running statistics of the batch norms. They are never used,
            because the projector does not run at test time; the release has 3e-4.

    Shape: (B, C, h, w) -> (B, D, h, w). The output is not normalised: `gather_embeddings`
    normalises the drawn pixels, which gives the same values without touching the whole map.

    Reference: Pissas et al., "Multi-scale and Cross-scale Contrastive Learning for Semantic
        Segmentation", ECCV 2022, section 3.2.
    """

    def __init__(
        self,
        in_channels: int,
        embed_dim: int = 256,
        *,
        num_hidden: int = 2,
        bn_momentum: float = 0.1,
    ) -> None:
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("embed_dim", embed_dim, 1),
            ("num_hidden", num_hidden, 0),
        ):
            if value < least:
                raise ValueError(f"Projector({name}={value}): needs at least {least}.")
        layers = []
        for _ in range(num_hidden):
            layers += [
                nn.Conv2d(in_channels, in_channels, 1, bias=False),
                nn.ReLU(),
                nn.BatchNorm2d(in_channels, momentum=bn_momentum),
            ]
        layers.append(nn.Conv2d(in_channels, embed_dim, 1))
        super().__init__(*layers)


class MultiScaleProjector(nn.Module):
    """One `Projector` per feature map.

    Args:
        in_channels: channels of each feature map by name, e.g. {"res2": 64, "res5": 512}.
        embed_dim, num_hidden, bn_momentum: as in `Projector`, the same for every map.
    """

    def __init__(
        self,
        in_channels: Mapping[str, int],
        embed_dim: int = 256,
        *,
        num_hidden: int = 2,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if not in_channels:
            raise ValueError("MultiScaleProjector(in_channels={}): name at least one feature map.")
        self.embed_dim = embed_dim
        self.heads = nn.ModuleDict(
            {
                name: Projector(channels, embed_dim, num_hidden=num_hidden, bn_momentum=bn_momentum)
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

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Projects the maps that have a head.

        Args:
            features: feature maps (B, C, h, w) by name; others than the projector's are ignored.

        Returns:
            Maps (B, D, h, w) by name, not normalised.

        Raises:
            ValueError: a feature map is missing.
        """
        missing = [name for name in self.heads if name not in features]
        if missing:
            raise ValueError(
                f"feature maps {missing} are not among those of the model, {sorted(features)}: "
                "name them in the contrast's in_channels as the backbone or the decoder does."
            )
        return {name: head(features[name]) for name, head in self.heads.items()}


def gather_embeddings(embeddings: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    """Reads pixels off an embedding map and normalises them.

    Args:
        embeddings: (B, D, h, w), not normalised.
        image: (A,) int64, index in 0..B-1 of each drawn pixel.
        pixel: (A,) int64, row-major index in 0..h*w-1 of each drawn pixel.

    Returns:
        (A, D) unit vectors, fp32 (fp64 for fp64 input), connected to the graph even where A = 0.
    """
    drawn = embeddings.flatten(2)[image, :, pixel]
    dtype = torch.float64 if drawn.dtype == torch.float64 else torch.float32
    return nn.functional.normalize(drawn.to(dtype), dim=1)

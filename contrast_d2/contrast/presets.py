"""The methods with the values of their papers, for feature maps and a number of classes.

    contrast = ms_cs({"res2": 64, "res3": 128, "res4": 256, "res5": 512}, num_classes=19)
    losses, statistics = contrast(features, labels)

Anything else is built from the classes, of which these functions are examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .centres import CentreRegulariser
from .clusters import ClusteredPrototypes
from .contextual import Contextrast, Negatives
from .hard_sampling import HardAnchorSampler
from .memory import MemoryBank
from .multiscale import MultiScaleContrast
from .pairs import SemiHardPairs
from .pixel import PixelContrast
from .pne import PNE
from .projector import MultiScaleProjector, Norm, Projection
from .prototypes import FixedPrototypes
from .region import Centres, RegionContrast
from .sampling import BalancedSampler, LabelSampling, Sampler
from .tree import TreeTriplets

CrossScale = Sequence[tuple[str, str, float]]


def ms_cs(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    scale_weights: Mapping[str, float] | None = None,
    cross_scale: CrossScale | None = None,
    weight: float = 0.1,
    temperature: float = 0.1,
    max_anchors: int = 10_000,
    min_per_class: int = 32,
    negatives: Sampler | None = None,
    embed_dim: int = 256,
    num_hidden: int = 2,
    norm: Norm = "batch",
    projection: Projection = "dense",
    across_processes: bool = False,
) -> MultiScaleContrast:
    """Multi- and cross-scale contrast as we use it: `ms_cs_paper` with a floor of anchors a class.

    Args:
        channels: of each feature map, from fine to coarse.
        num_classes: K.
        scale_weights: by map; None for 1, 0.7, 0.4 and 0.1 in the order of `channels`.
        cross_scale: pairs of maps with weights; None for the first map with each of the last two.
        weight, temperature: as in `MultiScaleContrast`; the paper gives the weight no value, the
            official code has 0.1.
        max_anchors: per map, of the whole batch; 10,000 is the official code's for the images of
            one GPU, and without a value in the paper.
        min_per_class: see `BalancedSampler`. In the paper one tiny object cuts every class to its
            size.
        negatives: as in `MultiScaleContrast`.
        embed_dim, num_hidden, norm, projection: as in `MultiScaleProjector`.
        across_processes: as in `ContrastMethod`.

    Reference: Pissas et al., ECCV 2022, sections 3.2 to 3.4 and 4.3.
    """
    return MultiScaleContrast(
        MultiScaleProjector(
            channels, embed_dim, num_hidden=num_hidden, norm=norm, projection=projection
        ),
        BalancedSampler(num_classes, max_anchors=max_anchors, min_per_class=min_per_class),
        scale_weights=_scale_weights(channels) if scale_weights is None else scale_weights,
        cross_scale=_cross_scale(channels) if cross_scale is None else cross_scale,
        weight=weight,
        temperature=temperature,
        negatives=negatives,
        across_processes=across_processes,
    )


def ms_cs_paper(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    scale_weights: Mapping[str, float] | None = None,
    cross_scale: CrossScale | None = None,
    weight: float = 0.1,
    temperature: float = 0.1,
    max_anchors: int = 10_000,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> MultiScaleContrast:
    """Multi- and cross-scale contrast to the letter of its paper: the rarest class of the batch
    sets how many anchors every class has. Arguments as in `ms_cs`.

    Reference: Pissas et al., ECCV 2022, sections 3.2 to 3.4 and 4.3.
    """
    return ms_cs(
        channels,
        num_classes,
        scale_weights=scale_weights,
        cross_scale=cross_scale,
        weight=weight,
        temperature=temperature,
        max_anchors=max_anchors,
        min_per_class=0,
        embed_dim=embed_dim,
        across_processes=across_processes,
    )


def ms_cs_release(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    scale_weights: Mapping[str, float] | None = None,
    cross_scale: CrossScale | None = None,
    weight: float = 0.1,
    temperature: float = 0.1,
    max_anchors: int = 10_000,
    embed_dim: int = 256,
    label_sampling: LabelSampling = "nearest",
    across_processes: bool = False,
) -> MultiScaleContrast:
    """Multi- and cross-scale contrast as its official code does it: the same number of anchors
    for every image and class with at least 5 pixels, projectors of one hidden block, and a mean
    that counts anchors without positives.

    Args:
        label_sampling: "majority" is the default of its code, which all of its configurations
            override with "nearest".
        others: as in `ms_cs`.
    """
    return MultiScaleContrast(
        MultiScaleProjector(channels, embed_dim, num_hidden=1, bn_momentum=3e-4),
        BalancedSampler(
            num_classes,
            balance="image_class",
            max_anchors=max_anchors,
            min_pixels=5,
            max_per_group=2500,
            label_sampling=label_sampling,
        ),
        scale_weights=_scale_weights(channels) if scale_weights is None else scale_weights,
        cross_scale=_cross_scale(channels) if cross_scale is None else cross_scale,
        weight=weight,
        temperature=temperature,
        count_empty_anchors=True,
        across_processes=across_processes,
    )


def pixel_contrast(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    feature: str | None = None,
    weight: float = 0.1,
    temperature: float = 0.1,
    max_anchors: int = 10_000,
    warmup_iters: int = 5000,
    memory: MemoryBank | None = None,
    pairs: SemiHardPairs | None = None,
    negatives: Sampler | None = None,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> PixelContrast:
    """Pixel contrast with the anchors of its paper: 50 of each class, half of them hard.

    Args:
        channels: of the feature map, by its name.
        num_classes: K.
        feature: which map, where `channels` has several.
        weight: as in `PixelContrast`; the official code's without a memory. With one, code and
            paper have 1.
        temperature: the paper's; the official configurations for PASCAL-Context and COCO-Stuff
            have 0.07.
        max_anchors: of the whole batch.
        warmup_iters: iterations without contrast; of 40,000 the official code has 5000.
        memory, pairs, negatives: as in `PixelContrast`.
        embed_dim: as in `MultiScaleProjector`.
        across_processes: as in `ContrastMethod`.

    Reference: Wang et al., ICCV 2021, sections 3.2 and 3.3; weight and warm-up from its official
        code.
    """
    return PixelContrast(
        _pixel_head(channels, embed_dim),
        HardAnchorSampler(num_classes, max_anchors=max_anchors, max_per_group=50),
        feature=_only(channels) if feature is None else feature,
        weight=weight,
        temperature=temperature,
        memory=memory,
        pairs=pairs,
        negatives=negatives,
        warmup_iters=warmup_iters,
        across_processes=across_processes,
    )


def pixel_contrast_release(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    feature: str | None = None,
    weight: float = 0.1 * 0.1 / 0.07,
    temperature: float = 0.1,
    max_anchors: int = 1024,
    max_per_group: int = 100,
    warmup_iters: int = 5000,
    memory: MemoryBank | None = None,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> PixelContrast:
    """Pixel contrast with the anchors and factors of its official code.

    It scales the loss by temperature / 0.07, and its `max_anchors` are for the images of one GPU.
    With a memory it takes one anchor of each image and class, which its halves leave to the rightly
    predicted pixels, and contrasts with the memory alone, where ours holds the batch as well.

    Args:
        max_per_group: anchors of each image and class that has more pixels than that.
        others: as in `pixel_contrast`.
    """
    return PixelContrast(
        _pixel_head(channels, embed_dim),
        HardAnchorSampler(
            num_classes,
            balance="image_class",
            max_anchors=max_anchors,
            max_per_group=max_per_group,
            min_pixels=max_per_group + 1,
            hard_share=(max_per_group // 2) / max_per_group,
            fill_from="easy",
        ),
        feature=_only(channels) if feature is None else feature,
        weight=weight,
        temperature=temperature,
        memory=memory,
        warmup_iters=warmup_iters,
        across_processes=across_processes,
    )


def contextrast(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    layers: Mapping[str, float] | None = None,
    weight: float = 0.1,
    temperature: float = 0.1,
    negatives: Negatives = "other_classes",
    embed_dim: int = 256,
    num_hidden: int = 1,
    across_processes: bool = False,
) -> Contextrast:
    """Contextrast as its paper states it, with a temperature and a mixture that it does not state.

    Args:
        channels: of each feature map, from fine to coarse.
        num_classes: K.
        layers: weights by map; None for 0.1, 0.4, 0.7 and 1 in the order of `channels`.
        weight, temperature, negatives: as in `Contextrast`.
        embed_dim, num_hidden: as in `MultiScaleProjector`.
        across_processes: as in `ContrastMethod`.

    Reference: Sung et al., CVPR 2024.
    """
    if layers is None:
        layers = dict(zip(channels, (0.1, 0.4, 0.7, 1.0), strict=False))
    return Contextrast(
        MultiScaleProjector(channels, embed_dim, num_hidden=num_hidden),
        num_classes,
        layers=layers,
        weight=weight,
        temperature=temperature,
        deepest_weight=0.5,
        boundary_fraction=0.5,
        negatives=negatives,
        across_processes=across_processes,
    )


def pne(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    feature: str | None = None,
    weight: float = 1.3,
    temperature: float = 1.0,
    max_hard: float | int = 199 / 8192,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> PNE:
    """Positive-negative equal contrast with the values of its official code, random draws, and a
    gate that is the same share of any map.

    Args:
        weight, temperature, max_hard: as in `PNE`.
        others: as in `pixel_contrast`.

    Reference: Wang et al., Neurocomputing 2023 (arXiv:2207.01417).
    """
    return PNE(
        _pixel_head(channels, embed_dim),
        num_classes,
        feature=_only(channels) if feature is None else feature,
        weight=weight,
        temperature=temperature,
        samples_per_group=100,
        max_hard=max_hard,
        across_processes=across_processes,
    )


def pne_release(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    feature: str | None = None,
    weight: float = 1.3,
    temperature: float = 1.0,
    max_hard: int = 199,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> PNE:
    """Positive-negative equal contrast as its official code does it: pixels in raster order, no
    gradient through an anchor's length, and a gate in pixels. Arguments as in `pne`."""
    return PNE(
        _pixel_head(channels, embed_dim),
        num_classes,
        feature=_only(channels) if feature is None else feature,
        weight=weight,
        temperature=temperature,
        samples_per_group=100,
        max_hard=max_hard,
        official_code=True,
        across_processes=across_processes,
    )


def region_contrast(
    channels: Mapping[str, int],
    num_classes: int,
    memory: MemoryBank,
    *,
    feature: str | None = None,
    centres: Centres = "dynamic",
    weight: float = 1.0,
    temperature: float = 0.2,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> RegionContrast:
    """Region contrast by the equations of its paper, through the head of pixel contrast, which is
    ours: the official code contrasts the decoder's features as they are.

    Args:
        memory, centres, weight, temperature: as in `RegionContrast`.
        others: as in `pixel_contrast`.

    Reference: Hu et al., ICCV 2021.
    """
    return RegionContrast(
        _pixel_head(channels, embed_dim),
        num_classes,
        memory,
        feature=_only(channels) if feature is None else feature,
        centres=centres,
        weight=weight,
        temperature=temperature,
        across_processes=across_processes,
    )


def fixed_prototypes(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    feature: str | None = None,
    weight: float = 0.1,
    temperature: float = 0.1,
    max_anchors: int = 10_000,
    min_per_class: int = 32,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> FixedPrototypes:
    """Fixed prototypes as anchors of class-balanced pixels. Of the paper we have the abstract: all
    values are ours.

    Args:
        weight, temperature: as in `FixedPrototypes`.
        max_anchors, min_per_class: pixels, as in `BalancedSampler`.
        others: as in `pixel_contrast`.

    Reference: Ren et al., TCSVT 2024.
    """
    return FixedPrototypes(
        _pixel_head(channels, embed_dim),
        BalancedSampler(num_classes, max_anchors=max_anchors, min_per_class=min_per_class),
        feature=_only(channels) if feature is None else feature,
        weight=weight,
        temperature=temperature,
        across_processes=across_processes,
    )


def clustered_prototypes(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    feature: str | None = None,
    prototypes_per_class: int = 10,
    weight: float = 0.01,
    distance_weight: float = 0.001,
    temperature: float = 0.1,
    momentum: float = 0.999,
    max_anchors: int = 10_000,
    min_per_class: int = 32,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> ClusteredPrototypes:
    """Clustered prototypes beside the classifier, with the values of the official code where they
    are its classifier; sampler, projector and temperature are ours.

    Args:
        prototypes_per_class, weight, distance_weight, temperature, momentum: as in
            `ClusteredPrototypes`.
        max_anchors, min_per_class: pixels, as in `BalancedSampler`.
        others: as in `pixel_contrast`.

    Reference: Zhou et al., "Rethinking Semantic Segmentation: A Prototype View", CVPR 2022.
    """
    return ClusteredPrototypes(
        _pixel_head(channels, embed_dim),
        BalancedSampler(num_classes, max_anchors=max_anchors, min_per_class=min_per_class),
        feature=_only(channels) if feature is None else feature,
        prototypes_per_class=prototypes_per_class,
        weight=weight,
        distance_weight=distance_weight,
        temperature=temperature,
        momentum=momentum,
        across_processes=across_processes,
    )


def centre_regulariser(
    channels: Mapping[str, int],
    num_classes: int,
    *,
    feature: str | None = None,
    weight: float = 0.8,
    scale: float = 5.0,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> CentreRegulariser:
    """The centre regulariser with weight and scale of its official code, and a projector of ours.

    Args:
        weight, scale: as in `CentreRegulariser`.
        others: as in `pixel_contrast`.

    Reference: Zhong et al., CVPR 2023.
    """
    return CentreRegulariser(
        _pixel_head(channels, embed_dim),
        num_classes,
        feature=_only(channels) if feature is None else feature,
        weight=weight,
        scale=scale,
        across_processes=across_processes,
    )


def tree_triplets(
    channels: Mapping[str, int],
    num_classes: int,
    groups: Mapping[str, Sequence[int]],
    *,
    feature: str | None = None,
    margin: float = 0.6,
    weight: float = 0.5,
    max_anchors: int = 10_000,
    min_per_class: int = 32,
    embed_dim: int = 256,
    across_processes: bool = False,
) -> TreeTriplets:
    """Triplets along a class tree, with margin, weight and projector of a public code of HSSN.

    Args:
        groups, margin, weight: as in `TreeTriplets`.
        max_anchors, min_per_class: pixels, as in `BalancedSampler`.
        others: as in `pixel_contrast`.

    Reference: Li et al., CVPR 2022.
    """
    return TreeTriplets(
        _pixel_head(channels, embed_dim),
        BalancedSampler(num_classes, max_anchors=max_anchors, min_per_class=min_per_class),
        groups,
        feature=_only(channels) if feature is None else feature,
        margin=margin,
        weight=weight,
        across_processes=across_processes,
    )


def _scale_weights(channels: Mapping[str, int]) -> dict[str, float]:
    return dict(zip(channels, (1.0, 0.7, 0.4, 0.1), strict=False))


def _cross_scale(channels: Mapping[str, int]) -> CrossScale:
    """The finest map with the two coarsest, as far as there are others."""
    first, *others = channels
    return [(first, other, 1.0) for other in reversed(others[-2:])]


def _pixel_head(channels: Mapping[str, int], embed_dim: int) -> MultiScaleProjector:
    """The head of pixel contrast's official code, which that of PNE has too."""
    return MultiScaleProjector(channels, embed_dim, num_hidden=1, order="norm_relu")


def _only(channels: Mapping[str, int]) -> str:
    if len(channels) != 1:
        raise ValueError(f"feature=None with the maps {list(channels)}: name one of them.")
    return next(iter(channels))

"""Multi- and cross-scale contrast (Pissas et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .method import ContrastMethod, check_above_zero
from .projector import MultiScaleProjector
from .sampling import BalancedSampler, Batch, Sampler
from .sets import PixelSet
from .terms import Side, Term


class _Pair(NamedTuple):
    """Anchors of one scale against those of another, or of the same."""

    name: str
    anchors: str
    contrast: str
    weight: float


class MultiScaleContrast(ContrastMethod):
    """Contrasts class-balanced pixels within each scale, and those of one scale with another's.

    For the anchors A_s drawn at each scale s, with L_c the supervised InfoNCE of `terms`,

        L = weight * ( sum_s w_s L_c(A_s, A_s) + sum_(s,s') w_ss' L_c(A_s, A_s') )

    Labels decide everything, unless `negatives` are given: then the negatives of an anchor are not
    the anchors of other classes but wrongly predicted pixels of other classes, drawn from the same
    map as its positives.

    Args:
        projector, warmup_iters, across_processes: as in `ContrastMethod`.
        sampler: draws the anchors of all scales.
        scale_weights: w_s by name of the feature map, e.g. {"res2": 1.0, "res3": 0.7}. 0 leaves the
            scale out.
        cross_scale: rows (s, s', w_ss') by names of feature maps: anchors from s, positives and
            negatives from s'. The paper pairs stride 4 with strides 32 and 16.
        weight: of all terms; the paper's lambda, which is the same within and across scales.
        temperature: divides the similarities.
        count_empty_anchors: average over all anchors, also those without a positive, as the
            official code does across scales.
        negatives: draws the negatives; None for the anchors of other classes, as in the paper.

    Raises:
        ValueError: nothing to contrast, a negative weight, a temperature that is not above 0, a map
            without projector, or a pair of equal maps.

    Reference: Pissas, Ravasio, Da Cruz, Bergeles, "Multi-scale and Cross-scale Contrastive Learning
        for Semantic Segmentation", ECCV 2022, sections 3.2 to 3.4, equations (1) to (4).
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        sampler: BalancedSampler,
        *,
        scale_weights: Mapping[str, float],
        cross_scale: Sequence[tuple[str, str, float]] = (),
        weight: float = 0.1,
        temperature: float = 0.1,
        count_empty_anchors: bool = False,
        negatives: Sampler | None = None,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        check_above_zero(temperature=temperature)
        pairs = _pairs(scale_weights, cross_scale, weight)
        super().__init__(
            projector,
            sampler.num_classes,
            features=[name for pair in pairs for name in (pair.anchors, pair.contrast)],
            names=[pair.name for pair in pairs],
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.pairs = pairs
        self.sampler = sampler
        self.temperature = temperature
        self.count_empty_anchors = count_empty_anchors
        self.negatives = negatives

    def terms(self, batch: Batch) -> list[Term]:
        """One term within each scale, and one for each pair of scales."""
        anchors, negatives = self.sample(batch, list(batch.maps), self.sampler, self.negatives)
        return [
            Term(
                pair.name,
                anchors[pair.anchors],
                contrast_set(anchors[pair.contrast], negatives.get(pair.contrast)),
                self.temperature,
                pair.weight,
                count_empty=self.count_empty_anchors,
            )
            for pair in self.pairs
        ]


def contrast_set(samples: PixelSet, negatives: PixelSet | None) -> list[Side]:
    """Samples in both roles, or as positives only where the negatives are drawn."""
    if negatives is None:
        return [Side(samples)]
    return [Side(samples, "positives"), Side(negatives, "negatives")]


def _pairs(
    scale_weights: Mapping[str, float],
    cross_scale: Sequence[tuple[str, str, float]],
    weight: float,
) -> list[_Pair]:
    """All terms of a weight above 0."""
    pairs = [_Pair(name, name, name, w) for name, w in scale_weights.items()]
    for row in cross_scale:
        if len(row) != 3:
            raise ValueError(
                f"cross_scale row {list(row)}: give (anchor map, contrast map, weight)."
            )
        source, target, w = row
        if source == target:
            raise ValueError(f"cross_scale pairs {source!r} with itself: scale_weights does that.")
        if any((source, target) == (pair.anchors, pair.contrast) for pair in pairs):
            raise ValueError(f"cross_scale names the pair ({source}, {target}) twice.")
        pairs.append(_Pair(f"{source}_{target}", source, target, float(w)))
    for name, value in [("weight", weight), *((pair.name, pair.weight) for pair in pairs)]:
        if not value >= 0:
            raise ValueError(f"{name}={value}: a weight must be 0 or more.")
    pairs = [pair._replace(weight=weight * pair.weight) for pair in pairs]
    pairs = [pair for pair in pairs if pair.weight > 0]
    if not pairs:
        raise ValueError(
            f"scale_weights={dict(scale_weights)} and cross_scale={list(cross_scale)} leave "
            "nothing to contrast: give a weight above 0, or set the contrast to None."
        )
    return pairs

"""Multi- and cross-scale contrast (Pissas et al., ECCV 2022).

Shape letters: B images, C feature channels, K classes, H W the labels' size, h w a feature map,
A anchors of one scale, C contrast samples, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .boundary import BoundaryNegatives
from .distributed import gather_set, mean_over_processes, world_size
from .gather import gather_pixels, unit_vectors
from .info_nce import PRODUCTS, Products, info_nce
from .inspection import Inspection
from .method import ContrastMethod, connected_zero
from .output import ContrastOutput
from .pairs import RolePairs
from .projector import MultiScaleProjector
from .sampling import (
    BalancedSampler,
    PixelDraw,
    downsample_labels,
    joined_draws,
    predicted_labels,
)
from .statistics import ClassSums, class_sums, similarity_statistics, stack_class_sums

Projection = Literal["dense", "sampled"]
NormStatistics = Literal["map", "draw"]


class Anchors(NamedTuple):
    """The anchors of one scale.

    Attributes:
        embeddings: (A, D) fp32 unit vectors.
        labels: (A,) int64 classes; -1 for the padding of a draw of fixed size.
        class_counts: number of anchors of each class, host integers; None for a draw of fixed size.
    """

    embeddings: Tensor
    labels: Tensor
    class_counts: tuple[int, ...] | None


class _ContrastSet(NamedTuple):
    """What the anchors of a scale are contrasted with.

    Attributes:
        embeddings: (C, D) fp32 unit vectors.
        labels: (C,) int64 classes; -1 for padding.
        class_counts: as in `Anchors`; None where they are not known or not in order.
        num_positives: the first so many samples are anchors and serve as positives only, all others
            are negatives only; None where every sample is an anchor and serves as both.
    """

    embeddings: Tensor
    labels: Tensor
    class_counts: tuple[int, ...] | None
    num_positives: int | None


class _Term(NamedTuple):
    """One term of the loss: anchors of `anchors` against those of `contrast` (None: themselves)."""

    name: str
    anchors: str
    contrast: str | None
    weight: float
    temperature: float


class MultiScaleContrast(ContrastMethod):
    """Contrasts class-balanced pixels within each scale, and those of one scale with another's.

    For the anchor sets A_s drawn at each scale s,

        L = weight * sum_s w_s L_c(A_s) + cross_weight * sum_(s,s') w_ss' L_c(A_s, A_s')

    with L_c the supervised InfoNCE of `info_nce`. Used in training only. Labels decide everything,
    unless `negatives` are given: then the negatives of an anchor are not the anchors of other
    classes but wrongly predicted pixels of other classes, drawn from the same map as its positives.

    Anchors and means are those of one process, as in the release, unless `across_processes` is set
    here and in the sampler: then the anchors of all processes are contrasted with each other, and
    loss and gradients are those of one process with the global batch.

    The projectors run on every pixel of the maps, as in the paper, or with `projection="sampled"`
    on the drawn pixels alone. Parameters, draws and checkpoints are the same. With layer norms, or
    without hidden layers, losses and gradients are the same too. A batch norm needs statistics:

    * `norm_statistics="map"`: mean and variance of the hidden activations over the whole map, as
      in dense projection. Losses are those of dense projection; gradients are not, because these
      statistics are constants of the backward pass. To find them the hidden layers still run on
      the whole map, without a graph and chunk by chunk (`Projector.map_statistics`).
    * `norm_statistics="draw"`: those of the drawn pixels, in which all classes weigh alike. They
      have a graph, and cost next to nothing.

    With SyncBatchNorm both are over all processes; a process without anchors takes part in their
    collective calls, with no weight.

    Args:
        projector: heads for the feature maps; those of maps that no term uses are dropped.
        sampler: draws the anchors of all scales.
        scale_weights: w_s by name of the feature map, e.g. {"res2": 1.0, "res3": 0.7}. 0 leaves the
            scale out.
        cross_scale: rows (s, s', w_ss') by names of feature maps: anchors from s, positives and
            negatives from s'. The paper pairs stride 4 with strides 32 and 16.
        weight: the paper's lambda_cms, on the terms within scales.
        cross_weight: the paper's lambda_ccs, on the terms across scales.
        temperature: of the terms within scales.
        cross_temperature: of the terms across scales; None for the same.
        symmetric: also contrast s' with s, and weigh the two directions by half each.
        detach_contrast: across scales, send gradients to the anchors' side only.
        count_empty_anchors: average over all anchors, also those without a positive, as the release
            does across scales.
        across_processes: contrast over the global batch.
        projection: "dense" projects the maps, "sampled" the drawn pixels.
        norm_statistics: "map" or "draw", for sampled projection with batch norms; else None.
        products: precision of the InfoNCE's products, as in `info_nce`: "fp32" or "bf16".
        negatives: draws the negatives; None for the anchors of other classes, as in the paper.

    Raises:
        ValueError: nothing to contrast, a negative weight, a temperature that is not above 0, a map
            without projector, a pair of equal maps, unknown products, or `norm_statistics` where
            there are none to choose, or none where there are.

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
        cross_weight: float = 0.1,
        temperature: float = 0.1,
        cross_temperature: float | None = None,
        symmetric: bool = False,
        detach_contrast: bool = False,
        count_empty_anchors: bool = False,
        across_processes: bool = False,
        projection: Projection = "dense",
        norm_statistics: NormStatistics | None = None,
        products: Products = "fp32",
        negatives: BoundaryNegatives | None = None,
    ) -> None:
        super().__init__(projector)
        cross_temperature = temperature if cross_temperature is None else cross_temperature
        for name, value in (
            ("temperature", temperature),
            ("cross_temperature", cross_temperature),
        ):
            if not value > 0:
                raise ValueError(f"{name}={value}: must be above 0.")
        if products not in PRODUCTS:
            raise ValueError(f"products={products!r}: choose one of {list(PRODUCTS)}.")
        if across_processes != sampler.across_processes:
            raise ValueError(
                f"across_processes={across_processes} here and {sampler.across_processes} in the "
                "sampler: set both alike."
            )
        self.terms = _within_terms(scale_weights, weight, temperature)
        self.terms += _cross_terms(cross_scale, cross_weight, cross_temperature, symmetric)
        if not self.terms:
            raise ValueError(
                f"scale_weights={dict(scale_weights)} and cross_scale={list(cross_scale)} leave "
                "nothing to contrast: give a weight above 0, or set the contrast to None."
            )
        used = {name for term in self.terms for name in (term.anchors, term.contrast) if name}
        projector.keep(used)
        _check_projection(projector, projection, norm_statistics)
        self.sampler = sampler
        self.detach_contrast = detach_contrast
        self.count_empty_anchors = count_empty_anchors
        self.across_processes = across_processes
        self.projection = projection
        self.norm_statistics = norm_statistics
        self.products: Products = products
        self.negatives = negatives

    @property
    def contrasts_projections(self) -> bool:
        return self.projection == "dense"

    # How many pixels are drawn is known at run time only: a compiled step has one graph up to here.
    @torch.compiler.disable
    def contrast(
        self,
        maps: Mapping[str, Tensor],
        logits: Tensor | None,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """As in `ContrastMethod`; logits are needed where `negatives` are drawn.

        Returns:
            Losses `loss_contrast_<s>` and `loss_contrast_<s>_<s'>`; the statistics `anchors`,
            `classes`, `positive_similarity` and `negative_similarity` of each term, and with
            `negatives` their number.
        """
        label_maps = [downsample_labels(labels, x.shape[-2:]) for x in maps.values()]
        draws = self.sampler(label_maps, generator)
        negative_draws: list[PixelDraw] | list[None] = [None] * len(draws)
        if self.negatives is not None:
            negative_draws = _draw_negatives(self.negatives, label_maps, logits, generator)
        if self.inspection is not None:
            self.inspection.begin(labels, logits)
            self._inspect(self.inspection, maps, draws, negative_draws)
        anchors: dict[str, Anchors] = {}
        negatives: dict[str, Anchors] = {}
        for name, draw, negative_draw in zip(maps, draws, negative_draws, strict=True):
            rows = self._embed(name, maps[name], joined_draws(draw, negative_draw))
            if negative_draw is not None:
                rows, negative_rows = rows.split([len(draw.labels), len(negative_draw.labels)])
                negatives[name] = Anchors(negative_rows, negative_draw.labels, None)
            anchors[name] = Anchors(rows, draw.labels, draw.class_counts)
        sums = contrast_sums = negative_sums = self._class_sums(anchors)
        if self.across_processes and world_size() > 1:
            everyones = {name: _gathered(part) for name, part in anchors.items()}
            contrast_sums = negative_sums = self._class_sums(everyones)
            negatives = {name: _gathered(part) for name, part in negatives.items()}
        else:
            everyones = anchors
        if self.negatives is not None:
            negative_sums = self._class_sums(negatives)
        contrast_sets = {
            name: _contrast_set(part, negatives.get(name)) for name, part in everyones.items()
        }
        losses: dict[str, Tensor] = {}
        for term in self.terms:
            source = anchors[term.anchors]
            target = contrast_sets[term.contrast or term.anchors]
            loss = self._term_loss(term, source, target)
            losses[f"loss_contrast_{term.name}"] = term.weight * loss
            if self.inspection is not None:
                self.inspection.add_pairs(
                    term.name,
                    source[:2],
                    target[:2],
                    holds_anchors=term.contrast is None,
                    num_positives=target.num_positives,
                )
        return ContrastOutput(losses, self._statistics(sums, contrast_sums, negative_sums))

    def _embed(self, name: str, pixels: Tensor, draw: PixelDraw) -> Tensor:
        """Unit vectors (A, D) of drawn pixels, from a map of embeddings or of features."""
        # The padding of a draw of fixed size can name a pixel twice, and so can two draws.
        distinct = draw.class_counts is not None
        rows = gather_pixels(pixels, draw.image, draw.pixel, distinct=distinct)
        if self.projection == "sampled":
            head = self.projector.heads[name]
            statistics = head.map_statistics(pixels) if self.norm_statistics == "map" else None  # pyright: ignore[reportCallIssue]
            rows = head.project_rows(rows, draw.labels >= 0, statistics)  # pyright: ignore[reportCallIssue]
        return unit_vectors(rows)

    def _term_loss(self, term: _Term, source: Anchors, target: _ContrastSet) -> Tensor:
        """L_c of one term, unweighted."""
        contrast_set: dict[str, Any] = {}
        if target.embeddings is not source.embeddings:
            contrast_set = {
                "contrast": target.embeddings,
                "contrast_labels": target.labels,
                "contrast_class_counts": target.class_counts,
                "anchors_lead_contrast": term.contrast is None,
            }
        if term.contrast is not None and self.detach_contrast:
            contrast_set["contrast"] = target.embeddings.detach()
        if target.num_positives is not None:
            is_anchor = torch.arange(len(target.labels), device=target.labels.device)
            is_anchor = is_anchor < target.num_positives
            contrast_set["pairs"] = RolePairs(positives=is_anchor, negatives=~is_anchor)
        loss = info_nce(
            source.embeddings,
            source.labels,
            temperature=term.temperature,
            count_empty_anchors=self.count_empty_anchors,
            class_counts=source.class_counts,
            products=self.products,
            # A draw of fixed size is for steps in which the host reads nothing.
            host_reads=source.class_counts is not None,
            **contrast_set,
        )
        if term.contrast is not None and self.detach_contrast:
            # The head of a map that is contrasted with and has no anchors needs a gradient too.
            loss = loss + connected_zero([target.embeddings])
        if self.across_processes and world_size() > 1:
            loss = mean_over_processes(loss, self._num_averaged(term, source, target))
        return loss

    def _inspect(
        self,
        inspection: Inspection,
        maps: Mapping[str, Tensor],
        draws: Sequence[PixelDraw],
        negative_draws: Sequence[PixelDraw | None],
    ) -> None:
        """Notes what was drawn from each map."""
        for (name, pixels), anchors, negatives in zip(
            maps.items(), draws, negative_draws, strict=True
        ):
            size = tuple(pixels.shape[-2:])
            inspection.add_draw(name, "anchors", size, anchors)
            if negatives is not None:
                inspection.add_draw(name, "boundary negatives", size, negatives)

    def _num_averaged(self, term: _Term, source: Anchors, target: _ContrastSet) -> Tensor:
        """How many anchors the mean of a term runs over, 0-dim."""
        if self.count_empty_anchors:
            return target.embeddings.new_full((), len(source.labels))
        population = torch.zeros(self.sampler.num_classes, device=source.labels.device)
        positives = target.labels[: target.num_positives]
        population.index_add_(0, positives, torch.ones_like(positives, dtype=torch.float))
        needed = 2 if term.contrast is None else 1
        return (population[source.labels] >= needed).sum().to(target.embeddings.dtype)

    def _class_sums(self, sets: Mapping[str, Anchors]) -> dict[str, ClassSums]:
        """Once per scale: several terms share them."""
        classes = self.sampler.num_classes
        return {name: class_sums(x.embeddings, x.labels, classes) for name, x in sets.items()}

    def _statistics(
        self,
        anchors: Mapping[str, ClassSums],
        contrast: Mapping[str, ClassSums],
        negatives: Mapping[str, ClassSums],
    ) -> dict[str, Tensor]:
        """Those of all terms within scales at once, and of all across.

        Args:
            anchors, contrast, negatives: sums by scale, `negatives` being those of the contrast set
                where no others are drawn.
        """
        statistics: dict[str, Tensor] = {}
        for within in (True, False):
            terms = [term for term in self.terms if (term.contrast is None) == within]
            if not terms:
                continue
            sources = stack_class_sums([anchors[term.anchors] for term in terms])
            targets = stack_class_sums([contrast[term.contrast or term.anchors] for term in terms])
            similarity = similarity_statistics(sources, targets, contrast_holds_anchors=within)
            quantities = {
                "anchors": sources.counts.sum(dim=1),
                "classes": (sources.counts > 0).sum(dim=1).to(sources.counts.dtype),
                "positive_similarity": similarity.positive,
                "negative_similarity": similarity.negative,
            }
            if self.negatives is not None:
                drawn = stack_class_sums([negatives[t.contrast or t.anchors] for t in terms])
                similarity = similarity_statistics(sources, drawn)
                quantities["negative_similarity"] = similarity.negative
                quantities["negatives"] = drawn.counts.sum(dim=1)
            for number, term in enumerate(terms):
                for quantity, values in quantities.items():
                    statistics[f"contrast/{term.name}/{quantity}"] = values[number]
        return statistics


def _draw_negatives(
    sampler: BoundaryNegatives,
    label_maps: Sequence[Tensor],
    logits: Tensor | None,
    generator: torch.Generator | None,
) -> list[PixelDraw]:
    if logits is None:
        raise ValueError("boundary-aware negatives need the class scores of the segmentation head.")
    predictions = [predicted_labels(logits, tuple(x.shape[-2:])) for x in label_maps]
    return sampler(label_maps, predictions, generator)  # pyright: ignore[reportCallIssue]


def _gathered(part: Anchors) -> Anchors:
    """Those of all processes, this one's first."""
    return Anchors(*gather_set(part.embeddings, part.labels), class_counts=None)


def _contrast_set(anchors: Anchors, negatives: Anchors | None) -> _ContrastSet:
    if negatives is None:
        return _ContrastSet(*anchors, num_positives=None)
    return _ContrastSet(
        torch.cat([anchors.embeddings, negatives.embeddings]),
        torch.cat([anchors.labels, negatives.labels]),
        class_counts=None,
        num_positives=len(anchors.labels),
    )


def _check_projection(
    projector: MultiScaleProjector, projection: str, norm_statistics: str | None
) -> None:
    if projection not in ("dense", "sampled"):
        raise ValueError(f"projection={projection!r}: choose 'dense' or 'sampled'.")
    if norm_statistics not in ("map", "draw", None):
        raise ValueError(f"norm_statistics={norm_statistics!r}: choose 'map', 'draw' or None.")
    if projection == "dense" and norm_statistics is not None:
        raise ValueError(
            f"norm_statistics={norm_statistics!r} with projection='dense', whose batch norms see "
            "the map: leave it out, or set projection='sampled'."
        )
    if projection == "sampled" and projector.has_batch_norm != (norm_statistics is not None):
        raise ValueError(
            f"norm_statistics={norm_statistics!r} with projection='sampled': it must be 'map' or "
            "'draw' for a projector with batch norms, and None for one without."
        )


def _within_terms(
    scale_weights: Mapping[str, float], weight: float, temperature: float
) -> list[_Term]:
    terms = [
        _Term(name, name, None, weight * _non_negative(f"scale_weights[{name!r}]", w), temperature)
        for name, w in scale_weights.items()
    ]
    _non_negative("weight", weight)
    return [term for term in terms if term.weight > 0]


def _cross_terms(
    cross_scale: Sequence[tuple[str, str, float]],
    cross_weight: float,
    temperature: float,
    symmetric: bool,
) -> list[_Term]:
    _non_negative("cross_weight", cross_weight)
    terms: list[_Term] = []
    for row in cross_scale:
        source, target, pair_weight = _cross_row(row)
        directions = [(source, target), (target, source)] if symmetric else [(source, target)]
        for anchors, contrast in directions:
            name = f"{anchors}_{contrast}"
            if any(term.name == name for term in terms):
                raise ValueError(f"cross_scale names the pair ({anchors}, {contrast}) twice.")
            weight = cross_weight * pair_weight / len(directions)
            if weight > 0:
                terms.append(_Term(name, anchors, contrast, weight, temperature))
    return terms


def _cross_row(row: Sequence[str | float]) -> tuple[str, str, float]:
    if len(row) != 3:
        raise ValueError(f"cross_scale row {list(row)}: give (anchor map, contrast map, weight).")
    source, target, weight = str(row[0]), str(row[1]), float(row[2])
    if source == target:
        raise ValueError(f"cross_scale pairs {source!r} with itself: scale_weights does that.")
    return (
        source,
        target,
        _non_negative(f"the weight of cross_scale pair {source}-{target}", weight),
    )


def _non_negative(name: str, value: float) -> float:
    if not value >= 0:
        raise ValueError(f"{name}={value}: must be 0 or more.")
    return value

"""Pixel contrast, with or without memory (Wang et al., ICCV 2021).

Shape letters: B images, K classes, H W the labels' size, h w the embedding map, D embedding width,
A anchors, C contrast samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from .boundary import BoundaryNegatives
from .distributed import gather_set, mean_over_processes, world_size
from .gather import gather_embeddings
from .hard_sampling import HardAnchorSampler
from .info_nce import PRODUCTS, Products, info_nce
from .inspection import Inspection
from .memory import LabelledSet, MemoryBank
from .method import ContrastMethod, Warmup, connected_zero
from .output import ContrastOutput
from .pairs import PairSelector, RolePairs, SemiHardPairs
from .projector import MultiScaleProjector
from .sampling import PixelDraw, downsample_labels, joined_draws, predicted_labels
from .statistics import class_sums, similarity_statistics


class PixelContrast(ContrastMethod):
    """Contrasts pixels of one feature map, half of them wrongly predicted, across images.

    For anchors A drawn from the batch, and a contrast set C,

        L = weight * temperature / base_temperature * mean_{i in A} mean_{j in P(i)} l(i, j)

    with l the supervised InfoNCE of `info_nce`; P(i) and N(i) are the samples of C of the anchor's
    class, without itself, and of other classes, or what `pairs` chooses of them. C are the anchors,
    and with a memory also its keys of earlier batches, which carry no gradient.

    In each step anchors are drawn, contrasted with the bank as it is, and then the batch's keys go
    into the bank, during warm-up as well. Used in training only.

    Anchors are those of one process, as in the release; with several processes it is the memory, of
    which all hold the same, that brings the images of the others in. With `across_processes` the
    anchors and `negatives` of all processes are in C, and loss and gradients are those of one
    process that has the global batch.

    Args:
        projector: heads for the feature maps; those of other maps than `feature` are dropped.
        sampler: draws the anchors.
        feature: name of the feature map.
        weight: of the term. The release has 0.1.
        temperature: divides the similarities.
        base_temperature: scales the loss by temperature / base_temperature; None for a factor of 1.
            The release has 0.07 with a temperature of 0.1 on Cityscapes, so a factor of 1.43.
        warmup_iters: passes without contrast; the release has 5000.
        ramp_iters: passes over which the term's weight then grows.
        memory: keys of earlier batches; None to contrast within the batch.
        memory_per_class: most keys of each class that enter a step, drawn at random; None for all.
        contrast_batch: whether the anchors are in the contrast set besides the memory. The release
            leaves them out.
        pairs: choice of semi-hard positives and negatives; None for all pairs.
        negatives: draws wrong pixels of the batch, which are then the only negatives, while the
            contrast set gives the positives; None for its samples of other classes. Not together
            with `pairs`, which choose the negatives too.
        across_processes: contrast over the global batch; the sampler must be set likewise.
        products: precision of the InfoNCE's products, as in `info_nce`: "fp32" or "bf16".

    Raises:
        ValueError: a negative weight, a temperature that is not above 0, a map without projector,
            unknown products, a memory of another size than sampler or projector, options of a
            memory without one, both `pairs` and `negatives`, `across_processes` here and not in the
            sampler.

    Reference: Wang, Zhou, Yu, Dai, Konukoglu, Van Gool, "Exploring Cross-Image Pixel Contrast for
        Semantic Segmentation", ICCV 2021, section 3.2, equation (3).
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        sampler: HardAnchorSampler,
        *,
        feature: str,
        weight: float = 0.1,
        temperature: float = 0.1,
        base_temperature: float | None = None,
        warmup_iters: int = 0,
        ramp_iters: int = 0,
        memory: MemoryBank | None = None,
        memory_per_class: int | None = None,
        contrast_batch: bool = True,
        pairs: SemiHardPairs | None = None,
        negatives: BoundaryNegatives | None = None,
        across_processes: bool = False,
        products: Products = "fp32",
    ) -> None:
        super().__init__(projector)
        if not weight >= 0:
            raise ValueError(f"weight={weight}: must be 0 or more.")
        base_temperature = temperature if base_temperature is None else base_temperature
        for name, value in (("temperature", temperature), ("base_temperature", base_temperature)):
            if not value > 0:
                raise ValueError(f"{name}={value}: must be above 0.")
        if products not in PRODUCTS:
            raise ValueError(f"products={products!r}: choose one of {list(PRODUCTS)}.")
        if pairs is not None and negatives is not None:
            raise ValueError(
                "pairs and negatives both choose the negatives: set one of them to None."
            )
        if across_processes != sampler.across_processes:
            raise ValueError(
                f"across_processes={across_processes} here and {sampler.across_processes} in the "
                "sampler: set both alike."
            )
        _check_memory(memory, memory_per_class, contrast_batch, projector, sampler)
        projector.keep([feature])
        self.sampler = sampler
        self.feature = feature
        self.weight = weight * temperature / base_temperature
        self.temperature = temperature
        self.warmup = Warmup(warmup_iters, ramp_iters)
        self.memory = memory
        self.memory_per_class = memory_per_class
        self.contrast_batch = contrast_batch
        self.pairs = pairs
        self.negatives = negatives
        self.across_processes = across_processes
        self.products: Products = products

    # How many pixels are drawn is known at run time only: a compiled step has one graph up to here.
    @torch.compiler.disable
    def contrast(
        self,
        maps: Mapping[str, Tensor],
        logits: Tensor | None,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """As in `ContrastMethod`; logits tell which pixels are wrongly predicted.

        Returns:
            The loss `loss_contrast_<feature>`; the statistics `anchors`, `classes`, `hard_share`
            (of the anchors), `positive_similarity` and `negative_similarity` (over all pairs,
            whatever `pairs` chooses), with `negatives` their number, all but during warm-up, and
            with a memory `bank_fill`.

        Raises:
            ValueError: no logits.
        """
        if logits is None:
            raise ValueError("PixelContrast needs the class scores of the segmentation head.")
        embeddings = maps[self.feature]
        label_map = downsample_labels(labels, embeddings.shape[-2:])
        statistics: dict[str, Tensor] = {}
        if self.memory is not None:
            statistics["bank_fill"] = self.memory.fill_fraction()
        if self.inspection is not None:
            self.inspection.begin(labels, logits)
            self._inspect_memory(self.inspection)
        factor = self.warmup()
        if factor > 0:
            predictions = predicted_labels(logits, embeddings.shape[-2:])
            (draw,) = self.sampler([label_map], [predictions], generator)
            negatives = None
            if self.negatives is not None:
                (negatives,) = self.negatives([label_map], [predictions], generator)  # pyright: ignore[reportCallIssue]
            if self.inspection is not None:
                size = tuple(label_map.shape[-2:])
                self.inspection.add_draw(self.feature, "anchors", size, draw)
                if negatives is not None:
                    self.inspection.add_draw(self.feature, "boundary negatives", size, negatives)
            loss, similarities = self._loss(embeddings, draw, negatives, generator)
            loss = self.weight * factor * loss
            wrong = predictions.flatten(1)[draw.image, draw.pixel] != draw.labels
            statistics["hard_share"] = wrong.float().mean()
            statistics.update(similarities)
        else:
            loss = connected_zero([embeddings])
        if self.memory is not None:
            self.memory.enqueue(embeddings.detach(), label_map, generator)
        return ContrastOutput(
            {f"loss_contrast_{self.feature}": loss},
            {f"contrast/{self.feature}/{name}": value for name, value in statistics.items()},
        )

    def _loss(
        self,
        embeddings: Tensor,
        draw: PixelDraw,
        negative_draw: PixelDraw | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The InfoNCE, unweighted, and what it is about."""
        both = joined_draws(draw, negative_draw)
        # A pixel may be drawn as anchor and as negative.
        distinct = negative_draw is None
        rows = gather_embeddings(embeddings, both.image, both.pixel, distinct=distinct)
        anchors = LabelledSet(rows, draw.labels)
        negatives = None
        if negative_draw is not None:
            anchor_rows, rows = rows.split([len(draw.labels), len(negative_draw.labels)])
            anchors = LabelledSet(anchor_rows, draw.labels)
            negatives = LabelledSet(rows, negative_draw.labels)
        everyones = anchors
        if self.across_processes and world_size() > 1:
            everyones = LabelledSet(*gather_set(*anchors))
            if negatives is not None:
                negatives = LabelledSet(*gather_set(*negatives))
        contrast = self._contrast_set(everyones, generator)
        loss = self._info_nce(anchors, draw.class_counts, contrast, negatives, generator)
        if self.inspection is not None:
            everything = contrast if negatives is None else _joined(contrast, negatives)
            self.inspection.add_pairs(
                self.feature,
                anchors,
                everything,
                holds_anchors=self.contrast_batch,
                num_positives=None if negatives is None else len(contrast.labels),
            )
        if self.across_processes and world_size() > 1:
            loss = mean_over_processes(loss, self._num_averaged(anchors, contrast))

        classes = self.sampler.num_classes
        sums = class_sums(*anchors, classes)
        contrast_sums = sums if contrast is anchors else class_sums(*contrast, classes)
        similarity = similarity_statistics(
            sums, contrast_sums, contrast_holds_anchors=self.contrast_batch
        )
        statistics = {
            "anchors": sums.counts.sum(),
            "classes": (sums.counts > 0).sum().to(sums.counts.dtype),
            "positive_similarity": similarity.positive,
            "negative_similarity": similarity.negative,
        }
        if negatives is not None:
            negative_sums = class_sums(*negatives, classes)
            similarity = similarity_statistics(sums, negative_sums)
            statistics["negative_similarity"] = similarity.negative
            statistics["negatives"] = negative_sums.counts.sum()
        return loss, statistics

    def _inspect_memory(self, inspection: Inspection) -> None:
        """Notes how full the memory is."""
        if self.memory is not None:
            for kind, shares in self.memory.fill_by_class().items():
                inspection.add_bank_fill(kind, shares)

    def _contrast_set(self, anchors: LabelledSet, generator: torch.Generator | None) -> LabelledSet:
        """The anchors, if they are part of it, then the memory."""
        if self.memory is None:
            return anchors
        keys = self.memory.contrast_set(self.memory_per_class, generator)
        return _joined(anchors, keys) if self.contrast_batch else keys

    def _num_averaged(self, anchors: LabelledSet, contrast: LabelledSet) -> Tensor:
        """How many anchors have a positive, 0-dim; each loses itself where it is in the set."""
        known = contrast.labels >= 0
        population = torch.zeros(
            self.sampler.num_classes, dtype=anchors.embeddings.dtype, device=known.device
        )
        population.index_add_(0, contrast.labels.clamp(min=0), known.to(population.dtype))
        needed = 2 if self.contrast_batch else 1
        return (population[anchors.labels] >= needed).sum().to(population.dtype)

    def _info_nce(
        self,
        anchors: LabelledSet,
        class_counts: tuple[int, ...] | None,
        contrast: LabelledSet,
        negatives: LabelledSet | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        among_themselves = contrast is anchors and negatives is None
        pairs: PairSelector | None = None
        if self.pairs is not None:
            pairs = partial(self.pairs, generator=generator)
        if negatives is not None:
            positive = torch.arange(
                len(contrast.labels) + len(negatives.labels), device=contrast.labels.device
            ) < len(contrast.labels)
            pairs = RolePairs(positives=positive, negatives=~positive)
            contrast = _joined(contrast, negatives)
        return info_nce(
            *anchors,
            *(() if among_themselves else contrast),
            temperature=self.temperature,
            anchors_lead_contrast=self.contrast_batch and not among_themselves,
            class_counts=class_counts,
            products=self.products,
            pairs=pairs,
        )


def _joined(first: LabelledSet, second: LabelledSet) -> LabelledSet:
    return LabelledSet(*(torch.cat(pair) for pair in zip(first, second, strict=True)))


def _check_memory(
    memory: MemoryBank | None,
    memory_per_class: int | None,
    contrast_batch: bool,
    projector: MultiScaleProjector,
    sampler: HardAnchorSampler,
) -> None:
    if memory is None:
        if memory_per_class is not None:
            raise ValueError(f"memory_per_class={memory_per_class} goes with a memory.")
        if not contrast_batch:
            raise ValueError(
                "contrast_batch=False without a memory leaves nothing to contrast with: leave it "
                "out, or give a memory."
            )
        return
    if memory_per_class is not None and memory_per_class < 1:
        raise ValueError(f"memory_per_class={memory_per_class}: set it to 1 or more, or to None.")
    for name, value, of, expected in (
        ("num_classes", memory.num_classes, "sampler", sampler.num_classes),
        ("embed_dim", memory.embed_dim, "projector", projector.embed_dim),
    ):
        if value != expected:
            raise ValueError(
                f"memory: {name}={value}, but the {of} has {expected}: set both alike."
            )

"""Pixel contrast, with or without memory (Wang et al., ICCV 2021)."""

from __future__ import annotations

from functools import partial

from .hard_sampling import HardAnchorSampler
from .memory import MemoryBank
from .method import ContrastMethod, check_above_zero
from .pairs import SemiHardPairs
from .projector import MultiScaleProjector
from .sampling import Batch, Sampler
from .terms import Side, Term


class PixelContrast(ContrastMethod):
    """Contrasts pixels of one feature map, half of them wrongly predicted, across images.

    For anchors A drawn from the batch, and a contrast set C,

        L = weight * mean_{i in A} mean_{j in P(i)} l(i, j)

    with l the supervised InfoNCE of `terms`; P(i) and N(i) are the samples of C of the anchor's
    class, without itself, and of other classes, or what `pairs` chooses of them. C are the anchors,
    and with a memory also its keys of earlier batches, which carry no gradient.

    In each step anchors are drawn, contrasted with the bank as it is, and then the batch's keys go
    into the bank, during warm-up as well. With several processes it is the memory, of which all
    hold the same, that brings the images of the others in.

    Args:
        projector, across_processes: as in `ContrastMethod`.
        sampler: draws the anchors.
        feature: name of the feature map.
        weight: of the term. The official code has 0.1, times temperature / 0.07.
        temperature: divides the similarities.
        memory: keys of earlier batches; None to contrast within the batch.
        pairs: choice of semi-hard positives and negatives; None for all pairs.
        negatives: draws wrong pixels of the batch, which are then the only negatives, while the
            contrast set gives the positives. Not together with `pairs`, which choose negatives too.
        warmup_iters: as in `ContrastMethod`; the official code has 5000.

    Raises:
        ValueError: a negative weight, a temperature that is not above 0, a map without projector, a
            memory of another size than sampler or projector, or both `pairs` and `negatives`.

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
        memory: MemoryBank | None = None,
        pairs: SemiHardPairs | None = None,
        negatives: Sampler | None = None,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        super().__init__(
            projector,
            sampler.num_classes,
            features=[feature],
            names=[feature],
            needs_dense_embeddings=memory is not None,
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        if not weight >= 0:
            raise ValueError(f"weight={weight}: must be 0 or more.")
        check_above_zero(temperature=temperature)
        if pairs is not None and negatives is not None:
            raise ValueError(
                "pairs and negatives both choose the negatives: set one of them to None."
            )
        if memory is not None:
            memory.check_sizes(sampler.num_classes, projector.embed_dim)
        self.sampler = sampler
        self.feature = feature
        self.weight = weight
        self.temperature = temperature
        self.memory = memory
        self.pairs = pairs
        self.negatives = negatives

    def terms(self, batch: Batch) -> list[Term]:
        """One term, of the feature map's name."""
        drawn, wrong = self.sample(batch, [self.feature], self.sampler, self.negatives)
        anchors = drawn[self.feature]
        contrast = [Side(anchors)]
        if self.memory is not None:
            contrast.append(Side(self.memory.contrast_set(batch.device_generator())))
        if wrong:
            contrast = [side._replace(role="positives") for side in contrast]
            contrast.append(Side(wrong[self.feature], "negatives"))
        pairs = None
        if self.pairs is not None:
            pairs = partial(self.pairs, generator=batch.device_generator())
        return [Term(self.feature, anchors, contrast, self.temperature, self.weight, pairs)]

    def remember(self, batch: Batch) -> None:
        """Stores keys of the batch in the memory."""
        if self.memory is not None:
            embeddings, admitted = batch.maps[self.feature].detach(), None
            if self.memory.admission == "correct":
                admitted = batch.predictions(self.feature) == batch.label_map(self.feature)
            labels = batch.host_labels(self.feature)
            self.memory.enqueue(embeddings, labels, batch.generator, admitted)

"""Which of all pairs of an anchor and a contrast sample the InfoNCE counts.

A selector is called on one block of anchors after the other, by `info_nce(..., pairs=...)`.

Shape letters: R anchors of one block, C contrast samples, P a pool of the nearest or furthest.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """The pairs of one block of anchors.

    Attributes:
        positive: (R, C) bool, which samples are positives of which anchor.
        negative: (R, C) bool, the same of negatives.
    """

    positive: Tensor
    negative: Tensor


class PairSelector(Protocol):
    """What `info_nce` takes as `pairs`."""

    def __call__(self, similarities: Tensor, positive: Tensor, negative: Tensor) -> Pairs:
        """Chooses among the pairs of one block of anchors.

        Args:
            similarities: (R, C), divided by the temperature. Not to be changed.
            positive: (R, C) bool, pairs of one class; no anchor with itself.
            negative: (R, C) bool, pairs of two classes.

        Returns:
            The pairs to count, a part of those given.
        """
        ...


class SemiHardPairs:
    """For each anchor, random ones of its hardest negatives and of its hardest positives.

    The pool of negatives is the nearest `fraction` of all negatives in the contrast set, that of
    positives the furthest `fraction` of all positives, both rounded to whole samples and at least
    one where there is any. `max_negatives` and `max_positives` of them are drawn at random, without
    repetition; all of a pool that is no larger.

    Neither the numbers of pairs nor their choice pass through the host.

    Args:
        fraction: of the negatives and of the positives that make the pools, in (0, 1]. The paper
            has 10 %.
        max_positives: most positives of an anchor.
        max_negatives: most negatives of an anchor.

    Raises:
        ValueError: an argument out of its range.

    Reference: Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV
        2021, section 3.2 ("semi-hard example sampling"). The release has no counterpart.
    """

    def __init__(
        self, fraction: float = 0.1, max_positives: int = 1024, max_negatives: int = 2048
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction}: must be above 0, and at most 1 for all pairs.")
        for name, value in (("max_positives", max_positives), ("max_negatives", max_negatives)):
            if value < 1:
                raise ValueError(f"{name}={value}: an anchor needs at least 1.")
        self.fraction = fraction
        self.max_positives = max_positives
        self.max_negatives = max_negatives

    def __call__(
        self,
        similarities: Tensor,
        positive: Tensor,
        negative: Tensor,
        generator: torch.Generator | None = None,
    ) -> Pairs:
        """As in `PairSelector`, with a source of random numbers on the similarities' device."""
        return Pairs(
            self._choose(-similarities, positive, self.max_positives, generator),
            self._choose(similarities, negative, self.max_negatives, generator),
        )

    def _choose(
        self,
        hardness: Tensor,
        candidates: Tensor,
        most: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """At most `most` random ones of the hardest candidates of each row, as an (R, C) mask."""
        num_contrast = candidates.shape[1]
        largest_pool = min(max(int(num_contrast * self.fraction + 0.5), 1), num_contrast)
        counts = candidates.sum(dim=1, keepdim=True)
        pool_sizes = (counts.double() * self.fraction + 0.5).long().clamp_(min=1).minimum(counts)
        hardest_RP = hardness.masked_fill(~candidates, -torch.inf).topk(largest_pool, dim=1).indices
        in_pool_RP = torch.arange(largest_pool, device=hardness.device) < pool_sizes
        if most < largest_pool:
            keys_RP = torch.rand(in_pool_RP.shape, generator=generator, device=hardness.device)
            # All keys of the pool are above those of the rest, which come last.
            chosen = keys_RP.masked_fill_(~in_pool_RP, -1).topk(most, dim=1).indices
            hardest_RP, in_pool_RP = hardest_RP.gather(1, chosen), in_pool_RP.gather(1, chosen)
        return torch.zeros_like(candidates).scatter_(1, hardest_RP, in_pool_RP)


class RolePairs:
    """For contrast sets whose parts serve in one role only: some as positives, others as negatives.

    Args:
        positives: (C,) bool, the samples that may be positives.
        negatives: (C,) bool, the samples that may be negatives.

    Raises:
        ValueError: masks that are not (C,) bool tensors of the same size.
    """

    def __init__(self, positives: Tensor, negatives: Tensor) -> None:
        for name, mask in (("positives", positives), ("negatives", negatives)):
            if mask.dtype != torch.bool or mask.dim() != 1 or mask.shape != positives.shape:
                raise ValueError(
                    f"{name}: a {tuple(mask.shape)} tensor of {mask.dtype}. Both masks need one "
                    "bool for each contrast sample."
                )
        self.positives = positives
        self.negatives = negatives

    def __call__(self, similarities: Tensor, positive: Tensor, negative: Tensor) -> Pairs:
        """As in `PairSelector`."""
        return Pairs(positive & self.positives, negative & self.negatives)

"""Which of all pairs of an anchor and a contrast sample the InfoNCE counts.

Shape letters: R anchors of one block, C contrast samples, P a pool of the nearest or furthest.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        2021, section 3.2 ("semi-hard example sampling"). The official code has no counterpart.
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
    ) -> tuple[Tensor, Tensor]:
        """As in `PairSelector`, with a source of random numbers on the similarities' device."""
        return (
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

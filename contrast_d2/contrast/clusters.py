"""Clustered class prototypes, for training only (after Zhou et al., CVPR 2022).

Shape letters: A drawn pixels, D embedding width, K classes, M prototypes of a class, W processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .assignment import assign
from .inspection import evenly_spread
from .method import ContrastMethod, check_above_zero
from .projector import MultiScaleProjector
from .sampling import BalancedSampler, Batch
from .sets import PixelSet, at_least_fp32, on_device, stack_processes
from .terms import OwnTerm, PairSample, info_nce

# Of the assignment, in the official code: what divides the similarities, and its rounds.
_SHARPNESS, _ROUNDS = 0.05, 3


class ClusteredPrototypes(ContrastMethod):
    """Contrasts pixels with prototypes of all classes, several for each, that follow the pixels.

    Each drawn pixel z of class c is assigned to one of the class's prototypes, by optimal transport
    of the class's pixels to equal shares. For its prototype p and all prototypes q,

        L = mean_z ( weight * -log( e^(z.p/t) / sum_q e^(z.q/t) ) + distance_weight * (1 - z.p)^2 )

    After the loss, each prototype moves to the mean direction of the rightly predicted pixels that
    it was assigned: p <- momentum p + (1 - momentum) mean, at length 1 again. The pixels of all
    processes move it.

    In the paper prototypes are the classifier; here they stand beside one, during training alone,
    for which there is no published number. Ours as well: the temperature, which the official code
    does not have, so that its loss cannot fall below 3.28 of 5.25; the first prototypes of a class,
    some of its pixels in the first step that draws it, where the code has random ones; until then
    a class has none. With fewer pixels of a class than prototypes, equal shares do not exist, and
    each takes the most similar one.

    Args:
        projector, warmup_iters, across_processes: as in `ContrastMethod`. Pixels of each process
            are assigned by themselves.
        sampler: draws the pixels.
        feature: name of the feature map.
        prototypes_per_class: M; 10 in the official code.
        weight, distance_weight: of the two parts; those of the official code.
        temperature: divides the similarities.
        momentum: of the prototypes; that of the official code.

    Attributes:
        prototypes: (K, M, D), of length 1, or 0 before there are any.

    Raises:
        ValueError: an argument out of its range, or a map without projector.

    Reference: Zhou, Wang, Konukoglu, Van Gool, "Rethinking Semantic Segmentation: A Prototype
        View", CVPR 2022.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        sampler: BalancedSampler,
        *,
        feature: str,
        prototypes_per_class: int = 10,
        weight: float = 0.01,
        distance_weight: float = 0.001,
        temperature: float = 0.1,
        momentum: float = 0.999,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        check_above_zero(weight=weight, temperature=temperature)
        if not distance_weight >= 0:
            raise ValueError(f"distance_weight={distance_weight}: must be 0 or more.")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: must be from 0 to below 1.")
        if prototypes_per_class < 1:
            raise ValueError(f"prototypes_per_class={prototypes_per_class}: needs at least 1.")
        super().__init__(
            projector,
            sampler.num_classes,
            features=[feature],
            names=[feature],
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.sampler = sampler
        self.feature = feature
        self.weight = weight
        self.distance_weight = distance_weight
        self.temperature = temperature
        self.momentum = momentum
        shape = (sampler.num_classes, prototypes_per_class, projector.embed_dim)
        self.prototypes: Tensor
        self.register_buffer("prototypes", torch.zeros(shape))

    def terms(self, batch: Batch) -> list[OwnTerm]:
        """One term, of the feature map's name."""
        (drawn,) = self.sample(batch, [self.feature], self.sampler)
        pixels = drawn[self.feature]
        with torch.autocast(batch.device.type, enabled=False):
            rows, labels, draw = at_least_fp32(pixels.embeddings), pixels.labels, pixels.draw
            assert pixels.class_counts is not None and draw is not None
            with torch.no_grad():
                self._begin(rows, pixels.class_counts)
                # The term looks at them after they have moved.
                prototypes = self.prototypes.flatten(0, 1).clone()
                size = self.prototypes.shape[1]
                cosines_AM = (rows @ prototypes.T).view(len(rows), self.num_classes, size)
                cosines_AM = cosines_AM[torch.arange(len(rows), device=batch.device), labels]
                number = assign(cosines_AM / _SHARPNESS, pixels.class_counts, _ROUNDS)
                ids = labels * size + number
            exists = prototypes.any(dim=1)
            every = torch.arange(len(prototypes), device=batch.device)
            mean = info_nce(
                rows, ids, prototypes, torch.where(exists, every, -1), temperature=self.temperature
            )
            own = (rows * prototypes[ids]).sum(dim=1)
            total = self.weight * mean * len(rows)
            total = total + self.distance_weight * (1 - own).square().sum()
        count = torch.full((), float(len(rows)), device=batch.device)
        share = total / batch.of_all_processes(count).sum().clamp(min=1)
        right = batch.predictions(self.feature).flatten(1)[draw.image, draw.pixel] == labels
        self._move(rows.detach(), torch.where(right, ids, -1))
        statistics = {
            "anchors": count,
            "prototypes": exists.sum().float(),
            "positive_similarity": own.mean(),  # nan without any
            "admitted_share": right.float().mean(),
        }
        term = OwnTerm(
            self.feature,
            share,
            1.0,
            statistics,
            lambda: {"anchors": draw},
            partial(_pairs, pixels, ids, prototypes, self.num_classes),
        )
        return [term]

    def _begin(self, rows: Tensor, class_counts: Sequence[int]) -> None:
        """Makes pixels, evenly spread over those of a class, the prototypes of a class that has
        none: those of the first process that draws it."""
        size = self.prototypes.shape[1]
        counts = torch.tensor(class_counts)
        first = counts.cumsum(dim=0) - counts
        index = first[:, None] + torch.arange(size) * counts[:, None] // size
        index = on_device(index.clamp(max=max(len(rows) - 1, 0)), rows.device)
        has = on_device(counts > 0, rows.device)
        # Another row, for there may be none.
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        every_WKMD = stack_processes(padded[index])
        has_WK = stack_processes(has.to(rows.dtype)) > 0
        rank = has_WK.int().argmax(dim=0)
        chosen_KMD = every_WKMD[rank, torch.arange(self.num_classes, device=rows.device)]
        new_K = has_WK.any(dim=0) & ~self.prototypes.flatten(1).any(dim=1)
        self.prototypes.copy_(torch.where(new_K[:, None, None], chosen_KMD, self.prototypes))

    @torch.no_grad()
    def _move(self, rows: Tensor, ids: Tensor) -> None:
        """Moves the prototypes to the rows (A, D) that they are assigned; ids of -1 are none."""
        flat = self.prototypes.flatten(0, 1)
        sums = rows.new_zeros(len(flat) + 1, rows.shape[1])  # slot 0 takes what does not count
        sums = stack_processes(sums.index_add_(0, ids + 1, rows)).sum(dim=0)[1:]
        sums = sums.to(flat.dtype)
        moved = F.normalize(flat.lerp(F.normalize(sums, dim=1), 1 - self.momentum), dim=1)
        flat.copy_(torch.where(sums.any(dim=1, keepdim=True), moved, flat))


def _pairs(
    pixels: PixelSet, ids: Tensor, prototypes: Tensor, num_classes: int, most: int
) -> PairSample:
    """Evenly spread pixels against all prototypes."""
    rows = evenly_spread(pixels.labels >= 0, most // len(prototypes))
    columns = prototypes.any(dim=1).nonzero()[:, 0]
    with torch.autocast(rows.device.type, enabled=False):
        kept = prototypes[columns]
        cosines = pixels.embeddings.detach()[rows].to(kept.dtype) @ kept.T
    positive = ids[rows][:, None] == columns
    of_class = columns.div(len(prototypes) // num_classes, rounding_mode="floor")
    return PairSample(cosines, positive, ~positive, pixels.labels[rows], of_class)

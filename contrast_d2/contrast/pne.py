"""Positive-negative equal contrast, PNE (Wang et al., Neurocomputing 2023).

Misclassified pixels are the anchors. With j the class that an anchor is predicted as, k its true
class, P the correctly classified pixels of class k in its image and N those of class j,

    l(a) = log( 1 + mean_{n in N} e^{s(a,n)} / mean_{p in P} w_p e^{s(a,p)} )

with s the cosine over the temperature and w_p the probability that the network gives to class k at
p. Each side enters by its mean, so that pull and push are equal whatever the numbers. Only anchors
receive a gradient.

Shape letters: B images, K classes, D embedding width, h w the embedding map, G groups of anchors
that share image, predicted and true class, A anchors, R pixels drawn as positives and negatives,
S most samples of a set.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .inspection import evenly_spread
from .kernels.gather import gather_embeddings, gather_pixels
from .log_ratios import Groups, Ranges, at, consecutive, expand, log_ratios
from .method import ContrastMethod
from .outcomes import Outcomes, sort_outcomes
from .projector import MultiScaleProjector
from .sampling import Batch
from .sets import PixelDraw, at_least_fp32, unit_vectors
from .terms import OwnTerm, PairSample


class _Drawn(NamedTuple):
    """The groups of a step and the pixels that they read.

    Attributes:
        anchors: (A,) int64 pixels, numbered through the batch; none twice.
        samples: (R,) int64 pixels, likewise.
        groups: negatives' indices from R on are anchors: R + a is anchor a.
        sizes: (G,) int64 wrong pixels of each group, drawn or not.
    """

    anchors: Tensor
    samples: Tensor
    groups: Groups
    sizes: Tensor


class PNE(ContrastMethod):
    """Pulls misclassified pixels to correct ones of their class, off those they are taken for.

    The wrong pixels of each image are grouped by predicted class j and true class k. A group's
    positives are the correct pixels of class k in the image, its negatives the correct ones of
    class j, or where there are none the group's anchors, as in the official code, and

        L = weight * f * mean_groups mean_{a in group} l(a)

    with l as above. The factor f is the mean number of wrong pixels per group, over
    `samples_per_group`: the loss fades as errors do. No group forms where the image shows no pixel
    of class j, where the network gets no pixel of class k right, or where it would be larger than
    `max_hard`: at first most errors are in such, which makes the bound a warm-up.

    Args:
        projector, num_classes, warmup_iters, across_processes: as in `ContrastMethod`.
        feature: name of the feature map. The official code takes the one that the classifier sees.
        weight: of the loss.
        temperature: divides the similarities.
        samples_per_group: S, most anchors, positives and negatives of a group that are drawn.
        max_hard: largest group that counts: as a float a fraction of the map's h * w pixels, as an
            int a number of pixels. 199 pixels of a 64x128 map in the official code.
        official_code: draw the first pixels in raster order, from the top of the image, instead of
            random ones, and take an anchor's length for a constant. It then has a gradient along
            itself, and lengths drift.

    Raises:
        ValueError: an argument out of its range.

    Reference: Wang et al., "Positive-Negative Equal Contrastive Loss for Semantic Segmentation",
        Neurocomputing 2023 (arXiv:2207.01417), and its official code, which has one setting,
        DeepLabV3 on Cityscapes at stride 8. It repeats small sets until they have S samples, which
        a mean does not need.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        num_classes: int,
        *,
        feature: str,
        weight: float = 1.3,
        temperature: float = 1.0,
        samples_per_group: int = 100,
        max_hard: float | int = 199 / 8192,
        official_code: bool = False,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        for name, number, least in (
            ("num_classes", num_classes, 2),
            ("samples_per_group", samples_per_group, 1),
        ):
            if number < least:
                raise ValueError(f"PNE({name}={number}): needs at least {least}.")
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"PNE({name}={value}): must be above 0.")
        if not (0 < max_hard <= 1 if isinstance(max_hard, float) else max_hard >= 1):
            raise ValueError(
                f"PNE(max_hard={max_hard}): give a fraction of the map in (0, 1] as a float, or a "
                "number of pixels as an int."
            )
        super().__init__(
            projector,
            num_classes,
            features=[feature],
            names=[feature],
            needs_dense_embeddings=True,
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.feature = feature
        self.weight = weight
        self.temperature = temperature
        self.samples_per_group = samples_per_group
        self.max_hard = max_hard
        self.official_code = official_code

    def terms(self, batch: Batch) -> list[OwnTerm]:
        """One term. Of its statistics, `weight` is weight * f, `log_ratio` and `pull` (the
        gradient's strength on each side, in 1 / temperature, from 0 to 1) are means over groups,
        and `skipped_<reason>` are shares of wrong pixels that form no group."""
        embeddings, label_map = batch.maps[self.feature], batch.label_map(self.feature)
        order = None
        if not self.official_code:
            order = torch.randperm(label_map.numel(), generator=batch.generator)
        outcomes = sort_outcomes(
            label_map, batch.predictions(self.feature), self.num_classes, order
        )
        taken, skipped = self._eligible(outcomes, area=label_map[0].numel())
        drawn = self._form_groups(outcomes, taken)
        ratios = self._log_ratios(embeddings, batch.scores(self.feature), drawn)
        group, _ = expand(drawn.groups.anchors, len(drawn.anchors))
        of_group = drawn.groups.anchors.size.to(ratios.dtype).reciprocal()[group]
        own = torch.stack([drawn.sizes.sum(), drawn.sizes.new_full((), len(drawn.sizes))])
        wrong, groups = batch.of_all_processes(own.to(ratios.dtype)).sum(dim=0)
        factor = wrong / (self.samples_per_group * groups.clamp(min=1))
        share = factor * (F.softplus(ratios) * of_group).sum() / groups.clamp(min=1)
        mean = of_group / max(len(drawn.sizes), 1)
        none = math.nan if len(drawn.sizes) == 0 else 0.0
        statistics = {
            **skipped,
            "groups": own[1],
            "anchors": own[1].new_full((), len(ratios)),
            "group_size": own[0] / own[1],  # 0 / 0 is nan
            "weight": self.weight * factor,
            "log_ratio": (ratios.detach() * mean).sum() + none,
            "pull": (ratios.detach().sigmoid() * mean).sum() + none,
        }
        return [
            OwnTerm(
                self.feature,
                share,
                self.weight,
                {name: value.to(share.dtype) for name, value in statistics.items()},
                partial(_drawn_pixels, label_map, drawn),
                partial(_pair_sample, embeddings, label_map, drawn),
            )
        ]

    def _eligible(self, outcomes: Outcomes, area: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Decides which groups form.

        Returns:
            (B, K, K) bool by image, predicted and true class, and statistics of the wrong pixels,
            for which the first reason that holds counts.
        """
        correct, wrong = outcomes.correct, outcomes.wrong
        most = self.max_hard
        if isinstance(most, float):
            # Fractions that come from a number of pixels give it back, whatever the rounding.
            most = max(1, math.floor(most * area + 1e-6))
        reasons = {
            "absent_prediction": (correct + wrong.sum(dim=1) == 0)[:, :, None],
            "no_positives": correct[:, None, :] == 0,
            "gate": wrong > most,
        }
        taken = wrong > 0
        total = wrong.sum()
        statistics = {"wrong_pixels": total}
        for reason, holds in reasons.items():
            skipped = wrong.masked_fill(~(taken & holds), 0).sum()
            statistics[f"skipped_{reason}"] = skipped / total  # 0 / 0 is nan
            taken = taken & ~holds
        return taken, statistics

    def _form_groups(self, outcomes: Outcomes, taken: Tensor) -> _Drawn:
        """Draws anchors and samples of the eligible groups; the host waits, once, for their number.

        The correct pixels of an image and class are drawn once, for all groups that use them.
        """
        most, classes = self.samples_per_group, self.num_classes
        used = taken.any(dim=1) | taken.any(dim=2)
        set_sizes = outcomes.correct.clamp(max=most) * used
        sizes = outcomes.wrong.clamp(max=most) * taken
        num_groups, num_anchors, num_samples = torch.stack(
            [taken.sum(), sizes.sum(), set_sizes.sum()]
        ).tolist()  # the only wait for the device

        nth = torch.arange(1, num_groups + 1, device=taken.device)
        group = torch.searchsorted(taken.flatten().cumsum(dim=0), nth)
        anchors = consecutive(sizes.flatten()[group])
        sets = consecutive(set_sizes.flatten())
        anchor_group, anchor_rank = expand(anchors, num_anchors)
        sample_set, sample_rank = expand(sets, num_samples)

        predicted = group.div(classes, rounding_mode="floor")  # image * classes + class
        true = group.div(classes**2, rounding_mode="floor") * classes + group % classes
        negatives = at(sets, predicted)
        empty = negatives.size == 0
        negatives = Ranges(
            torch.where(empty, num_samples + anchors.first, negatives.first),
            torch.where(empty, anchors.size, negatives.size),
        )
        return _Drawn(
            outcomes.order[outcomes.wrong_first.flatten()[group[anchor_group]] + anchor_rank],
            outcomes.order[outcomes.correct_first.flatten()[sample_set] + sample_rank],
            Groups(anchors, at(sets, true), negatives),
            outcomes.wrong.flatten()[group],
        )

    def _log_ratios(self, embeddings: Tensor, scores: Tensor, drawn: _Drawn) -> Tensor:
        """(A,) log of the negatives' mean over the positives', for each anchor."""
        area = embeddings.shape[-2] * embeddings.shape[-1]
        where_samples = _image_and_pixel(drawn.samples, area)
        anchors = gather_pixels(embeddings, *_image_and_pixel(drawn.anchors, area), distinct=True)
        anchors = _constant_length(anchors) if self.official_code else unit_vectors(anchors)
        samples = gather_embeddings(embeddings.detach(), *where_samples)
        # These pixels are correct: the likeliest class is the true one. Its probability is at
        # least 1 / K, so that the log needs no bound.
        rows = gather_pixels(scores, *where_samples).to(samples.dtype)
        return log_ratios(
            anchors,
            torch.cat([samples, anchors.detach()]),
            rows.log_softmax(dim=1).amax(dim=1),
            drawn.groups,
            temperature=self.temperature,
            max_samples=self.samples_per_group,
        )


def _image_and_pixel(pixels: Tensor, area: int) -> tuple[Tensor, Tensor]:
    """Pixels numbered through the batch, as images and pixels of these."""
    image = pixels.div(area, rounding_mode="floor")
    return image, pixels - image * area


def _constant_length(rows: Tensor) -> Tensor:
    """(A, D) rows at length 1, with lengths that count as constants."""
    rows = at_least_fp32(rows)
    return rows / torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True).clamp(min=1e-12)


def _drawn_pixels(label_map: Tensor, drawn: _Drawn) -> dict[str, PixelDraw]:
    labels, draws = label_map.flatten().long(), {}
    for role, pixels in (("anchors", drawn.anchors), ("samples", drawn.samples)):
        where = _image_and_pixel(pixels, label_map[0].numel())
        draws[role] = PixelDraw(*where, labels[pixels], None)
    return draws


@torch.no_grad()
def _pair_sample(embeddings: Tensor, label_map: Tensor, drawn: _Drawn, most: int) -> PairSample:
    """Evenly spread anchors against all samples of the step, of which their groups count."""
    labels, area = label_map.flatten().long(), label_map[0].numel()
    samples = torch.cat([drawn.samples, drawn.anchors])
    group, _ = expand(drawn.groups.anchors, len(drawn.anchors))
    every = torch.ones_like(drawn.anchors, dtype=torch.bool)
    rows = evenly_spread(every, max(1, most // max(1, len(samples))))
    index = torch.arange(len(samples), device=samples.device)
    positive, negative = (
        (index >= sets.first[:, None]) & (index < (sets.first + sets.size)[:, None])
        for sets in (
            at(drawn.groups.positives, group[rows]),
            at(drawn.groups.negatives, group[rows]),
        )
    )
    anchor_units, sample_units = (
        gather_embeddings(embeddings, *_image_and_pixel(pixels, area))
        for pixels in (drawn.anchors[rows], samples)
    )
    with torch.autocast(embeddings.device.type, enabled=False):
        cosines = anchor_units @ sample_units.T
    return PairSample(cosines, positive, negative, labels[drawn.anchors[rows]], labels[samples])

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
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributed import mean_over_processes, sum_over_processes, world_size
from .gather import gather_embeddings, gather_pixels, unit_vectors
from .inspection import MOST_PAIRS, Inspection, evenly_spread
from .log_ratios import Groups, log_ratios
from .method import ContrastMethod, Warmup, connected_zero
from .outcomes import Outcomes, sort_outcomes
from .output import ContrastOutput
from .projector import MultiScaleProjector
from .ranges import Ranges, at, expand, runs
from .sampling import PixelDraw, downsample_labels, predicted_labels

EmptyNegatives = Literal["anchors", "skip", "image"]
Draw = Literal["random", "raster"]
Scale = Literal["paper", "mean"]

# Why misclassified pixels form no group: the first reason that holds counts.
_SKIPS = ("absent_prediction", "no_positives", "no_negatives", "gate")
_QUANTITIES = ("groups", "wrong_pixels", "anchors", "group_size", "weight", "log_ratio", "pull")


class _Drawn(NamedTuple):
    """The groups of a step and the pixels that they read.

    Attributes:
        anchors: (A,) int64 pixels, numbered through the batch; none twice.
        samples: (R,) int64 pixels, likewise; one may be there twice.
        groups: the negatives' places from R on are anchors: R + a is anchor a.
        sizes: (G,) int64 wrong pixels of each group, drawn or not.
    """

    anchors: Tensor
    samples: Tensor
    groups: Groups
    sizes: Tensor


class PNE(ContrastMethod):
    """Pulls misclassified pixels to correct ones of their class, and off those they are taken for.

    The wrong pixels of each image are grouped by predicted class j and true class k. A group's
    positives are the correct pixels of class k in the image, its negatives the correct ones of
    class j, and

        L = weight * f * mean_groups mean_{a in group} l(a)

    with l as at the top of this file. The factor f is the mean number of wrong pixels per group,
    over `samples_per_group`: the loss fades as errors do. Groups do not form where the image shows
    no pixel of class j, where the network gets no pixel of class k right, or where the group's size
    is outside of `min_hard`..`max_hard`: at the beginning of training most errors are in groups
    too large, which makes the upper bound a warm-up. Predictions are those of this step. There is
    no contrast between images, and means are those of one process; with `across_processes` they run
    over the groups of all processes, and loss and gradients are those of one process that has the
    global batch.

    At most `samples_per_group` anchors, and as many positives and negatives, are drawn at random.
    The release takes the first ones in raster order, from the top of the image, and repeats those
    of smaller sets to the same number; a mean needs no repetition.

    The defaults are those of the authors' release, which has one setting, DeepLabV3 on Cityscapes
    at stride 8. There the factor f keeps the effective weight far below `weight`.

    Args:
        projector: heads for feature maps; all but that of `feature` are dropped. The release has
            one hidden block of convolution, norm and ReLU, and 256 channels.
        num_classes: K.
        feature: name of the feature map. The release takes the one that the classifier sees.
        weight: of the loss.
        temperature: divides the similarities.
        samples_per_group: S, most anchors, positives and negatives of a group.
        max_hard: largest group that counts. A float is a fraction of the map's h * w pixels, of at
            least one pixel; an int a number of pixels. 199 pixels of a 64x128 map in the release.
        min_hard: smallest group that counts, likewise.
        empty_negatives: what stands in where class j is in the image and no pixel of it is right:
            the group's anchors, as in the release ("anchors"); correct pixels of the image of all
            classes but k, evenly over these ("image"); or nothing, the group is skipped ("skip").
        draw: "random", or "raster" for the first pixels in raster order.
        scale: "paper" for the factor f; "mean" for f = 1.
        confidence_weights: False sets all w_p = 1.
        detach_anchor_norm: take an anchor's length for a constant, as the release does. It then has
            a gradient along itself, and lengths drift.
        allow_absent_predictions: also form groups where the image has no pixel of class j, with the
            negatives of `empty_negatives`.
        warmup_iters: training passes without contrast.
        ramp_iters: passes over which the weight then grows.
        across_processes: take means over the global batch.

    Raises:
        ValueError: an argument out of its range, unknown, or without effect.

    Reference: Wang et al., "Positive-Negative Equal Contrastive Loss for Semantic Segmentation",
        Neurocomputing 2023 (arXiv:2207.01417), and the authors' release.
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
        min_hard: float | int = 1,
        empty_negatives: EmptyNegatives = "anchors",
        draw: Draw = "random",
        scale: Scale = "paper",
        confidence_weights: bool = True,
        detach_anchor_norm: bool = False,
        allow_absent_predictions: bool = False,
        warmup_iters: int = 0,
        ramp_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        super().__init__(projector)
        for name, number, least in (
            ("num_classes", num_classes, 2),
            ("samples_per_group", samples_per_group, 1),
        ):
            if number < least:
                raise ValueError(f"PNE({name}={number}): needs at least {least}.")
        for name, value in (("weight", weight), ("temperature", temperature)):
            if not 0 < value < math.inf:
                raise ValueError(f"PNE({name}={value}): must be above 0.")
        for name, choice, choices in (
            ("empty_negatives", empty_negatives, EmptyNegatives),
            ("draw", draw, Draw),
            ("scale", scale, Scale),
        ):
            if choice not in choices.__args__:
                raise ValueError(f"PNE({name}={choice!r}): choose one of {choices.__args__}.")
        _check_gate(min_hard, max_hard)
        if allow_absent_predictions and empty_negatives == "skip":
            raise ValueError(
                "allow_absent_predictions=True with empty_negatives='skip': groups of an absent "
                "class have no negatives of their own. Choose 'image' or 'anchors'."
            )
        projector.keep({feature})
        self.num_classes = num_classes
        self.feature = feature
        self.weight = weight
        self.temperature = temperature
        self.samples_per_group = samples_per_group
        self.max_hard = max_hard
        self.min_hard = min_hard
        self.empty_negatives = empty_negatives
        self.draw = draw
        self.scale = scale
        self.confidence_weights = confidence_weights
        self.detach_anchor_norm = detach_anchor_norm
        self.allow_absent_predictions = allow_absent_predictions
        self.warmup = Warmup(warmup_iters, ramp_iters)
        self.across_processes = across_processes

    # How many groups there are is known at run time only: a compiled step has one graph up to here.
    @torch.compiler.disable
    def contrast(
        self,
        maps: Mapping[str, Tensor],
        logits: Tensor | None,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """As in `ContrastMethod`.

        Returns:
            The loss `loss_contrast_<feature>`, and statistics: `groups`; `wrong_pixels`, in groups
            or not; `anchors`; `group_size`, wrong pixels per group; `weight`, weight * f;
            `log_ratio`, the log of the negatives' mean over the positives'; `pull`, the gradient's
            strength on each side, in 1 / temperature, from 0 to 1 (both as means over groups); and
            the shares of wrong pixels that form no group, `skipped_absent_prediction`,
            `skipped_no_positives`, `skipped_no_negatives` and `skipped_gate`. Nan where there is
            nothing to average, and, but for `weight`, during the passes without contrast.
        """
        embeddings = maps[self.feature]
        scores = self._scores(logits, embeddings.shape[-2:])
        factor = self.warmup()
        if factor == 0:
            return self._output(connected_zero([embeddings]), {"weight": embeddings.new_zeros(())})
        label_map = downsample_labels(labels, embeddings.shape[-2:])
        outcomes = sort_outcomes(
            label_map,
            predicted_labels(scores, embeddings.shape[-2:]),
            self.num_classes,
            self._visiting_order(embeddings, generator),
        )
        taken, skips = self._eligible(outcomes, area=embeddings.shape[-2] * embeddings.shape[-1])
        drawn = self._form_groups(outcomes, taken)
        if self.inspection is not None:
            self.inspection.begin(labels, scores)
            self._inspect(self.inspection, embeddings.detach(), label_map, drawn)
        ratios = self._log_ratios(embeddings, scores, drawn)
        return self._reduce(ratios, drawn, factor, skips)

    def _scores(self, logits: Tensor | None, size: torch.Size) -> Tensor:
        """Class scores at the resolution of the embeddings."""
        if logits is None:
            raise ValueError("PNE contrasts misclassified pixels: it needs logits, not None.")
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits of {logits.shape[1]} classes with PNE(num_classes={self.num_classes}): "
                "set num_classes to that of the segmentation head."
            )
        if logits.shape[-2:] == size:
            return logits
        # The release reads the nearest score, in a setting in which both sizes are one. Ours:
        # bilinear, as in `predicted_labels`.
        return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)

    def _visiting_order(self, maps: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """The order of pixels in which groups and sets fill up; None for raster order."""
        if self.draw == "raster":
            return None
        pixels = maps.shape[0] * maps.shape[2] * maps.shape[3]
        return torch.randperm(pixels, generator=generator, device=maps.device)

    def _eligible(self, outcomes: Outcomes, area: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Decides which groups form.

        Returns:
            (B, K, K) bool by image, predicted and true class, and statistics of the wrong pixels.
        """
        correct, wrong = outcomes.correct, outcomes.wrong
        of_predicted, of_true = correct[:, :, None], correct[:, None, :]
        nothing = torch.zeros_like(wrong, dtype=torch.bool)
        reasons = dict.fromkeys(_SKIPS, nothing)
        if not self.allow_absent_predictions:
            reasons["absent_prediction"] = (correct + wrong.sum(dim=1) == 0)[:, :, None]
        reasons["no_positives"] = of_true == 0
        if self.empty_negatives == "skip":
            reasons["no_negatives"] = of_predicted == 0
        elif self.empty_negatives == "image":
            reasons["no_negatives"] = correct.sum(dim=1)[:, None, None] == of_true
        low, high = _in_pixels(self.min_hard, self.max_hard, area)
        reasons["gate"] = (wrong < low) | (wrong > high)

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
        no_negatives = taken & (outcomes.correct == 0)[:, :, None]
        others = outcomes.correct.sum(dim=1, keepdim=True) - outcomes.correct
        # Sets by image and class: the correct pixels of the class, then those of all others.
        used = torch.stack([taken.any(dim=1) | taken.any(dim=2), no_negatives.any(dim=1)])
        used[1] &= self.empty_negatives == "image"
        set_sizes = torch.stack([outcomes.correct, others]).clamp(max=most) * used
        sizes = outcomes.wrong.clamp(max=most) * taken
        num_groups, num_anchors, num_samples = torch.stack(
            [taken.sum(), sizes.sum(), set_sizes.sum()]
        ).tolist()  # the only wait for the device

        nth = torch.arange(1, num_groups + 1, device=taken.device)
        group = torch.searchsorted(taken.flatten().cumsum(dim=0), nth)
        anchors = runs(sizes.flatten()[group])
        sets = runs(set_sizes.flatten())
        anchor_group, rank = expand(anchors, num_anchors)
        anchor_place = outcomes.wrong_first.flatten()[group[anchor_group]] + rank
        sample_place = _places_in_sets(outcomes, sets, *expand(sets, num_samples))

        image = group.div(classes**2, rounding_mode="floor")
        true_class = image * classes + group % classes
        predicted = group.div(classes, rounding_mode="floor")  # image * classes + class
        if self.empty_negatives == "anchors":
            stand_in = Ranges(num_samples + anchors.first, anchors.size)
        else:
            stand_in = at(sets, outcomes.correct.numel() + true_class)
        empty, negatives = no_negatives.flatten()[group], at(sets, predicted)
        negatives = Ranges(
            torch.where(empty, stand_in.first, negatives.first),
            torch.where(empty, stand_in.size, negatives.size),
        )
        return _Drawn(
            outcomes.order[anchor_place],
            outcomes.order[sample_place],
            Groups(anchors, at(sets, true_class), negatives),
            outcomes.wrong.flatten()[group],
        )

    def _log_ratios(self, embeddings: Tensor, scores: Tensor, drawn: _Drawn) -> Tensor:
        """(A,) log of the negatives' mean over the positives', for each anchor."""
        num_pixels = embeddings.shape[-2] * embeddings.shape[-1]
        where_anchors = _image_and_pixel(drawn.anchors, num_pixels)
        where_samples = _image_and_pixel(drawn.samples, num_pixels)
        anchors = gather_pixels(embeddings, *where_anchors, distinct=True)
        anchors = _constant_norm(anchors) if self.detach_anchor_norm else unit_vectors(anchors)
        samples = gather_embeddings(embeddings.detach(), *where_samples)
        log_weights = samples.new_zeros(len(samples))
        if self.confidence_weights:
            rows = gather_pixels(scores, *where_samples).to(samples.dtype)
            # These pixels are correct: the likeliest class is the true one. Its probability is at
            # least 1 / K, so that the log needs no bound.
            log_weights = rows.log_softmax(dim=1).amax(dim=1)
        if self.empty_negatives == "anchors":
            samples = torch.cat([samples, anchors.detach()])
        return log_ratios(
            anchors,
            samples,
            log_weights,
            drawn.groups,
            temperature=self.temperature,
            max_samples=self.samples_per_group,
        )

    def _inspect(
        self, inspection: Inspection, embeddings: Tensor, label_map: Tensor, drawn: _Drawn
    ) -> None:
        """Notes what was drawn, and how similar the anchors are to the samples of their groups."""
        labels, size = label_map.flatten().long(), tuple(label_map.shape[-2:])
        for role, pixels in (("anchors", drawn.anchors), ("samples", drawn.samples.unique())):
            where = _image_and_pixel(pixels, size[0] * size[1])
            inspection.add_draw(self.feature, role, size, PixelDraw(*where, labels[pixels], None))  # pyright: ignore[reportArgumentType]
        # Negatives may lie among the anchors, whose places are those after the samples.
        samples = torch.cat([drawn.samples, drawn.anchors])
        group, _ = expand(drawn.groups.anchors, len(drawn.anchors))
        most = max(1, MOST_PAIRS // max(1, len(samples)))
        rows = evenly_spread(torch.ones_like(drawn.anchors, dtype=torch.bool), most)
        place = torch.arange(len(samples), device=samples.device)
        positive, negative = (
            (place >= sets.first[:, None]) & (place < (sets.first + sets.size)[:, None])
            for sets in (
                at(drawn.groups.positives, group[rows]),
                at(drawn.groups.negatives, group[rows]),
            )
        )
        anchor_units, sample_units = (
            gather_embeddings(embeddings, *_image_and_pixel(pixels, size[0] * size[1]))
            for pixels in (drawn.anchors[rows], samples)
        )
        with torch.autocast(embeddings.device.type, enabled=False):
            cosines = anchor_units @ sample_units.T
        inspection.add_similarities(
            self.feature, cosines, positive, negative, labels[drawn.anchors[rows]], labels[samples]
        )

    def _reduce(
        self, ratios: Tensor, drawn: _Drawn, factor: float, skips: dict[str, Tensor]
    ) -> ContrastOutput:
        """Means over groups of the means over their anchors."""
        num_groups, num_anchors = len(drawn.sizes), len(ratios)
        group, _ = expand(drawn.groups.anchors, num_anchors)
        share = 1 / (drawn.groups.anchors.size * max(num_groups, 1))[group].to(ratios.dtype)
        sizes, weight = drawn.sizes.to(ratios.dtype), ratios.new_full((), self.weight * factor)
        mean = (F.softplus(ratios) * share).sum()
        wrong_and_groups = torch.stack([sizes.sum(), ratios.new_full((), num_groups)])
        if self.across_processes and world_size() > 1:
            mean = mean_over_processes(mean, wrong_and_groups[1])
            wrong_and_groups = sum_over_processes(wrong_and_groups)
        if self.scale == "paper":
            wrong, groups = wrong_and_groups
            weight *= wrong / (self.samples_per_group * groups.clamp(min=1))
        loss = weight * mean
        statistics = {
            **skips,
            "groups": ratios.new_full((), num_groups),
            "anchors": ratios.new_full((), num_anchors),
            "weight": weight,
        }
        if num_groups:
            ratios = ratios.detach()
            statistics["group_size"] = sizes.mean()
            statistics["log_ratio"] = (ratios * share).sum()
            statistics["pull"] = (ratios.sigmoid() * share).sum()
        return self._output(loss, statistics)

    def _output(self, loss: Tensor, statistics: Mapping[str, Tensor]) -> ContrastOutput:
        """The loss with all statistics, of which those that are not given are nan."""
        undefined = loss.new_full((), torch.nan).detach()
        names = [*_QUANTITIES, *(f"skipped_{reason}" for reason in _SKIPS)]
        return ContrastOutput(
            {f"loss_contrast_{self.feature}": loss},
            {
                f"contrast/{self.feature}/{name}": statistics.get(name, undefined).to(loss.dtype)
                for name in names
            },
        )


def _places_in_sets(outcomes: Outcomes, sets: Ranges, number: Tensor, rank: Tensor) -> Tensor:
    """Where in the order of pixels the samples of each set lie.

    Args:
        outcomes: the sorted pixels.
        sets: (2BK,) by image and class, of the correct pixels of the class, then of all others.
        number: (R,) int64 set of each sample.
        rank: (R,) int64, 0, 1, ... among the samples of the set.
    """
    correct, first = outcomes.correct.flatten(), outcomes.correct_first.flatten()
    classes = outcomes.correct.shape[1]
    own = number % len(correct)  # image and class
    image = own.div(classes, rounding_mode="floor")
    others = outcomes.correct.sum(dim=1)[image] - correct[own]
    # Pixels are sorted by class, and in the order of the draw within one: even steps through the
    # image give every class its share. The set's own class is stepped over.
    step = (rank * others).div(sets.size[number], rounding_mode="floor")
    place = first[image * classes] + step
    place = place + torch.where(place >= first[own], correct[own], 0)
    return torch.where(number < len(correct), first[own] + rank, place)


def _image_and_pixel(pixels: Tensor, area: int) -> tuple[Tensor, Tensor]:
    """Pixels numbered through the batch, as images and pixels of these."""
    image = pixels.div(area, rounding_mode="floor")
    return image, pixels - image * area


def _constant_norm(rows: Tensor) -> Tensor:
    """(A, D) rows at length 1, in fp32 at least, with lengths that count as constants."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return rows / torch.linalg.vector_norm(rows.detach(), dim=1, keepdim=True).clamp(min=1e-12)


def _in_pixels(low: float | int, high: float | int, area: int) -> tuple[int, int]:
    """The bounds of group sizes as numbers of pixels of a map of `area` pixels."""
    # Fractions that come from a number of pixels give it back, whatever the rounding.
    if isinstance(low, float):
        low = math.ceil(low * area - 1e-6)
    if isinstance(high, float):
        high = max(1, math.floor(high * area + 1e-6))
    return low, high


def _check_gate(low: float | int, high: float | int) -> None:
    for name, bound in (("min_hard", low), ("max_hard", high)):
        if isinstance(bound, float) and not 0 < bound <= 1:
            raise ValueError(
                f"PNE({name}={bound}): a float is a fraction of the map, in (0, 1]; for a number "
                "of pixels give an int."
            )
        if isinstance(bound, int) and bound < 1:
            raise ValueError(f"PNE({name}={bound}): needs at least 1 pixel.")
    if type(low) is type(high) and low > high:
        raise ValueError(f"PNE(min_hard={low}, max_hard={high}): no group can be of such a size.")

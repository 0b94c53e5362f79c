"""Anchors that the segmentation gets wrong, and others to go with them.

Shape letters: S scales (label maps of one step), B images, K classes, h w a feature map, A anchors
of one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .sampling import (
    Balance,
    Batch,
    budget_of_process,
    class_counts,
    count_pixels,
    draw_pixels,
    quotas_of_process,
    share_equally,
    sort_pixels,
)
from .sets import PixelDraw, on_device

Fill = Literal["random", "easy"]

# Least anchors of a unit of balance: a positive pair.
_LEAST_PER_GROUP = 2


class HardAnchorSampler:
    """Draws pixels of every class, a share of them wrongly predicted ("hard").

    The unit of balance is a class of the batch, or an (image, class) pair. Of N such units with at
    least `min_pixels` pixels, each gives

        n = min(max_per_group, max(max_anchors // N, 2), its pixels)

    anchors, of which n * `hard_share`, rounded half up, are hard; a unit that has fewer wrong
    pixels gives them all. The others come from

    * `fill_from="random"` (the paper): all its other pixels, wrong ones too;
    * `fill_from="easy"` (the official code): its rightly predicted pixels. Where these are too few,
      there are more hard ones instead.

    With `balance="class"` the anchors of a class are shared as equally as the pixel counts allow
    among the images. `max_anchors` is shared by processes as in `BalancedSampler`. Labels decide
    how many pixels of a class are drawn, and only which of them depends on predictions: the host
    does not wait for the device, unless the global batch is balanced.

    Args:
        num_classes: K.
        balance: the unit of balance.
        max_anchors: most anchors per scale, of all processes together, unless units of two need
            more.
        max_per_group: most anchors per class (or pair). The paper draws 50 per class.
        min_pixels: classes (or pairs) with fewer pixels at a scale are not drawn at that scale.
        hard_share: of the anchors, in 0..1.
        fill_from: where the other anchors come from.

    Raises:
        ValueError: an argument out of its range.

    Reference: Wang, Zhou, Yu, Dai, Konukoglu, Van Gool, "Exploring Cross-Image Pixel Contrast for
        Semantic Segmentation", ICCV 2021, section 3.2 ("segmentation-aware hard anchor sampling").
    """

    def __init__(
        self,
        num_classes: int,
        *,
        balance: Balance = "class",
        max_anchors: int = 10_000,
        max_per_group: int = 50,
        min_pixels: int = 1,
        hard_share: float = 0.5,
        fill_from: Fill = "random",
    ) -> None:
        if balance not in ("class", "image_class"):
            raise ValueError(f"balance={balance!r}: choose 'class' or 'image_class'.")
        if fill_from not in ("random", "easy"):
            raise ValueError(f"fill_from={fill_from!r}: choose 'random' or 'easy'.")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: needs at least 1.")
        if max_anchors < _LEAST_PER_GROUP * num_classes:
            raise ValueError(
                f"max_anchors={max_anchors} cannot give two anchors (a positive pair) to each of "
                f"{num_classes} classes: set it to {_LEAST_PER_GROUP * num_classes} or more."
            )
        if max_per_group < 1:
            raise ValueError(f"max_per_group={max_per_group}: needs at least 1.")
        if min_pixels < 1:
            raise ValueError(f"min_pixels={min_pixels}: a class that is drawn has at least 1.")
        if not 0 <= hard_share <= 1:
            raise ValueError(f"hard_share={hard_share}: a share is in 0..1.")
        self.num_classes = num_classes
        self.balance = balance
        self.max_anchors = max_anchors
        self.max_per_group = max_per_group
        self.min_pixels = min_pixels
        self.hard_share = hard_share
        self.fill_from = fill_from

    def draw(self, batch: Batch, features: Sequence[str]) -> list[PixelDraw]:
        """As in `Sampler`."""
        return self(
            [batch.host_labels(feature) for feature in features],
            [batch.predictions(feature) for feature in features],
            batch.generator,
            batch.across_processes,
        )

    @torch.no_grad()
    def __call__(
        self,
        label_maps: Sequence[Tensor],
        prediction_maps: Sequence[Tensor],
        generator: torch.Generator | None = None,
        across_processes: bool = False,
    ) -> list[PixelDraw]:
        """Draws anchors at every scale.

        Args:
            label_maps: S integer maps (B, h, w) on the host, one per scale, of the same B images. A
                value outside 0..K-1 is ignored.
            prediction_maps: S integer maps (B, h, w) of predicted classes, on any device.
            generator: source of the draw, on the host; None for the default one.
            across_processes: balance the global batch; every process has to make the call.

        Returns:
            S draws on the predictions' device, without repeated pixels; within a class and an image
            the hard quota comes first. A draw may be empty.

        Raises:
            ValueError: a prediction map of another shape than its label map.
        """
        for labels, predictions in zip(label_maps, prediction_maps, strict=True):
            if labels.shape != predictions.shape:
                raise ValueError(
                    f"a prediction map {tuple(predictions.shape)} with a label map "
                    f"{tuple(labels.shape)}: resize both to the feature map."
                )
        budget = budget_of_process(self.max_anchors, across_processes)
        right, pixels, totals = [], [], []
        for labels, predictions in zip(label_maps, prediction_maps, strict=True):
            totals.append(count_pixels(labels, self.num_classes))
            labels = on_device(labels, predictions.device)
            right.append(labels == predictions)
            pixels.append(sort_pixels(labels, self.num_classes, halves=right[-1]))
        quotas = quotas_of_process(
            torch.stack([x.counts for x in pixels]).unflatten(2, (-1, 2)),
            lambda counts: self._quotas(counts, budget),
            across_processes,
        ).flatten(2)
        of_classes = quotas
        if not across_processes:
            of_classes = self._wanted(self._units(torch.stack(totals)), budget)
        draws = draw_pixels(
            pixels,
            quotas,
            class_counts(of_classes),
            generator,
            from_remainder=self.fill_from == "random",
        )
        return [
            draw._replace(wrong=~is_right.flatten(1)[draw.image, draw.pixel])
            for draw, is_right in zip(draws, right, strict=True)
        ]

    def _units(self, counts: Tensor) -> Tensor:
        """(S, K, B, ...) pixel counts -> those of the units of balance."""
        return counts.sum(dim=2, keepdim=True) if self.balance == "class" else counts

    def _quotas(self, counts: Tensor, budget: int) -> Tensor:
        """(S, K, B, 2) numbers of wrong and right pixels -> quotas of hard anchors and others."""
        per_class = self.balance == "class"
        wrong, right = self._units(counts).unbind(dim=3)
        wanted = self._wanted(wrong + right, budget)
        hard = (wanted.double() * self.hard_share + 0.5).long()
        if self.fill_from == "easy":
            hard = hard.maximum(wanted - right)
        hard = hard.minimum(wrong)
        others = wanted - hard
        if per_class:
            wrong, right = counts.unbind(dim=3)
            hard = share_equally(wrong, hard.squeeze(2))
            left = right if self.fill_from == "easy" else wrong + right - hard
            others = share_equally(left, others.squeeze(2))
        return torch.stack([hard, others], dim=3)

    def _wanted(self, counts: Tensor, budget: int) -> Tensor:
        """Anchors of each unit of balance: (S, ...) sizes -> (S, ...)."""
        eligible = counts >= self.min_pixels
        num_eligible = eligible.sum(dim=(1, 2), keepdim=True)
        target = budget // num_eligible.clamp(min=1)
        target = target.clamp(min=_LEAST_PER_GROUP).clamp(max=self.max_per_group)
        return counts.minimum(target).masked_fill(~eligible, 0)

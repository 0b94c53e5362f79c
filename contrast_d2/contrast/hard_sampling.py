"""Anchors that the segmentation gets wrong, and others to go with them.

Shape letters: S scales (label maps of one step), B images, K classes, h w a feature map, A anchors
of one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .distributed import process_share, quotas_of_all
from .sampling import Balance, PixelDraw, draw_pixels, share_equally, sort_pixels

Rest = Literal["random", "easy"]

# Least anchors of a unit of balance: a positive pair.
_LEAST_PER_GROUP = 2


class HardAnchorSampler:
    """Draws pixels of every class, a share of them wrongly predicted ("hard").

    The unit of balance is a class of the batch, or an (image, class) pair. Of N such units with at
    least `min_pixels` pixels, each gives

        n = min(max_per_group, max(max_anchors // N, 2), its pixels)

    anchors, of which n * `hard_share`, rounded, are hard: a half is rounded up, so that a single
    anchor is a hard one. A unit that has fewer wrong pixels gives them all. The rest come from

    * `rest="random"` (the paper): all its other pixels, wrong ones too;
    * `rest="easy"` (the release): its rightly predicted pixels. Where these are too few, further
      hard ones take their place.

    With `balance="class"` the hard anchors of a class, and the rest of them, are shared as equally
    as their pixel counts allow among the images. The paper does not state how a class's anchors
    are spread over images.

    The form of the paper is the default. That of the release is `balance="image_class",
    max_anchors=1024, max_per_group=100, min_pixels=101, rest="easy"`; only odd n differ, of which
    it rounds the hard half down, and more than 512 units, to which it gives a single anchor and
    then none. Here they give two each, more than `max_anchors` in all.

    `max_anchors` is for the batch of all processes together, and each process applies an equal
    share of it to its own images; the release's number is that of one process. With
    `across_processes` the units of balance are those of the global batch, and each process draws
    the share of its own images. The host waits for the device once per call, to learn how many
    anchors there are.

    Args:
        num_classes: K.
        balance: the unit of balance.
        max_anchors: most anchors per scale, of all processes together, unless units of two need
            more.
        max_per_group: most anchors per class (or pair). The paper draws 50 per class.
        min_pixels: classes (or pairs) with fewer pixels at a scale are not drawn at that scale.
        hard_share: of the anchors, in 0..1.
        rest: where the other anchors come from.
        across_processes: balance the global batch, not the images of each process.

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
        rest: Rest = "random",
        across_processes: bool = False,
    ) -> None:
        if balance not in ("class", "image_class"):
            raise ValueError(f"balance={balance!r}: choose 'class' or 'image_class'.")
        if rest not in ("random", "easy"):
            raise ValueError(f"rest={rest!r}: choose 'random' or 'easy'.")
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
        self.rest = rest
        self.across_processes = across_processes

    @torch.no_grad()
    def __call__(
        self,
        label_maps: Sequence[Tensor],
        prediction_maps: Sequence[Tensor],
        generator: torch.Generator | None = None,
    ) -> list[PixelDraw]:
        """Draws anchors at every scale.

        Args:
            label_maps: S integer maps (B, h, w), one per scale, of the same B images. A value
                outside 0..K-1 is ignored.
            prediction_maps: S integer maps (B, h, w) of predicted classes.
            generator: source of the draw, on the labels' device; None for the default one.

        Returns:
            S draws, without repeated pixels; within a class and an image the hard quota comes
            first. A draw may be empty.

        Raises:
            ValueError: a prediction map of another shape than its label map.
        """
        for labels, predictions in zip(label_maps, prediction_maps, strict=True):
            if labels.shape != predictions.shape:
                raise ValueError(
                    f"a prediction map {tuple(predictions.shape)} with a label map "
                    f"{tuple(labels.shape)}: resize both to the feature map."
                )
        right = [
            labels == predictions
            for labels, predictions in zip(label_maps, prediction_maps, strict=True)
        ]
        pixels = sort_pixels(label_maps, self.num_classes, halves=right)
        counts = pixels.counts.unflatten(2, (-1, 2))
        if self.across_processes:
            quotas = quotas_of_all(counts, self._quotas)
        else:
            quotas = self._quotas(counts)
        return draw_pixels(
            label_maps,
            pixels,
            quotas.flatten(2),
            [self._capacity(label_map) for label_map in label_maps],
            generator,
            from_remainder=self.rest == "random",
        )

    def _capacity(self, label_map: Tensor) -> int:
        """The most anchors that the budgets allow."""
        units = self.num_classes * (1 if self.balance == "class" else len(label_map))
        return min(max(self._budget(), _LEAST_PER_GROUP * units), label_map.numel())

    def _budget(self) -> int:
        """Most anchors per scale of the images that are balanced together."""
        return self.max_anchors if self.across_processes else process_share(self.max_anchors)

    def _quotas(self, counts: Tensor) -> Tensor:
        """(S, K, B, 2) numbers of wrong and right pixels -> quotas of hard anchors and the rest."""
        per_class = self.balance == "class"
        wrong, right = (counts.sum(dim=2, keepdim=True) if per_class else counts).unbind(dim=3)
        wanted = self._wanted(wrong + right)
        hard = (wanted.double() * self.hard_share + 0.5).long()
        if self.rest == "easy":
            hard = hard.maximum(wanted - right)
        hard = hard.minimum(wrong)
        rest = wanted - hard
        if per_class:
            wrong, right = counts.unbind(dim=3)
            hard = share_equally(wrong, hard.squeeze(2))
            left = right if self.rest == "easy" else wrong + right - hard
            rest = share_equally(left, rest.squeeze(2))
        return torch.stack([hard, rest], dim=3)

    def _wanted(self, counts: Tensor) -> Tensor:
        """Anchors of each unit of balance: (S, ...) sizes -> (S, ...)."""
        eligible = counts >= self.min_pixels
        num_eligible = eligible.sum(dim=(1, 2), keepdim=True)
        target = self._budget() // num_eligible.clamp(min=1)
        target = target.clamp(min=_LEAST_PER_GROUP).clamp(max=self.max_per_group)
        return counts.minimum(target).masked_fill(~eligible, 0)

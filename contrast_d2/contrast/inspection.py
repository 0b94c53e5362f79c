"""What a contrast method did in one step, kept to be looked at.

An `Inspection` is given to a method, which fills it in its next steps:

    method.inspection = Inspection(num_classes)
    losses, statistics = method(features, logits, labels)
    method.inspection.draws["res2"]["anchors"]
    method.inspection = None

Without one, as by default, a method computes nothing of all this. With one, losses, gradients and
random numbers are the same; the host waits for the device more often.

Shape letters: B images, K classes, H W the labels' size, h w a feature map, A anchors, C contrast
samples, D embedding width, N drawn pixels, R S parts of A and C.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .sampling import PixelDraw, predicted_labels

# What pixels are drawn for: "samples" serve as positives and negatives alike.
Role = Literal["anchors", "boundary negatives", "samples"]

# Of larger sets so many anchors and contrast samples are compared: 2 million pairs, whose
# histogram does not change visibly with more of them.
_MOST_ANCHORS, _MOST_SAMPLES = 1024, 2048
MOST_PAIRS = _MOST_ANCHORS * _MOST_SAMPLES


class DrawnPixels(NamedTuple):
    """Pixels that were drawn from one feature map.

    Attributes:
        image: (N,) int64, index of the image in the batch.
        row, column: (N,) int64, where in the labels (H, W) the pixel of the map reads its class.
        labels: (N,) int64, class of the pixel.
        wrong: (N,) bool, whether the network predicts another class; None without predictions.
    """

    image: Tensor
    row: Tensor
    column: Tensor
    labels: Tensor
    wrong: Tensor | None


class Similarities(NamedTuple):
    """Cosine similarities of the pairs that a term contrasts.

    Attributes:
        positive: (P,) fp32, of anchors and their positives.
        negative: (N,) fp32, of anchors and their negatives.
        of_classes: (K, K) fp32, mean over the pairs of an anchor of the row's class and a sample of
            the column's; nan where there is none.
    """

    positive: Tensor
    negative: Tensor
    of_classes: Tensor


class Inspection:
    """What a method, or a sum of methods, did with its last batch.

    Names are those in the statistics: of a scale or term `res2`, in a sum `<method>/res2`.

    Args:
        num_classes: K.

    Attributes:
        draws: by scale, and there by what the pixels were drawn for.
        similarities: by term.
        anchor_pixels: by scale, (K,) number of pixels whose mean is the anchor of the class, for
            methods whose anchors are such means.
        bank_fill: by name of the ring, (K,) share of the slots of each class that are filled.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.draws: dict[str, dict[Role, DrawnPixels]] = {}
        self.similarities: dict[str, Similarities] = {}
        self.anchor_pixels: dict[str, Tensor] = {}
        self.bank_fill: dict[str, Tensor] = {}
        self._batch: dict[str, Tensor | None] = {}
        self._prefix = ""

    @property
    def labels(self) -> Tensor:
        """(B, H, W) of the batch."""
        labels = self._batch["labels"]
        assert labels is not None
        return labels

    def named(self, method: str) -> Inspection:
        """The same, for one method of a sum: what it adds has names that begin with its own."""
        part = copy.copy(self)  # shares the dicts
        part._prefix = f"{self._prefix}{method}/"
        return part

    def begin(self, labels: Tensor, logits: Tensor | None) -> None:
        """Says which batch all that follows is of.

        Args:
            labels: (B, H, W) integers at full resolution.
            logits: (B, K, h', w') class scores, or None.
        """
        self._batch.update(labels=labels, logits=logits)

    @torch.no_grad()
    def add_draw(self, scale: str, role: Role, size: Sequence[int], draw: PixelDraw) -> None:
        """Notes pixels that were drawn; the padding of a draw is left out.

        Args:
            scale: name of the feature map.
            role: what for.
            size: (h, w) of the map.
            draw: the pixels.
        """
        image, pixel, labels = (x[draw.labels >= 0] for x in draw[:3])
        height, width = self.labels.shape[-2:]
        row = pixel // size[1] * height // size[0]  # as in `downsample_labels`
        column = pixel % size[1] * width // size[1]
        wrong = None
        logits = self._batch["logits"]
        if logits is not None:
            wrong = predicted_labels(logits, size).flatten(1)[image, pixel] != labels
        draws = self.draws.setdefault(self._prefix + scale, {})
        draws[role] = DrawnPixels(image, row, column, labels, wrong)

    @torch.no_grad()
    def add_pairs(
        self,
        term: str,
        anchors: tuple[Tensor, Tensor],
        contrast: tuple[Tensor, Tensor],
        *,
        holds_anchors: bool,
        num_positives: int | None = None,
    ) -> None:
        """Notes how similar anchors are to the samples that they are contrasted with.

        All pairs count where there are at most 1024 anchors and 2048 samples, or else those of so
        many, evenly spread over the sets.

        Args:
            term: name of the term.
            anchors: (A, D) unit vectors and (A,) classes; -1 for padding.
            contrast: (C, D) unit vectors and (C,) classes; -1 for padding.
            holds_anchors: the first A samples are the anchors, and none is paired with itself.
            num_positives: the first so many samples are positives only, all others negatives only;
                None where every sample is both.
        """
        rows, columns = (
            evenly_spread(labels >= 0, most)
            for labels, most in ((anchors[1], _MOST_ANCHORS), (contrast[1], _MOST_SAMPLES))
        )
        with torch.autocast(rows.device.type, enabled=False):
            cosines_RS = anchors[0][rows].float() @ contrast[0][columns].float().T
        anchor_labels, contrast_labels = anchors[1][rows], contrast[1][columns]
        positive_RS = anchor_labels[:, None] == contrast_labels
        negative_RS = ~positive_RS
        if holds_anchors:
            positive_RS &= rows[:, None] != columns
        if num_positives is not None:
            positive_RS &= columns < num_positives
            negative_RS &= columns >= num_positives
        self.add_similarities(
            term, cosines_RS, positive_RS, negative_RS, anchor_labels, contrast_labels
        )

    @torch.no_grad()
    def add_similarities(
        self,
        term: str,
        cosines: Tensor,
        positive: Tensor,
        negative: Tensor,
        anchor_labels: Tensor,
        contrast_labels: Tensor,
    ) -> None:
        """As `add_pairs`, from a matrix of similarities.

        Args:
            term: name of the term.
            cosines: (R, S).
            positive, negative: (R, S) bool, which pairs count as what.
            anchor_labels: (R,) classes 0..K-1.
            contrast_labels: (S,) classes 0..K-1.
        """
        classes = torch.arange(self.num_classes, device=cosines.device)
        of_row_KR = (anchor_labels == classes[:, None]).float()
        of_column_SK = (contrast_labels[:, None] == classes).float()
        counted_RS = positive | negative
        cosines = cosines.float()
        with torch.autocast(cosines.device.type, enabled=False):
            # Sums over a few rows of one class first: fp32 is exact enough for a picture.
            sums_KK = of_row_KR @ torch.where(counted_RS, cosines, 0) @ of_column_SK
            counts_KK = of_row_KR @ counted_RS.float() @ of_column_SK
        self.similarities[self._prefix + term] = Similarities(
            cosines[positive],
            cosines[negative],
            sums_KK / counts_KK,  # 0 / 0 is nan
        )

    def add_anchor_pixels(self, scale: str, counts: Tensor) -> None:
        """Notes of how many pixels the anchor of each class is the mean, (K,)."""
        self.anchor_pixels[self._prefix + scale] = counts.detach()

    def add_bank_fill(self, ring: str, shares: Tensor) -> None:
        """Notes the share of its slots that each class has filled, (K,)."""
        self.bank_fill[self._prefix + ring] = shares.detach()


def evenly_spread(valid: Tensor, most: int) -> Tensor:
    """Indices of at most so many of the valid entries of a vector, all at about one distance."""
    index = valid.nonzero()[:, 0]
    if len(index) <= most:
        return index
    return index[torch.arange(most, device=index.device) * len(index) // most]

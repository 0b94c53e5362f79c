"""What contrast methods did in one step, kept to be looked at.

A method fills an `Inspection` in its next steps:

    method.inspection = Inspection(num_classes)
    losses, statistics = method(features, labels, logits)
    method.inspection.draws["res2"]["anchors"]
    method.inspection = None

Without one, as by default, nothing of this is computed. With one, losses, gradients and random
numbers are the same; the host waits for the device more often.

Shape letters: B images, K classes, H W the labels' size, h w a feature map, A anchors, C contrast
samples, D embedding width, N drawn pixels, R S parts of A and C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .memory import RingBuffer
from .sampling import Batch
from .sets import PixelDraw, joined_sets
from .terms import OwnTerm, PairSample, Side, Term

# Of larger sets so many anchors and contrast samples are compared: 2 million pairs, whose
# histogram does not change visibly with more of them.
_MOST_ANCHORS, _MOST_SAMPLES = 1024, 2048


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
    """What a method, or a sum of methods, did with its last batch. An `Observer` of terms.

    Names are those in the statistics: of a scale or term `res2`, in a sum `<method>/res2`.

    Args:
        num_classes: K.

    Attributes:
        draws: by scale, and there by what the pixels were drawn for: "anchors", "boundary
            negatives", or "samples", which serve as positives and negatives alike.
        similarities: by term.
        anchor_pixels: by scale, (K,) number of pixels whose mean is the anchor of the class, for
            methods whose anchors are such means.
        bank_fill: by kind of key, (K,) share of the slots of each class that are filled.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.draws: dict[str, dict[str, DrawnPixels]] = {}
        self.similarities: dict[str, Similarities] = {}
        self.anchor_pixels: dict[str, Tensor] = {}
        self.bank_fill: dict[str, Tensor] = {}
        self._batch: Batch | None = None

    @property
    def labels(self) -> Tensor:
        """(B, H, W) of the batch."""
        assert self._batch is not None
        return self._batch.labels

    def begin(self, batch: Batch) -> None:
        """A step with the maps of all methods."""
        self._batch = batch

    def see_memory(self, prefix: str, memory: RingBuffer) -> None:
        """The memory of a method, before it stores the keys of the step."""
        for kind, shares in memory.fill_by_class().items():
            self.bank_fill[prefix + kind] = shares

    @torch.no_grad()
    def see_term(self, term: Term, contrast: Sequence[Side]) -> None:
        """As in `Observer`. All pairs of at most 1024 anchors and 2048 samples are kept, or else
        those of so many, evenly spread over the sets."""
        prefix = term.name.rpartition("/")[0]
        # Others are the anchors of another term, unless anchors are no pixels.
        others = {"negatives": "boundary negatives"}
        if term.anchors.draw is None:
            others["both"] = "samples"
        sides = [(term.anchors, "anchors")]
        sides += [(side.set, others.get(side.role, "")) for side in term.contrast]
        for pixels, role in sides:
            if pixels.draw is not None and role:
                self._add_draw(prefix, pixels.feature, role, pixels.draw)
        samples = joined_sets([side.set for side in contrast])
        rows = evenly_spread(term.anchors.labels >= 0, _MOST_ANCHORS)
        columns = evenly_spread(samples.labels >= 0, _MOST_SAMPLES)
        with torch.autocast(rows.device.type, enabled=False):
            cosines_RS = (
                term.anchors.embeddings[rows].float() @ samples.embeddings[columns].float().T
            )
        anchor_labels, labels = term.anchors.labels[rows], samples.labels[columns]
        positive_RS = anchor_labels[:, None] == labels
        negative_RS = ~positive_RS
        if term.holds_anchors:
            positive_RS &= rows[:, None] != columns
        first = 0
        for side in contrast:
            here = (columns >= first) & (columns < first + len(side.set.labels))
            if side.role == "positives":
                negative_RS &= ~here
            elif side.role == "negatives":
                positive_RS &= ~here
            first += len(side.set.labels)
        self._add_pairs(
            term.name, PairSample(cosines_RS, positive_RS, negative_RS, anchor_labels, labels)
        )

    @torch.no_grad()
    def see_own_term(self, term: OwnTerm) -> None:
        """As in `Observer`."""
        prefix, _, feature = term.name.rpartition("/")
        for role, draw in term.draws().items():
            self._add_draw(prefix, feature, role, draw)
        if term.anchor_pixels is not None:
            self.anchor_pixels[term.name] = term.anchor_pixels.detach()
        self._add_pairs(term.name, term.pairs(_MOST_ANCHORS * _MOST_SAMPLES))

    def _add_draw(self, prefix: str, feature: str, role: str, draw: PixelDraw) -> None:
        """Notes pixels that were drawn; the padding of a draw is left out."""
        assert self._batch is not None
        image, pixel, labels = (x[draw.labels >= 0] for x in draw[:3])
        height, width = self.labels.shape[-2:]
        h, w = self._batch.maps[feature].shape[-2:]
        wrong = None
        if self._batch.logits is not None:
            wrong = self._batch.predictions(feature).flatten(1)[image, pixel] != labels
        draws = self.draws.setdefault(f"{prefix}/{feature}" if prefix else feature, {})
        # As in `downsample_labels`.
        row, column = pixel // w * height // h, pixel % w * width // w
        draws[role] = DrawnPixels(image, row, column, labels, wrong)

    def _add_pairs(self, term: str, pairs: PairSample) -> None:
        classes = torch.arange(self.num_classes, device=pairs.cosines.device)
        of_row_KR = (pairs.anchor_labels == classes[:, None]).float()
        of_column_SK = (pairs.contrast_labels[:, None] == classes).float()
        counted_RS = pairs.positive | pairs.negative
        cosines = pairs.cosines.float()
        with torch.autocast(cosines.device.type, enabled=False):
            # Sums over a few rows of one class first: fp32 is exact enough for a picture.
            sums_KK = of_row_KR @ torch.where(counted_RS, cosines, 0) @ of_column_SK
            counts_KK = of_row_KR @ counted_RS.float() @ of_column_SK
        self.similarities[term] = Similarities(
            cosines[pairs.positive],
            cosines[pairs.negative],
            sums_KK / counts_KK,  # 0 / 0 is nan
        )


def evenly_spread(valid: Tensor, most: int) -> Tensor:
    """Indices of at most so many of the valid entries of a vector, all at about one distance."""
    index = valid.nonzero()[:, 0]
    if len(index) <= most:
        return index
    return index[torch.arange(most, device=index.device) * len(index) // most]

"""Negatives near the boundary of wrongly predicted regions.

A pixel in the middle of a region of errors is often wrong for good; one at its edge has just
tipped over. Contextrast (Sung et al., CVPR 2024) takes its negatives from there.

Shape letters: B images, K classes, h w a label map, R rows of pixels, N pixels of all images,
G groups (one image and class), S maps of one step, A drawn pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .sampling import Batch
from .sets import PixelDraw, on_device

ErrorMap = Literal["false_negatives", "false_positives"]

# Elements of the row pass that are alive at a time: on a CPU they should stay in the cache, a GPU
# does better with few launches.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 24


class BoundaryPixels(NamedTuple):
    """Wrongly predicted pixels, and those of them near the boundary of their region.

    Attributes:
        region: (B, h, w) int64, the class whose error map holds the pixel; -1 where the prediction
            is right or the pixel ignored.
        squared_distance: (B, h, w) fp32, squared distance in pixels to the nearest pixel of another
            region; inf where the image has one region only.
        selected: (B, h, w) bool.
    """

    region: Tensor
    squared_distance: Tensor
    selected: Tensor


@torch.no_grad()
def squared_distance_to_other(regions: Tensor) -> Tensor:
    """Exact squared Euclidean distance of each pixel to the nearest pixel of another value.

    For a map of disjoint regions that is the distance transform of every region at once. It is the
    minimum over parabolas: with g the distance to another value within the pixel's column,

        d^2(u, v) = min( min_v' (v - v')^2 + g(u, v')^2,  distance within the row, squared )

    A column v' in which row u has another value gives no less than the distance within the row, so
    the inner minimum needs no test for equal values.

    Args:
        regions: (B, h, w) integers. What lies beyond the border of the map is no region.

    Returns:
        (B, h, w) fp32, in squared pixels, exact below 2^24; inf where an image has one value only.

    Reference: Felzenszwalb and Huttenlocher, "Distance Transforms of Sampled Functions", Theory of
        Computing, 2012, equation (1), without their search for the lower envelope: on a GPU the
        minimum over all v' is faster.
    """
    height, width = regions.shape[1:]
    if width > height:  # the cost is a longer row for every pixel
        return squared_distance_to_other(regions.mT).mT
    in_row = _distance_in_row(regions).square()
    in_column_Rw = _distance_in_row(regions.mT).mT.square().reshape(-1, width)
    columns = torch.arange(width, dtype=in_row.dtype, device=regions.device)
    offsets_ww = (columns - columns[:, None]).square()
    elements = _CPU_ELEMENTS if regions.device.type == "cpu" else _GPU_ELEMENTS
    chunk = max(1, elements // (width * width))
    nearest = [(part[:, None] + offsets_ww).amin(dim=2) for part in in_column_Rw.split(chunk)]
    return torch.cat(nearest).view_as(in_row).minimum(in_row)


def _distance_in_row(values: Tensor) -> Tensor:
    """Distance (..., w) in fp32 to the nearest other value of the same row; inf where all agree."""
    width = values.shape[-1]
    index = torch.arange(width, dtype=torch.float32, device=values.device)
    begins = values != values.roll(1, dims=-1)
    begins[..., 0] = False
    ends = begins.roll(-1, dims=-1)
    first = torch.where(begins, index, -torch.inf).cummax(dim=-1).values
    last = torch.where(ends, index, torch.inf).flip(-1).cummin(dim=-1).values.flip(-1)
    return (index - first).minimum(last - index) + 1


@torch.no_grad()
def boundary_negatives(
    labels: Tensor,
    predictions: Tensor,
    num_classes: int,
    *,
    fraction: float = 0.5,
    error_map: ErrorMap = "false_negatives",
    generator: torch.Generator | None = None,
) -> BoundaryPixels:
    """Boundary-aware negatives: from each class's region of errors, the pixels next to its edge.

    Of the n pixels of an image that are wrong and belong to the error map of one class,
    ceil(fraction * n) are selected, at least one: those with the smallest distance to the outside
    of that map. Regions of errors are thin, so distances tie in masses; ties are broken at random,
    where a threshold on the distance would keep far more than the fraction. The paper does not
    state this, nor that the ranking is by image; ours, since distances in images of different
    scale do not compare.

    Ignored pixels are no errors, but they are outside of an error map. The border of the image is
    no edge. Where an error map fills the whole image, the selection is a random part of it.

    Args:
        labels: (B, h, w) integers; others than 0..K-1 are ignored.
        predictions: (B, h, w) integers in 0..K-1.
        num_classes: K.
        fraction: part of each region to select, in (0, 1].
        error_map: whose error map a wrong pixel belongs to: "false_negatives", the class that it
            should have got; or "false_positives", the class that it got.
        generator: source of the random order of ties, on the host; None for the default one.

    Raises:
        ValueError: fraction out of range, or an unknown error map.

    Reference: Sung et al., "Contextrast: Contextual Contrastive Learning for Semantic
        Segmentation", CVPR 2024, boundary-aware negative (BANE) sampling.
    """
    check_fraction(fraction)
    if error_map not in get_args(ErrorMap):
        raise ValueError(f"error_map={error_map!r}: choose one of {list(get_args(ErrorMap))}.")
    wrong = (labels >= 0) & (labels < num_classes) & (labels != predictions)
    classes = labels if error_map == "false_negatives" else predictions
    region = torch.where(wrong, classes.long(), -1)
    squared_distance = squared_distance_to_other(region)
    selected = _nearest_of_each_group(region, squared_distance, num_classes, fraction, generator)
    return BoundaryPixels(region, squared_distance, selected)


def _nearest_of_each_group(
    region: Tensor,
    squared_distance: Tensor,
    num_classes: int,
    fraction: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Selects the nearest pixels of each (image, class), as many as its fraction, (B, h, w) bool.

    One sort by group, distance and random number, packed in this order into one key.
    """
    num_images, height, width = region.shape
    num_groups = num_images * num_classes
    images = torch.arange(num_images, device=region.device)[:, None, None]
    # Pixels without a region make one more group, the last.
    group_N = torch.where(region < 0, num_groups, images * num_classes + region).flatten()
    infinite = height * height + width * width
    distance_N = squared_distance.clamp(max=infinite).long().flatten()
    # What the 62 bits of a key leave: 2^30 numbers for eight images of 128 x 256 with 150 classes.
    num_random = 2**62 // ((num_groups + 1) * (infinite + 1))
    keys_N = torch.randint(num_random, group_N.shape, generator=generator)
    keys_N = on_device(keys_N, region.device)
    keys_N += (group_N * (infinite + 1) + distance_N) * num_random
    sorted_keys_N, order_N = keys_N.sort()

    groups = torch.arange(num_groups + 1, device=region.device)
    first_G = torch.searchsorted(sorted_keys_N, groups * ((infinite + 1) * num_random))
    quota_G = F.pad(_rounded_up(first_G.diff(), fraction), (0, 1))
    sorted_group_N = group_N[order_N]
    rank_N = torch.arange(len(order_N), device=region.device) - first_G[sorted_group_N]
    chosen_N = rank_N < quota_G[sorted_group_N]
    return torch.empty_like(chosen_N).scatter_(0, order_N, chosen_N).view_as(region)


def _rounded_up(counts: Tensor, fraction: float) -> Tensor:
    """ceil(fraction * counts) in integers: 0.55 of 100 is 55, although 0.55 * 100 > 55 in fp64."""
    # A fraction below the resolution still takes one of each.
    ratio = max(Fraction(fraction).limit_denominator(10**6), Fraction(1, 10**6))
    return -(counts * -ratio.numerator).div(ratio.denominator, rounding_mode="floor")


def check_fraction(fraction: float) -> None:
    """Raises ValueError where the fraction is not in (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: must be above 0 and at most 1.")


class BoundaryNegatives:
    """Draws boundary-aware negatives, for methods that contrast drawn pixels.

    The pixels are those that `boundary_negatives` selects with the error maps of the true classes:
    wrong pixels, each a negative for all classes but its own. A random part is kept where a map
    gives more than `max_negatives`. Mind that the loss of an anchor grows with the logarithm of
    the number of its negatives: this bound, where it is met, shifts the loss.

    Predictions decide how many there are. On a GPU draws are therefore padded to `max_negatives`,
    and the host does not wait.

    Args:
        num_classes: K.
        fraction: part of each error region to select, in (0, 1].
        max_negatives: most pixels per map.

    Raises:
        ValueError: an argument out of its range.

    Reference: Sung et al., "Contextrast: Contextual Contrastive Learning for Semantic
        Segmentation", CVPR 2024, boundary-aware negative (BANE) sampling.
    """

    def __init__(
        self, num_classes: int, *, fraction: float = 0.5, max_negatives: int = 4096
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: needs at least 1.")
        if max_negatives < 1:
            raise ValueError(f"max_negatives={max_negatives}: needs at least 1.")
        check_fraction(fraction)
        self.num_classes = num_classes
        self.fraction = fraction
        self.max_negatives = max_negatives

    def draw(self, batch: Batch, features: Sequence[str]) -> list[PixelDraw]:
        """As in `Sampler`."""
        return self(
            [batch.label_map(feature) for feature in features],
            [batch.predictions(feature) for feature in features],
            batch.generator,
        )

    @torch.no_grad()
    def __call__(
        self,
        label_maps: Sequence[Tensor],
        prediction_maps: Sequence[Tensor],
        generator: torch.Generator | None = None,
    ) -> list[PixelDraw]:
        """Draws negatives from every map.

        Args:
            label_maps: S integer maps (B, h, w), one per feature map; values outside 0..K-1 are
                ignored.
            prediction_maps: S integer maps (B, h, w) of predicted classes, of the same sizes.
            generator: source of the draw, on the host; None for the default one.

        Returns:
            S draws, without repeated pixels, each labelled with its true class. A draw may be
            empty.
        """
        return [
            self._draw(labels, predictions, generator)
            for labels, predictions in zip(label_maps, prediction_maps, strict=True)
        ]

    def _draw(
        self, labels: Tensor, predictions: Tensor, generator: torch.Generator | None
    ) -> PixelDraw:
        """From one map, grouped by class and image; padding comes last."""
        num_images, num_pixels = labels.shape[0], labels[0].numel()
        pixels = boundary_negatives(
            labels, predictions, self.num_classes, fraction=self.fraction, generator=generator
        )
        selected_N = pixels.selected.flatten()
        random_N = torch.randint(2**62, selected_N.shape, generator=generator)
        random_N = on_device(random_N, selected_N.device)
        capacity = min(self.max_negatives, len(selected_N))
        index_A = torch.where(selected_N, random_N, -1).topk(capacity).indices
        classes_A = torch.where(
            selected_N[index_A], pixels.region.flatten()[index_A], self.num_classes
        )
        image_A = index_A.div(num_pixels, rounding_mode="floor")
        classes_A, image_A, index_A = (
            x[(classes_A * num_images + image_A).argsort()] for x in (classes_A, image_A, index_A)
        )
        pixel_A = index_A - image_A * num_pixels
        if labels.device.type == "cpu":  # which knows how many there are
            counts = np.bincount(classes_A.numpy(), minlength=self.num_classes + 1)
            class_counts = counts[:-1].tolist()
            drawn = slice(sum(class_counts))
            return PixelDraw(image_A[drawn], pixel_A[drawn], classes_A[drawn], tuple(class_counts))
        labels_A = classes_A.masked_fill(classes_A == self.num_classes, -1)
        return PixelDraw(image_A, pixel_A, labels_A, None)

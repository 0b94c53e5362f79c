"""Which pixels become anchors: label down-sampling and class-balanced draws.

Shape letters: S scales (label maps of one step), B images, K classes, H W a label map, h w a
feature map, A anchors of one scale.

The draw of a step needs labels only, is made for all scales together, and waits for the device
once, to learn how many pixels each class has in each image. No loop runs over images or classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Balance = Literal["class", "image_class"]


class PixelDraw(NamedTuple):
    """The pixels drawn from one label map, grouped by class, then by image.

    Attributes:
        image: (A,) int64, index of the image in the batch.
        pixel: (A,) int64, row-major index of the pixel in the (h, w) map.
        labels: (A,) int64, class of the pixel.
        class_counts: how many pixels were drawn of each class 0..K-1, host integers.
    """

    image: Tensor
    pixel: Tensor
    labels: Tensor
    class_counts: tuple[int, ...]


def downsample_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour down-sampling of a label map to the size of a feature map.

    Output pixel i reads input pixel floor(i * H / h), in exact integer arithmetic: a label is never
    mixed with its neighbour, and sizes that do not divide are resized, not cropped.

    Args:
        labels: (B, H, W) integers.
        size: (h, w).

    Returns:
        (B, h, w), of the same dtype; a view where the sizes divide.
    """
    height, width = labels.shape[-2:]
    h, w = size
    if height % h == 0 and width % w == 0:
        return labels[..., :: height // h, :: width // w]
    rows = torch.arange(h, device=labels.device) * height // h
    columns = torch.arange(w, device=labels.device) * width // w
    return labels[..., rows[:, None], columns]


class BalancedSampler:
    """Draws the same number of pixels from every class, so that no class dominates the contrast.

    Two units of balance:

    * `"class"` (the paper): K pixels from each class present in the batch, shared as equally as
      their pixel counts allow among the images that show the class. K is the pixel count of the
      rarest class, at most `max_anchors` / number of classes.
    * `"image_class"` (the release): V pixels from each (image, class) pair. V is the pixel count of
      the rarest pair, at most `max_anchors` / number of pairs.

    Taken literally the rarest class rules all others: one object of five pixels leaves five
    anchors to every class. Two parameters hold that off. Classes (or pairs) with fewer than
    `min_pixels` pixels are left out, and `floor` is the least that K (or V) sinks to: a class with
    fewer pixels than that gives what it has, while the others still give `floor`.

    All budgets are for the images of one call. In distributed training, that is one process,
    unless `across_processes` is set: then counts are summed over the processes, the budgets are for
    the global batch, and each process draws the share of its own images.

    Args:
        num_classes: K.
        balance: the unit of balance.
        max_anchors: most anchors per scale.
        min_pixels: classes (or pairs) with fewer pixels at a scale are not drawn at that scale.
        max_per_group: most anchors per class (or pair); None for no such bound.
        floor: least anchors per class (or pair) that has so many pixels; 0 as in the paper.
        across_processes: make the budgets for the global batch.

    Reference: Pissas et al., ECCV 2022, section 3.3 ("anchor sampling").
    """

    def __init__(
        self,
        num_classes: int,
        *,
        balance: Balance = "class",
        max_anchors: int = 10_000,
        min_pixels: int = 1,
        max_per_group: int | None = None,
        floor: int = 0,
        across_processes: bool = False,
    ) -> None:
        if balance not in ("class", "image_class"):
            raise ValueError(f"balance={balance!r}: choose 'class' or 'image_class'.")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes}: needs at least 1.")
        if max_anchors < 2 * num_classes:
            raise ValueError(
                f"max_anchors={max_anchors} cannot give two anchors (a positive pair) to each of "
                f"{num_classes} classes: set it to {2 * num_classes} or more."
            )
        if min_pixels < 1:
            raise ValueError(f"min_pixels={min_pixels}: a class that is drawn has at least 1.")
        if max_per_group is not None and max_per_group < 2:
            raise ValueError(
                f"max_per_group={max_per_group} leaves no positive pair: set it to 2 or more."
            )
        if floor < 0:
            raise ValueError(f"floor={floor}: needs 0 (none) or more.")
        self.num_classes = num_classes
        self.balance = balance
        self.max_anchors = max_anchors
        self.min_pixels = min_pixels
        self.max_per_group = max_per_group
        self.floor = floor
        self.across_processes = across_processes

    @torch.no_grad()
    def __call__(
        self, label_maps: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> list[PixelDraw]:
        """Draws anchors at every scale.

        Args:
            label_maps: S integer maps (B, h, w), one per scale, of the same B images. A value
                outside 0..K-1 is ignored.
            generator: source of the draw, on the labels' device; None for the default one.

        Returns:
            S draws, without repeated pixels. A draw may be empty.
        """
        num_images, device = label_maps[0].shape[0], label_maps[0].device
        groups, counts = self._group_pixels(label_maps)
        counts_host = counts.cpu().numpy()  # the only wait for the device
        quotas = self._quotas(counts_host)

        # A stable sort of randomly permuted pixels by group leaves each group contiguous, in
        # random order; its first `quota` pixels are the draw.
        permutation = torch.randperm(groups.numel(), generator=generator, device=device)
        order = permutation[torch.argsort(groups[permutation], stable=True)]
        picks = torch.from_numpy(_first_of_each(counts_host.ravel(), quotas.ravel()))
        # Safe from pageable memory: the copy takes the values before it returns.
        drawn = order[picks.to(device, non_blocking=True)]

        draws, first_pixel, first_anchor = [], 0, 0
        for scale, label_map in enumerate(label_maps):
            num_pixels = label_map[0].numel()
            num_anchors = int(quotas[scale].sum())
            chosen = drawn[first_anchor : first_anchor + num_anchors] - first_pixel
            image = chosen.div(num_pixels, rounding_mode="floor")
            pixel = chosen - image * num_pixels
            labels = label_map.reshape(num_images, -1)[image, pixel].long()
            class_counts = tuple(quotas[scale].sum(axis=1).tolist())
            draws.append(PixelDraw(image, pixel, labels, class_counts))
            first_pixel += num_images * num_pixels
            first_anchor += num_anchors
        return draws

    def _group_pixels(self, label_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Numbers the group (scale, class, image) of every pixel of the step, and counts them.

        Returns:
            (pixels,) int32 group of each pixel, the last number for ignored ones, and the
            (S, K, B) int64 pixel counts.
        """
        num_images, device = label_maps[0].shape[0], label_maps[0].device
        groups_per_scale = self.num_classes * num_images
        num_groups = len(label_maps) * groups_per_scale
        image = torch.arange(num_images, device=device, dtype=torch.int32)[:, None]
        parts = []
        for scale, label_map in enumerate(label_maps):
            labels = label_map.flatten(1).to(torch.int32)
            group = labels * num_images + image + scale * groups_per_scale
            valid = (labels >= 0) & (labels < self.num_classes)
            parts.append(torch.where(valid, group, num_groups).flatten())
        groups = torch.cat(parts)
        counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=device)
        counts.scatter_add_(0, groups.long(), torch.ones_like(groups, dtype=torch.int64))
        return groups, counts[:-1].view(len(label_maps), self.num_classes, num_images)

    def _quotas(self, counts: np.ndarray) -> np.ndarray:
        """How many pixels to draw from each group of this process: (S, K, B) -> (S, K, B)."""
        if not (self.across_processes and dist.is_available() and dist.is_initialized()):
            return self._balance(counts)
        gathered: list[np.ndarray] = [counts] * dist.get_world_size()
        dist.all_gather_object(gathered, counts)
        quotas = self._balance(np.concatenate(gathered, axis=2))
        first = sum(part.shape[2] for part in gathered[: dist.get_rank()])
        return quotas[:, :, first : first + counts.shape[2]]

    def _balance(self, counts: np.ndarray) -> np.ndarray:
        """Applies the budgets: (S, K, B) pixel counts -> (S, K, B) quotas."""
        if self.balance == "image_class":
            eligible = counts >= self.min_pixels
            return np.where(eligible, np.minimum(counts, self._target(counts, eligible)), 0)
        per_class = counts.sum(axis=2, keepdims=True)
        eligible = per_class >= self.min_pixels
        wanted = np.where(eligible, np.minimum(per_class, self._target(per_class, eligible)), 0)
        return share_equally(counts, wanted[:, :, 0])

    def _target(self, counts: np.ndarray, eligible: np.ndarray) -> np.ndarray:
        """The common quota of the eligible groups of each scale: (S, ...) -> (S, 1, 1)."""
        axes = (1, 2)
        num_groups = eligible.sum(axis=axes, keepdims=True)
        rarest = np.where(eligible, counts, np.iinfo(np.int64).max).min(axis=axes, keepdims=True)
        target = np.maximum(rarest, self.floor)
        if self.max_per_group is not None:
            target = np.minimum(target, self.max_per_group)
        return np.minimum(target, self.max_anchors // np.maximum(num_groups, 1))


def share_equally(counts: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Shares a number of draws among groups as equally as their sizes allow.

    What a small group cannot give is redistributed over the others, until the total is reached;
    quotas of groups that are not exhausted differ by at most one.

    Args:
        counts: (..., B) sizes of the groups.
        wanted: (...) draws in all, at most the sum of the sizes.

    Returns:
        (..., B) quotas, each at most its count, that sum to `wanted`.
    """
    num_groups = counts.shape[-1]
    order = np.argsort(counts, axis=-1, kind="stable")
    ascending = np.take_along_axis(counts, order, axis=-1)
    given_before = np.cumsum(ascending, axis=-1) - ascending
    # In ascending order, group i is exhausted while it holds no more than an equal share of what
    # the smaller groups left over.
    takers = num_groups - np.arange(num_groups)
    left = wanted[..., None] - given_before
    exhausted = np.logical_and.accumulate(ascending * takers <= left, axis=-1)
    num_exhausted = exhausted.sum(axis=-1, keepdims=True)
    given = np.where(exhausted, ascending, 0).sum(axis=-1, keepdims=True)
    remaining_takers = np.maximum(num_groups - num_exhausted, 1)
    share, extra = np.divmod(wanted[..., None] - given, remaining_takers)
    # The largest groups take the remainder of the division.
    quotas = np.where(exhausted, ascending, share + (np.arange(num_groups) >= num_groups - extra))
    result = np.empty_like(quotas)
    np.put_along_axis(result, order, quotas, axis=-1)
    return result


def _first_of_each(counts: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """Positions of the first `quotas[g]` members of each group in an array sorted by group."""
    starts = np.cumsum(counts) - counts
    drawn_before = np.cumsum(quotas) - quotas
    return np.repeat(starts - drawn_before, quotas) + np.arange(quotas.sum())

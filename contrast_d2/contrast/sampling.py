"""Which pixels become anchors: label down-sampling and class-balanced draws.

Shape letters: S scales (label maps of one step), B images, K classes, G groups of a class at one
scale, H W a label map, h w a feature map, A anchors of one scale.

The draw of a step needs labels only and is made for all scales together. A stable sort brings
together the pixels of each group (one scale, class and image), budgets say how many to take from
each, and random ranks say which. No loop runs over images or classes, and the device is waited for
once, to learn how many anchors there are, or not at all with `fixed_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .distributed import process_share, quotas_of_all

Balance = Literal["class", "image_class"]


class PixelDraw(NamedTuple):
    """The pixels drawn from one label map, grouped by class, then by image.

    Attributes:
        image: (A,) int64, index of the image in the batch.
        pixel: (A,) int64, row-major index of the pixel in the (h, w) map.
        labels: (A,) int64, class of the pixel. A draw of fixed size ends in padding: slots of
            label -1, whose image and pixel are valid indices of no meaning.
        class_counts: how many pixels were drawn of each class 0..K-1, host integers. None in a draw
            of fixed size, where the host does not know.
    """

    image: Tensor
    pixel: Tensor
    labels: Tensor
    class_counts: tuple[int, ...] | None


def joined_draws(first: PixelDraw, second: PixelDraw | None) -> PixelDraw:
    """The pixels of two draws from one map, one after the other; the first where there is one."""
    if second is None:
        return first
    parts = zip(first[:3], second[:3], strict=True)
    return PixelDraw(*(torch.cat(pair) for pair in parts), class_counts=None)


def downsample_labels(labels: Tensor, size: Sequence[int]) -> Tensor:
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


def predicted_labels(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The most likely class of each pixel of a feature map.

    Class scores are resized bilinearly where their size is another, and the class is chosen after
    that: a resized score is a mixture, a resized class would not be.

    Args:
        logits: (B, K, h', w') class scores.
        size: (h, w) of the feature map.

    Returns:
        (B, h, w) int64, without gradient.
    """
    with torch.no_grad():
        if logits.shape[-2:] != torch.Size(size):
            logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        return logits.argmax(dim=1)


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

    `max_anchors` is for the batch of all processes together, so that a config means the same
    number of anchors on any number of GPUs. What the paper states per GPU has to be multiplied by
    its number of GPUs. By default each process applies an equal share of it to its own images,
    though at least two anchors per class. With `across_processes` the pixel counts are summed over
    the processes, the budgets are for the global batch, and each process draws the share of its own
    images.

    The size of an ordinary draw depends on the labels, so the host waits for the device, once per
    call. With `fixed_size` it never waits: each scale gives min(`max_anchors`, B * h * w) slots,
    first the anchors, which are those of the ordinary draw with the same random numbers, then
    padding. Use it where shapes must not change or the queue of kernels must not run dry, as in
    CUDA graphs. The price: padded slots enter every product of the loss, so set `max_anchors` near
    the number that is really drawn.

    Args:
        num_classes: K.
        balance: the unit of balance.
        max_anchors: most anchors per scale, of all processes together.
        min_pixels: classes (or pairs) with fewer pixels at a scale are not drawn at that scale.
        max_per_group: most anchors per class (or pair); None for no such bound.
        floor: least anchors per class (or pair) that has so many pixels; 0 as in the paper.
        across_processes: balance the global batch, not the images of each process.
        fixed_size: pad the draws to a size that does not depend on the labels.

    Raises:
        ValueError: an argument out of its range, or `fixed_size` with `across_processes`.

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
        fixed_size: bool = False,
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
        if fixed_size and across_processes:
            raise ValueError(
                "fixed_size=True with across_processes=True: budgets of the global batch pass "
                "through the host. Set one of them to False."
            )
        self.num_classes = num_classes
        self.balance = balance
        self.max_anchors = max_anchors
        self.min_pixels = min_pixels
        self.max_per_group = max_per_group
        self.floor = floor
        self.across_processes = across_processes
        self.fixed_size = fixed_size

    def __call__(
        self, label_maps: Sequence[Tensor], generator: torch.Generator | None = None
    ) -> list[PixelDraw]:
        """Draws anchors at every scale.

        Args:
            label_maps: S integer maps (B, h, w), one per scale, of the same B images. A value
                outside 0..K-1 is ignored.
            generator: source of the draw, on the labels' device; None for the default one.

        Returns:
            S draws, without repeated pixels. A draw may be empty (or all padding).
        """
        if self.fixed_size:
            return self._draw(label_maps, generator)
        return self._draw_outside_graphs(label_maps, generator)  # pyright: ignore[reportCallIssue]

    @torch.compiler.disable
    def _draw_outside_graphs(
        self, label_maps: Sequence[Tensor], generator: torch.Generator | None
    ) -> list[PixelDraw]:
        """One break of a compiled graph, where the host's numbers would make many."""
        return self._draw(label_maps, generator)

    @torch.no_grad()
    def _draw(
        self, label_maps: Sequence[Tensor], generator: torch.Generator | None
    ) -> list[PixelDraw]:
        pixels = sort_pixels(label_maps, self.num_classes)
        budget = self._budget()
        capacities = [min(budget, label_map.numel()) for label_map in label_maps]
        return draw_pixels(
            label_maps,
            pixels,
            self._quotas(pixels.counts),
            capacities,
            generator,
            fixed_size=self.fixed_size,
        )

    def _budget(self) -> int:
        """Most anchors per scale of the images that are balanced together."""
        if self.across_processes:
            return self.max_anchors
        return max(process_share(self.max_anchors), 2 * self.num_classes)

    def _quotas(self, counts: Tensor) -> Tensor:
        """How many pixels to draw from each group of this process: (S, K, B) -> (S, K, B)."""
        if self.across_processes:
            return quotas_of_all(counts, self._balance)
        return self._balance(counts)

    def _balance(self, counts: Tensor) -> Tensor:
        """Applies the budgets: (S, K, B) pixel counts -> (S, K, B) quotas."""
        if self.balance == "image_class":
            return self._wanted(counts)
        return share_equally(counts, self._wanted(counts.sum(dim=2, keepdim=True)).squeeze(2))

    def _wanted(self, counts: Tensor) -> Tensor:
        """Quotas by the common target of each scale: (S, ...) sizes of the units of balance."""
        eligible = counts >= self.min_pixels
        num_eligible = eligible.sum(dim=(1, 2), keepdim=True)
        most = torch.iinfo(counts.dtype).max
        rarest = counts.masked_fill(~eligible, most).amin(dim=(1, 2), keepdim=True)
        target = rarest.clamp(min=self.floor, max=self.max_per_group)
        target = target.minimum(self._budget() // num_eligible.clamp(min=1))
        return counts.minimum(target).masked_fill(~eligible, 0)


class SortedPixels(NamedTuple):
    """The pixels of all scales in the order of their groups.

    Groups are numbered by scale, class -1..K, image (and half). Classes -1 and K hold what lies
    below and above the range of labels: ignored pixels need no mask this way.

    Attributes:
        order: (pixels,) int64, the pixels, row-major within each group.
        bounds: (S * (K + 2) * G + 1,) int64, places in `order` where the groups begin and end.
        counts: (S, K, G) int64, pixels of each group of a class 0..K-1. G is B, or 2 B where the
            images are halved.
    """

    order: Tensor
    bounds: Tensor
    counts: Tensor


def sort_pixels(
    label_maps: Sequence[Tensor], num_classes: int, halves: Sequence[Tensor] | None = None
) -> SortedPixels:
    """Sorts the pixels of all scales by group.

    Args:
        label_maps: S integer maps (B, h, w), of the same B images.
        num_classes: K.
        halves: S bool maps (B, h, w) that divide each group in two, first the pixels that are
            False; None for whole groups.
    """
    num_images, device = label_maps[0].shape[0], label_maps[0].device
    num_scales, groups_per_class = len(label_maps), num_images * (1 if halves is None else 2)
    num_groups = num_scales * (num_classes + 2) * groups_per_class
    sizes = [label_map.numel() for label_map in label_maps]
    labels = torch.empty(
        sum(sizes), dtype=torch.promote_types(label_maps[0].dtype, torch.int32), device=device
    )
    for label_map, part in zip(label_maps, labels.split(sizes), strict=True):
        part.view_as(label_map).copy_(label_map)
    # The sort is the largest cost, and goes by the bytes of the keys.
    dtype = torch.int16 if num_groups < 2**15 else torch.int32
    keys = labels.clamp_(-1, num_classes).to(dtype)
    images = torch.arange(num_images, dtype=dtype, device=device)[:, None]
    for scale, part in enumerate(keys.split(sizes)):
        part = part.view(num_images, -1)
        first = (scale * (num_classes + 2) + 1) * num_images
        torch.add(images + first, part, alpha=num_images, out=part)
        if halves is not None:
            part.mul_(2).add_(halves[scale].flatten(1))
    sorted_keys, order = torch.sort(keys, stable=True)
    numbers = torch.arange(num_groups + 1, dtype=dtype, device=device)
    bounds = torch.searchsorted(sorted_keys, numbers)
    counts = bounds.diff().view(num_scales, num_classes + 2, groups_per_class)
    return SortedPixels(order, bounds, counts[:, 1:-1])


def draw_pixels(
    label_maps: Sequence[Tensor],
    pixels: SortedPixels,
    quotas: Tensor,
    capacities: Sequence[int],
    generator: torch.Generator | None,
    *,
    fixed_size: bool = False,
    from_remainder: bool = False,
) -> list[PixelDraw]:
    """Draws pixels from each group at random, none twice.

    The host waits for the device once, to learn how many they are, or with `fixed_size` never.

    Args:
        label_maps: S integer maps (B, h, w).
        pixels: those of the label maps.
        quotas: (S, K, G) int64, how many pixels to draw from each group, at most its count.
        capacities: S ints, at least the draws of the scale.
        generator: source of the draw, on the labels' device; None for the default one.
        fixed_size: pad the draw of each scale to its capacity.
        from_remainder: for halved groups, draw the quota of a second half from what the draw of
            the first one leaves of both.

    Returns:
        S draws, grouped by class, then by image (and half).
    """
    device, num_pixels = label_maps[0].device, pixels.order.numel()
    num_classes, groups_per_class = quotas.shape[1:]
    # As many random numbers as slots in either mode: the generator advances by the same amount
    # whatever the labels are.
    random = torch.randint(2**62, (sum(capacities),), generator=generator, device=device)

    class_counts: list[tuple[int, ...] | None] = [None] * len(label_maps)
    lengths = capacities
    if not fixed_size:
        per_class = quotas.sum(dim=2).cpu().numpy()  # the only wait for the device
        class_counts = [tuple(row) for row in per_class.tolist()]
        lengths = per_class.sum(axis=1).tolist()
    starts = accumulate(capacities, initial=0)
    slots = torch.cat(
        [torch.arange(i, i + n, device=device) for i, n in zip(starts, lengths, strict=False)]
    )

    # Safe from pageable memory: the copy takes the values before it returns.
    quotas = quotas.to(device, non_blocking=True)
    group, first_slot = _group_of_slots(slots, quotas, capacities)
    labels = group // groups_per_class % (num_classes + 2) - 1
    padding = labels == num_classes
    # A second half goes on with the shuffle of the first, now over the places of both.
    leader = group - group % 2 if from_remainder else group
    # Padding is beyond all pixels, where it is in nobody's way.
    first = pixels.bounds[leader].masked_fill_(padding, num_pixels)
    size = pixels.bounds[group + 1] - first
    place = draw_without_replacement(first, size, slots - first_slot[leader], random[slots])
    chosen = pixels.order[place % num_pixels]
    labels.masked_fill_(padding, -1)

    draws, first_pixel = [], 0
    for label_map, chosen_s, labels_s, counts_s in zip(
        label_maps, chosen.split(lengths), labels.split(lengths), class_counts, strict=True
    ):
        # Padding may have come upon a pixel of another scale. The remainders keep it spread:
        # gradients that all fall on one pixel would have to queue.
        index = (chosen_s - first_pixel) % label_map.numel()
        per_image = label_map[0].numel()
        image = index.div(per_image, rounding_mode="floor")
        draws.append(PixelDraw(image, index - image * per_image, labels_s, counts_s))
        first_pixel += label_map.numel()
    return draws


def share_equally(counts: Tensor, wanted: Tensor) -> Tensor:
    """Shares a number of draws among groups as equally as their sizes allow.

    What a small group cannot give is redistributed over the others, until the total is reached;
    quotas of groups that are not exhausted differ by at most one.

    Args:
        counts: (..., B) int64 sizes of the groups.
        wanted: (...) int64 draws in all, at most the sum of the sizes.

    Returns:
        (..., B) int64 quotas, each at most its count, that sum to `wanted`.
    """
    num_groups = counts.shape[-1]
    ascending, order = counts.sort(dim=-1, stable=True)
    given_before = ascending.cumsum(dim=-1) - ascending
    # In ascending order, group i is exhausted while it holds no more than an equal share of what
    # the smaller groups left over. Once one is not, no larger one is.
    rank = torch.arange(num_groups, device=counts.device)
    exhausted = ascending * (num_groups - rank) <= wanted[..., None] - given_before
    given = ascending.masked_fill(~exhausted, 0)
    takers = num_groups - exhausted.sum(dim=-1, keepdim=True)
    left = wanted[..., None] - given.sum(dim=-1, keepdim=True)
    share = left.div(takers.clamp(min=1), rounding_mode="floor")
    # The largest groups take the remainder of the division.
    share = share + (rank >= num_groups - (left - share * takers))
    return torch.empty_like(counts).scatter_(-1, order, torch.where(exhausted, given, share))


def draw_without_replacement(first: Tensor, size: Tensor, rank: Tensor, random: Tensor) -> Tensor:
    """Draws places from ranges of places, none twice, every subset of a range equally likely.

    The Fisher-Yates shuffle, of which only the drawn head is computed, for all draws of all ranges
    at once. In sequence it reads: for each draw, swap place `first + rank` with a random one that
    is not before it in the range; what comes to `first + rank` is drawn. That is what the random
    place held from the beginning, unless an earlier draw swapped into it: then, what that draw had
    at its own place. Sorting the swaps by place finds the earlier draw, and pointer doubling what
    was at its place, which a still earlier draw may have brought there.

    Args:
        first: (A,) int64, where the range of each draw begins. Ranges must not overlap; draws of
            one range are neighbours.
        size: (A,) int64 length of the range. Must exceed `rank` for the result to be in the range.
        rank: (A,) int64, 0, 1, ... among the draws of a range.
        random: (A,) int64, uniform in 0..2^62-1.

    Returns:
        (A,) int64 places.

    Reference: Durstenfeld, "Algorithm 235: random permutation", Communications of the ACM, 1964.
    """
    index = torch.arange(len(first), device=first.device)
    own = first + rank
    swapped = own + random % (size - rank).clamp(min=1)

    # Draws that swapped into the same place are neighbours, the earlier before the later.
    places, draws = swapped.sort(stable=True)
    before, repeated = draws.roll(1), places == places.roll(1)
    repeated[:1] = False
    # The draw that swapped into the same place before; the draw itself where there is none.
    earlier = torch.empty_like(draws).scatter_(0, draws, torch.where(repeated, before, draws))

    # The draw that brought to the own place of each draw what it holds when its turn comes: the
    # last one that swapped into it, or the draw itself where there is none. (A draw that stays
    # where it is finds itself too, but nobody asks: no later draw has to do with its place.)
    last = draws[(torch.searchsorted(places, own, right=True) - 1).clamp(min=0)]
    origin = torch.where(swapped[last] == own, last, index)
    for _ in range(len(first).bit_length()):  # no chain is longer than the draws are many
        origin = origin.index_select(0, origin)
    return torch.where(earlier == index, swapped, own[origin[earlier]])


def _group_of_slots(
    slots: Tensor, quotas: Tensor, capacities: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The group that each slot draws from.

    Args:
        slots: (A,) int64 numbers of slots; each scale has as many as its capacity.
        quotas: (S, K, G) int64 draws from each group.
        capacities: S ints, at least the draws of the scale.

    Returns:
        (A,) int64 groups, with numbers for the classes -1..K, and (S * (K + 2) * G,) int64 slots
        with which the groups begin. Slots past the draws of their scale are padding: their group
        is the last one of class K.
    """
    quotas = F.pad(quotas, (0, 0, 1, 1))
    room = torch.cat([quotas.new_full((1,), capacity) for capacity in capacities])
    quotas[:, -1, -1] = room - quotas.sum(dim=(1, 2))
    ends = quotas.flatten().cumsum(dim=0)
    return torch.searchsorted(ends, slots, right=True), ends - quotas.flatten()

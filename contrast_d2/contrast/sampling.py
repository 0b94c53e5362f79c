"""Which pixels become anchors: labels at the size of a map, and class-balanced draws.

Shape letters: S scales (label maps of one step), B images, K classes, G groups of a class at one
scale, H W a label map, h w a feature map, A anchors of one scale.

The draw of a step is made for all scales together: a stable sort brings together the pixels of each
group (one scale, class and image), budgets say how many to take from each, and random ranks say
which. No loop runs over images or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .sets import PixelDraw, stack_processes, world_size

Balance = Literal["class", "image_class"]


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


class Batch:
    """What a contrast method sees of one step.

    Args:
        maps: feature or embedding maps (B, C, h, w) by name.
        labels: (B, H, W) integers.
        logits: (B, K, h', w') class scores; None where there are none.
        generator: source of random numbers, on the labels' device; None for the default one.
        across_processes: balance and contrast the global batch, not the images of each process.
    """

    def __init__(
        self,
        maps: Mapping[str, Tensor],
        labels: Tensor,
        logits: Tensor | None = None,
        generator: torch.Generator | None = None,
        across_processes: bool = False,
    ) -> None:
        self.maps = maps
        self.labels = labels
        self.logits = logits
        self.generator = generator
        self.across_processes = across_processes
        self._at_size: dict[tuple[str, torch.Size], Tensor] = {}

    def with_maps(self, maps: Mapping[str, Tensor]) -> Batch:
        """The same step, seen on other maps."""
        other = Batch(maps, self.labels, self.logits, self.generator, self.across_processes)
        other._at_size = self._at_size
        return other

    def of_all_processes(self, values: Tensor) -> Tensor:
        """(W, ...) values of all W processes that share the batch, with gradients; W is 1 where
        each process has its own."""
        return stack_processes(values) if self.across_processes else values[None]

    def label_map(self, feature: str) -> Tensor:
        """(B, h, w) labels at the size of a map."""
        key = "labels", self.maps[feature].shape[-2:]
        if key not in self._at_size:
            # Contiguous, for it is read several times.
            self._at_size[key] = downsample_labels(self.labels, key[1]).contiguous()
        return self._at_size[key]

    def scores(self, feature: str) -> Tensor:
        """(B, K, h, w) class scores at the size of a map; ValueError where there are none."""
        if self.logits is None:
            raise ValueError(
                "logits=None: the method needs the class scores of the segmentation head."
            )
        size = self.maps[feature].shape[-2:]
        if self.logits.shape[-2:] == size:
            return self.logits
        return F.interpolate(self.logits.float(), size=size, mode="bilinear", align_corners=False)

    def predictions(self, feature: str) -> Tensor:
        """(B, h, w) int64, the most likely class of each pixel of a map.

        Scores are resized, not classes: a resized score is a mixture, a resized class is not.
        """
        key = "predictions", self.maps[feature].shape[-2:]
        if key not in self._at_size:
            with torch.no_grad():
                self._at_size[key] = self.scores(feature).argmax(dim=1)
        return self._at_size[key]


class Sampler(Protocol):
    """Draws pixels from feature maps."""

    def draw(self, batch: Batch, features: Sequence[str]) -> list[PixelDraw]:
        """One draw per feature map, grouped by class."""
        ...


class BalancedSampler:
    """Draws the same number of pixels from every class, so that no class dominates the contrast.

    * `balance="class"` (the paper): K pixels of each class in the batch, shared as equally as their
      pixel counts allow among the images that show the class. K is the pixel count of the rarest
      class, at most `max_anchors` / number of classes.
    * `"image_class"` (the official code): V pixels of each (image, class) pair. V is the pixel
      count of the rarest pair, at most `max_anchors` / number of pairs.

    `max_anchors` is for the batch of all processes. By default each applies an equal share of it to
    its own images, though at least two anchors per class; across processes, pixels are counted in
    the global batch, and each process draws the share of its own images.

    The host waits for the device once per call, to learn how many pixels are drawn. With
    `fixed_size` it never waits: each scale gives min(`max_anchors`, B * h * w) slots, first the
    pixels of the ordinary draw, then padding, which enters every product of the loss.

    Args:
        num_classes: K.
        balance: the unit of balance.
        max_anchors: most anchors per scale, of all processes together.
        min_pixels: classes (or pairs) with fewer pixels at a scale are not drawn at that scale.
        max_per_group: most anchors per class (or pair); None for no such bound.
        min_per_class: least anchors per class (or pair) that has so many pixels; 0 as in the paper,
            where one object of five pixels leaves five anchors to every class.
        fixed_size: pad the draws to a size that does not depend on the labels.

    Raises:
        ValueError: an argument out of its range; in a call, `fixed_size` across processes.

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
        min_per_class: int = 0,
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
        if min_per_class < 0:
            raise ValueError(f"min_per_class={min_per_class}: needs 0 (none) or more.")
        self.num_classes = num_classes
        self.balance = balance
        self.max_anchors = max_anchors
        self.min_pixels = min_pixels
        self.max_per_group = max_per_group
        self.min_per_class = min_per_class
        self.fixed_size = fixed_size

    def draw(self, batch: Batch, features: Sequence[str]) -> list[PixelDraw]:
        """As in `Sampler`."""
        label_maps = [batch.label_map(feature) for feature in features]
        return self(label_maps, batch.generator, batch.across_processes)

    @torch.no_grad()
    def __call__(
        self,
        label_maps: Sequence[Tensor],
        generator: torch.Generator | None = None,
        across_processes: bool = False,
    ) -> list[PixelDraw]:
        """Draws anchors at every scale.

        Args:
            label_maps: S integer maps (B, h, w), one per scale, of the same B images. A value
                outside 0..K-1 is ignored.
            generator: source of the draw, on the labels' device; None for the default one.
            across_processes: balance the global batch; every process has to make the call.

        Returns:
            S draws, without repeated pixels. A draw may be empty (or all padding).
        """
        if self.fixed_size and across_processes:
            raise ValueError(
                "fixed_size=True with across_processes=True: budgets of the global batch pass "
                "through the host. Set one of them to False."
            )
        # Two anchors of each class are the least with which it has a positive pair.
        budget = budget_of_process(self.max_anchors, across_processes)
        budget = max(budget, 2 * self.num_classes)
        pixels = sort_pixels(label_maps, self.num_classes)
        quotas = quotas_of_process(
            pixels.counts, lambda counts: self._quotas(counts, budget), across_processes
        )
        capacities = [min(budget, label_map.numel()) for label_map in label_maps]
        return draw_pixels(
            label_maps, pixels, quotas, capacities, generator, fixed_size=self.fixed_size
        )

    def _quotas(self, counts: Tensor, budget: int) -> Tensor:
        """Applies the budget: (S, K, B) pixel counts -> (S, K, B) quotas."""
        if self.balance == "image_class":
            return self._wanted(counts, budget)
        of_classes = self._wanted(counts.sum(dim=2, keepdim=True), budget)
        return share_equally(counts, of_classes.squeeze(2))

    def _wanted(self, counts: Tensor, budget: int) -> Tensor:
        """Quotas by the common target of each scale: (S, ...) sizes of the units of balance."""
        eligible = counts >= self.min_pixels
        num_eligible = eligible.sum(dim=(1, 2), keepdim=True)
        most = torch.iinfo(counts.dtype).max
        rarest = counts.masked_fill(~eligible, most).amin(dim=(1, 2), keepdim=True)
        target = rarest.clamp(min=self.min_per_class, max=self.max_per_group)
        target = target.minimum(budget // num_eligible.clamp(min=1))
        return counts.minimum(target).masked_fill(~eligible, 0)


def budget_of_process(max_anchors: int, across_processes: bool) -> int:
    """Most anchors of the images that are balanced together: the budget, or an equal share of it
    for each process, rounded up."""
    return max_anchors if across_processes else -(-max_anchors // world_size())


def quotas_of_process(
    counts: Tensor, quotas_of: Callable[[Tensor], Tensor], across_processes: bool
) -> Tensor:
    """Quotas of this process's images, set for the images of all processes where asked for.

    Args:
        counts: (S, K, B, ...) int64 pixel counts; B may differ between processes.
        quotas_of: the counts of all images -> their quotas, likewise.

    Returns:
        (S, K, B, ...) quotas, on the CPU where there are several processes.
    """
    if not across_processes or world_size() == 1:
        return quotas_of(counts)
    counts = counts.cpu()  # the only wait for the device, in this case
    gathered: list[Tensor] = [counts] * world_size()
    dist.all_gather_object(gathered, counts)
    quotas = quotas_of(torch.cat(gathered, dim=2))
    return quotas.split([part.shape[2] for part in gathered], dim=2)[dist.get_rank()]


class SortedPixels(NamedTuple):
    """The pixels of all scales in the order of their groups.

    Groups are numbered by scale, class -1..K, image (and half). Classes -1 and K hold what lies
    below and above the range of labels: ignored pixels need no mask this way.

    Attributes:
        order: (pixels,) int64, the pixels, row-major within each group.
        bounds: (S * (K + 2) * G + 1,) int64, where in `order` the groups begin and end.
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
    # The sort is the largest cost, and it depends on the bytes of the keys.
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
    # A second half goes on with the shuffle of the first, now over the pixels of both.
    leader = group - group % 2 if from_remainder else group
    # Padding is beyond all pixels, where it is in nobody's way.
    first = pixels.bounds[leader].masked_fill_(padding, num_pixels)
    size = pixels.bounds[group + 1] - first
    index = draw_without_replacement(first, size, slots - first_slot[leader], random[slots])
    chosen = pixels.order[index % num_pixels]
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
    """Draws indices from ranges, none twice, every subset of a range equally likely.

    The head of a Fisher-Yates shuffle, for all ranges at once. In sequence it reads: each draw
    swaps index `first + rank` with a random one that is not before it in the range; what comes to
    `first + rank` is drawn. That is what the random index held from the beginning, unless an
    earlier draw swapped into it: then, what that draw had at its own index. Sorting the swaps finds
    the earlier draw, and pointer doubling what a still earlier one may have brought there.

    Args:
        first: (A,) int64, where the range of each draw begins. Ranges must not overlap; draws of
            one range are neighbours.
        size: (A,) int64 length of the range. Must exceed `rank` for the result to be in the range.
        rank: (A,) int64, 0, 1, ... among the draws of a range.
        random: (A,) int64, uniform in 0..2^62-1.

    Returns:
        (A,) int64 indices.

    Reference: Durstenfeld, "Algorithm 235: random permutation", Communications of the ACM, 1964.
    """
    number = torch.arange(len(first), device=first.device)
    own = first + rank
    swapped = own + random % (size - rank).clamp(min=1)

    # Draws that swapped into the same index are neighbours, the earlier before the later.
    indices, draws = swapped.sort(stable=True)
    before, repeated = draws.roll(1), indices == indices.roll(1)
    repeated[:1] = False
    # The draw that swapped into the same index before; the draw itself where there is none.
    earlier = torch.empty_like(draws).scatter_(0, draws, torch.where(repeated, before, draws))

    # The draw that brought to the own index of each draw what it holds when its turn comes: the
    # last one that swapped into it, or the draw itself where there is none. (A draw that stays
    # where it is finds itself too, but nobody asks: no later draw has to do with its index.)
    last = draws[(torch.searchsorted(indices, own, right=True) - 1).clamp(min=0)]
    origin = torch.where(swapped[last] == own, last, number)
    for _ in range(len(first).bit_length()):  # no chain is longer than the draws are many
        origin = origin.index_select(0, origin)
    return torch.where(earlier == number, swapped, own[origin[earlier]])


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

"""Which pixels become anchors: labels at the size of a map, and class-balanced draws.

Shape letters: S scales (label maps of one step), B images, K classes, G groups of a class at one
scale, H W a label map, h w a feature map, P its pixels, A anchors of one scale.

Labels decide how many pixels are drawn of each class, and labels are known on the host: no draw
waits for the device. A sort of each image brings together the pixels of a group (one scale, class
and image), budgets say how many to take from each, and random ranks say which. No loop runs over
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from .sets import PixelDraw, host_group, on_device, stack_processes, world_size

Balance = Literal["class", "image_class"]
LabelSampling = Literal["nearest", "majority"]


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


def majority_labels(labels: Tensor, size: Sequence[int], num_classes: int) -> Tensor:
    """Down-sampling of a label map by vote: an output pixel has the class of most that it covers.

    Output pixel i covers input pixels floor(i * H / h) to floor((i + 1) * H / h) - 1. Ignored
    pixels vote as one more class; of equal numbers of votes the lowest class wins, and a class wins
    over what is ignored.

    Args:
        labels: (B, H, W) integers on the host; others than 0..K-1 are ignored.
        size: (h, w), at most (H, W).
        num_classes: K.

    Returns:
        (B, h, w) int64, K where what is ignored has won.

    Raises:
        ValueError: a size above that of the labels.

    Reference: the official code of Pissas et al., ECCV 2022, offers it as `avg_pool`; its
        experiments take the nearest pixel.
    """
    height, width = labels.shape[-2:]
    h, w = size
    if h > height or w > width:
        raise ValueError(
            f"majority_labels: labels of {height}x{width} cannot be down-sampled to {h}x{w}. Take "
            "the nearest ones."
        )
    # The last output pixel that begins no later than the input pixel.
    rows = ((torch.arange(height) + 1) * h - 1) // height
    columns = ((torch.arange(width) + 1) * w - 1) // width
    cells = (torch.arange(len(labels))[:, None] * h + rows)[..., None] * w + columns
    known = (labels >= 0) & (labels < num_classes)
    votes = cells * (num_classes + 1) + torch.where(known, labels.long(), num_classes)
    counts = torch.bincount(votes.flatten(), minlength=len(labels) * h * w * (num_classes + 1))
    # Of equal counts numpy's argmax is the first, and torch's may be any.
    winners = counts.view(len(labels), h, w, num_classes + 1).numpy().argmax(axis=3)
    return torch.from_numpy(winners)


class Batch:
    """What a contrast method sees of one step.

    Args:
        maps: feature or embedding maps (B, C, h, w) by name, all on one device.
        labels: (B, H, W) integers. Draws are made on the host: it waits for labels that are not
            there.
        logits: (B, K, h', w') class scores; None where there are none.
        generator: source of random numbers, on the host; None for the default one.
        across_processes: balance and contrast the global batch, not the images of each process.

    Attributes:
        device: of the maps.
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
        self.labels = labels.cpu()
        self.logits = logits
        self.generator = generator
        self.across_processes = across_processes
        self.device = next(iter(maps.values())).device
        self._at_size: dict[tuple[str, int | None, torch.Size], Tensor] = {}
        self._device_generator: torch.Generator | None = None

    def with_maps(self, maps: Mapping[str, Tensor]) -> Batch:
        """The same step, seen on other maps."""
        other = Batch(maps, self.labels, self.logits, self.generator, self.across_processes)
        other._at_size = self._at_size
        return other

    def of_all_processes(self, values: Tensor) -> Tensor:
        """(W, ...) values of all W processes that share the batch, with gradients; W is 1 where
        each process has its own."""
        return stack_processes(values) if self.across_processes else values[None]

    def host_labels(self, feature: str, voters: int | None = None) -> Tensor:
        """(B, h, w) labels at the size of a map, on the host.

        Args:
            feature: name of the map.
            voters: number of classes that `majority_labels` counts; None for the nearest labels.
        """
        key = "host", voters, self.maps[feature].shape[-2:]
        if key not in self._at_size:
            if voters is None:
                label_map = downsample_labels(self.labels, key[2])
            else:
                label_map = majority_labels(self.labels, key[2], voters)
            # Contiguous, for it is read several times.
            self._at_size[key] = label_map.contiguous()
        return self._at_size[key]

    def label_map(self, feature: str) -> Tensor:
        """(B, h, w) int64 labels at the size of a map, on its device."""
        key = "labels", None, self.maps[feature].shape[-2:]
        if key not in self._at_size:
            self._at_size[key] = on_device(self.host_labels(feature), self.device).long()
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
        key = "predictions", None, self.maps[feature].shape[-2:]
        if key not in self._at_size:
            with torch.no_grad():
                self._at_size[key] = self.scores(feature).argmax(dim=1)
        return self._at_size[key]

    def device_generator(self) -> torch.Generator | None:
        """A source of random numbers on the maps' device, for as many as are best made there.

        It is seeded by the host's, so that a step repeats on the same kind of device.
        """
        if self.device.type != "cuda":
            return self.generator
        if self._device_generator is None:
            seed = int(torch.randint(2**62, (), generator=self.generator))
            self._device_generator = torch.Generator(self.device).manual_seed(seed)
        return self._device_generator


class Sampler(Protocol):
    """Draws pixels from feature maps."""

    def draw(self, batch: Batch, features: Sequence[str]) -> list[PixelDraw]:
        """One draw per feature map, grouped by class; on the host, or on the maps' device."""
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

    Args:
        num_classes: K.
        balance: the unit of balance.
        max_anchors: most anchors per scale, of all processes together.
        min_pixels: classes (or pairs) with fewer pixels at a scale are not drawn at that scale.
        max_per_group: most anchors per class (or pair); None for no such bound.
        min_per_class: least anchors per class (or pair) that has so many pixels; 0 as in the paper,
            where one object of five pixels leaves five anchors to every class.
        label_sampling: the label of a pixel of a map is the "nearest" one, or that of the
            "majority" of the pixels that it covers, see `majority_labels`.

    Raises:
        ValueError: an argument out of its range.

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
        label_sampling: LabelSampling = "nearest",
    ) -> None:
        if label_sampling not in get_args(LabelSampling):
            raise ValueError(
                f"label_sampling={label_sampling!r}: choose one of {list(get_args(LabelSampling))}."
            )
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
        self.label_sampling = label_sampling

    def draw(self, batch: Batch, features: Sequence[str]) -> list[PixelDraw]:
        """As in `Sampler`."""
        voters = self.num_classes if self.label_sampling == "majority" else None
        label_maps = [batch.host_labels(feature, voters) for feature in features]
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
            label_maps: S integer maps (B, h, w) on the host, one per scale, of the same B images. A
                value outside 0..K-1 is ignored.
            generator: source of the draw; None for the default one.
            across_processes: balance the global batch; every process has to make the call.

        Returns:
            S draws, without repeated pixels. A draw may be empty.
        """
        # Two anchors of each class are the least with which it has a positive pair.
        budget = budget_of_process(self.max_anchors, across_processes)
        budget = max(budget, 2 * self.num_classes)
        pixels = [sort_pixels(label_map, self.num_classes) for label_map in label_maps]
        quotas = quotas_of_process(
            torch.stack([x.counts for x in pixels]),
            lambda counts: self._quotas(counts, budget),
            across_processes,
        )
        return draw_pixels(pixels, quotas, class_counts(quotas), generator)

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
        (S, K, B, ...) quotas; on the host where there are several processes, and then it waits.
    """
    if not across_processes or world_size() == 1:
        return quotas_of(counts)
    counts = counts.cpu()
    gathered: list[Tensor] = [counts] * world_size()
    dist.all_gather_object(gathered, counts, group=host_group())
    quotas = quotas_of(torch.cat(gathered, dim=2))
    return quotas.split([part.shape[2] for part in gathered], dim=2)[dist.get_rank()]


def class_counts(quotas: Tensor) -> list[tuple[int, ...]]:
    """How many pixels each class gives at each scale, by quotas (S, K, G) on the host."""
    return [tuple(row) for row in quotas.sum(dim=2).tolist()]


def count_pixels(label_map: Tensor, num_classes: int) -> Tensor:
    """(K, B) int64 pixels of each class in each image of a map (B, h, w) on the host."""
    known = (label_map >= 0) & (label_map < num_classes)
    keys = torch.where(known, label_map.long(), num_classes).flatten(1).numpy()
    counts = [np.bincount(of_image, minlength=num_classes + 1)[:-1] for of_image in keys]
    return torch.from_numpy(np.stack(counts, axis=1))


_KEY_TYPES = (torch.uint8, torch.int16, torch.int32)


class SortedPixels(NamedTuple):
    """The pixels of a label map by group, on any device.

    Attributes:
        order: (B, P) int64, the pixels of each image, by class and half, row-major within each.
        first: (K, G) int64, where in `order.flatten()` each group begins. G is B, or 2 B where the
            images are halved.
        counts: (K, G) int64, pixels of each group.
    """

    order: Tensor
    first: Tensor
    counts: Tensor


def sort_pixels(label_map: Tensor, num_classes: int, halves: Tensor | None = None) -> SortedPixels:
    """Sorts the pixels of each image by class.

    Args:
        label_map: (B, h, w) integers; others than 0..K-1 are in no group.
        num_classes: K.
        halves: (B, h, w) bool that divides each group in two, first the pixels that are False; None
            for whole groups.
    """
    num_keys = num_classes if halves is None else 2 * num_classes
    # The sort is the largest cost, and it depends on the bytes of the keys.
    dtype = next(x for x in _KEY_TYPES if num_keys < torch.iinfo(x).max)
    keys = label_map
    if keys.dtype != torch.uint8:
        keys = keys.masked_fill(keys < 0, num_classes)
    most = min(num_classes, torch.iinfo(keys.dtype).max)
    keys = keys.clamp(max=most).to(dtype)  # the ignored ones come last
    if halves is not None:
        keys = (keys * 2 + halves).clamp_(max=num_keys)
    keys = keys.flatten(1)
    order = stable_order(keys)
    numbers = torch.arange(num_keys + 1, dtype=dtype, device=keys.device).expand(len(keys), -1)
    bounds = torch.searchsorted(keys.gather(1, order), numbers.contiguous())
    starts = torch.arange(len(keys), device=keys.device)[:, None] * keys.shape[1]

    def by_group(values: Tensor) -> Tensor:
        return values.unflatten(1, (num_classes, -1)).transpose(0, 1).flatten(1)

    return SortedPixels(order, by_group(bounds[:, :-1] + starts), by_group(bounds.diff(dim=1)))


def stable_order(keys: Tensor) -> Tensor:
    """(B, P) int64 indices that sort each row, equal keys in their order."""
    if keys.device.type == "cpu":  # numpy has a radix sort for small integers
        return torch.from_numpy(np.argsort(keys.numpy(), axis=1, kind="stable"))
    return torch.sort(keys, dim=1, stable=True).indices


def draw_pixels(
    pixels: Sequence[SortedPixels],
    quotas: Tensor,
    class_counts: Sequence[tuple[int, ...]],
    generator: torch.Generator | None,
    *,
    from_remainder: bool = False,
) -> list[PixelDraw]:
    """Draws pixels from each group at random, none twice, without waiting for the device.

    Args:
        pixels: of S scales.
        quotas: (S, K, G) int64, how many pixels to draw from each group, at most its count; on the
            host, or on the pixels' device.
        class_counts: for each scale the K sums over the groups of a class, which the host knows.
        generator: source of the draw, on the host; None for the default one.
        from_remainder: for halved groups, draw the quota of a second half from what the draw of
            the first one leaves of both.

    Returns:
        S draws on the pixels' device, grouped by class, then by image (and half).
    """
    device = pixels[0].order.device
    lengths = [sum(of_scale) for of_scale in class_counts]
    total = sum(lengths)
    random = on_device(torch.randint(2**62, (total,), generator=generator), device)
    quota = on_device(quotas, device).flatten()
    size = torch.stack([x.counts for x in pixels]).flatten()
    starts = list(accumulate((x.order.numel() for x in pixels), initial=0))[:-1]
    first = torch.stack([x.first + n for x, n in zip(pixels, starts, strict=True)]).flatten()

    group = torch.repeat_interleave(quota, output_size=total)
    rank = torch.arange(total, device=device) - (quota.cumsum(dim=0) - quota)[group]
    leader = group
    if from_remainder:
        # A second half goes on with the shuffle of the first, now over the pixels of both.
        second = group % 2
        leader = group - second
        rank = rank + second * quota[leader]
        size_of_draw = size[leader] * second + size[group]
    else:
        size_of_draw = size[group]
    index = draw_without_replacement(first[leader], size_of_draw, rank, random)
    chosen = [
        x.order.flatten()[of_scale - n]
        for x, of_scale, n in zip(pixels, index.split(lengths), starts, strict=True)
    ]

    num_images, (_, num_classes, groups_per_class) = len(pixels[0].order), quotas.shape
    image = group.div(groups_per_class // num_images, rounding_mode="floor") % num_images
    labels = group.div(groups_per_class, rounding_mode="floor") % num_classes
    return [
        PixelDraw(*part)
        for part in zip(
            image.split(lengths), chosen, labels.split(lengths), class_counts, strict=True
        )
    ]


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

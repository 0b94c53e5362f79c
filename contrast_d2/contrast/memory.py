"""Embeddings of earlier batches, kept by class, to contrast with.

Shape letters: B images, D embedding width, K classes, R rings, N keys that come in at once, M keys
of a class, h w a feature map, P its pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .kernels.gather import gather_embeddings
from .sampling import class_counts, draw_pixels, sort_pixels
from .sets import (
    PixelSet,
    at_least_fp32,
    draws_on_device,
    gather_parts,
    joined_sets,
    on_device,
    squared_lengths,
    unit_vectors,
)

logger = logging.getLogger(__name__)

Storage = Literal["fp32", "fp16"]
Admission = Literal["all", "correct"]

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


class RingBuffer(nn.Module):
    """Rings of slots, one per class and kind of key, each with the newest keys.

    Keys, pointers and fill counts are buffers, so a resumed run continues with the same memory.

    Args:
        num_classes: K.
        embed_dim: D.
        slots: slots of each class, by kind of key.
        dtype: what the slots hold.
        persistent: keep the buffers in the `state_dict`.

    Attributes:
        keys: (slots, D), kind by kind, and class by class within a kind.
        pointers: (R,) int64, the slot of each ring that is written next.
        filled: (R,) int64, how many slots are filled: those before the pointer, in the end all.
        sizes: (R,) int64, slots of each ring.
        first: (R,) int64, where in `keys` each ring begins.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        slots: Mapping[str, int],
        *,
        dtype: torch.dtype = torch.float32,
        persistent: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("embed_dim", embed_dim)):
            if value < 1:
                raise ValueError(f"{name}={value}: needs at least 1.")
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.slots = dict(slots)
        sizes = torch.tensor(list(slots.values())).repeat_interleave(num_classes)
        self.keys: Tensor
        self.pointers: Tensor
        self.filled: Tensor
        self.sizes: Tensor
        self.first: Tensor
        for name, buffer, is_state in (
            ("keys", torch.zeros(num_classes * sum(slots.values()), embed_dim, dtype=dtype), True),
            ("pointers", torch.zeros_like(sizes), True),
            ("filled", torch.zeros_like(sizes), True),
            ("sizes", sizes, False),
            ("first", sizes.cumsum(dim=0) - sizes, False),
        ):
            self.register_buffer(name, buffer, persistent=persistent and is_state)

    def check_sizes(self, num_classes: int, embed_dim: int) -> None:
        """Raises ValueError where keys of a method do not fit in."""
        for name, own, other in (
            ("num_classes", self.num_classes, num_classes),
            ("embed_dim", self.embed_dim, embed_dim),
        ):
            if own != other:
                raise ValueError(
                    f"memory: {name}={own}, but sampler and projector have {other}: set them alike."
                )

    def fill_fraction(self) -> Tensor:
        """Share of the slots that are filled, 0-dim."""
        return self.filled.sum() / len(self.keys)

    def fill_by_class(self) -> dict[str, Tensor]:
        """Share of the slots of each class that are filled, (K,), by kind of key."""
        shares = (self.filled / self.sizes).split(self.num_classes)
        return {kind: x for (kind, size), x in zip(self.slots.items(), shares, strict=True) if size}

    @torch.no_grad()
    def push(self, keys: Tensor, rings: Tensor) -> None:
        """Stores keys (N, D) in rings (N,), in their order; those of ring -1 are none.

        The oldest ones make room. Keys that are not finite are not stored: an overflow of mixed
        precision costs one step, and in the memory would spoil all that follow. The host does not
        wait for the device.
        """
        if len(keys) == 0:
            return
        rings, order = rings.masked_fill(~keys.isfinite().all(dim=1), -1).sort(stable=True)
        starts = torch.searchsorted(
            rings, torch.arange(len(self.sizes) + 1, device=rings.device, dtype=rings.dtype)
        )
        counts = starts.diff()
        ring = rings.clamp(min=0)
        index = torch.arange(len(rings), device=rings.device)
        rank = index - starts[ring]
        # Of more keys than slots the newest stay.
        stored = (rings >= 0) & (rank >= (counts - self.sizes)[ring])
        slots = self.first[ring] + (self.pointers[ring] + rank) % self.sizes[ring].clamp(min=1)
        # To select the rows, the host would have to wait for their number. Instead, a row that is
        # not stored repeats one that is; where there is none, all write back what is there. Rows
        # that meet in a slot are equal, so their order does not matter.
        source = torch.where(stored, index, stored.int().argmax())
        slots = slots[source]
        rows = keys[order[source]].to(self.keys.dtype)
        self.keys[slots] = torch.where(stored.any(), rows, self.keys[slots])
        self.pointers.add_(counts).remainder_(self.sizes.clamp(min=1))
        self.filled.add_(counts).copy_(self.filled.minimum(self.sizes))

    def push_of_all_processes(self, keys: PixelSet) -> None:
        """Stores the keys of all processes, whose labels are rings, in the order of ranks.

        Every process has to call it.
        """
        self.push(*(torch.cat(x) for x in gather_parts(keys.embeddings.detach(), keys.labels)))


class MemoryBank(RingBuffer):
    """Two rings per class: mean embeddings of regions, and embeddings of single pixels.

    From each image, each class that it shows brings one region key, the normalised mean of the unit
    embeddings of its pixels, and up to `pixels_per_image` pixel keys, drawn at random.

    The keys of all processes go into the bank of every process, in the order of ranks: all banks
    are the same. Wrap the model with `broadcast_buffers=False`, or DistributedDataParallel sends
    the first bank to all processes before each step, for nothing.

    Args:
        num_classes: K.
        embed_dim: D.
        regions_per_class: region slots of each class; 0 for none. The paper has as many as there
            are training images, the official code 5000.
        pixels_per_class: pixel slots of each class; 0 for none. The paper has ten times the number
            of training images, the official code 5000.
        pixels_per_image: most pixel keys of a class from one image.
        max_keys: most keys that enter a step, an equal share of them for each class, all its filled
            slots being equally likely; at least one. None for the whole bank, which with 19 classes
            of 10,000 slots makes 190,000 contrast samples.
        admission: which pixels of a batch become keys, "all" or, in single pixels and region means
            alike, the "correct"ly predicted ones. The paper has all; semi-supervised methods admit
            correct ones, there with a threshold of confidence, which is not here. Up to
            `pixels_per_image` pixels are drawn of all, and the wrong ones of these are dropped.
        dtype: what the slots hold, "fp32" or, in half the memory, "fp16".
        persistent: keep the bank in the `state_dict`, so that a resumed run continues with it; or
            else it starts empty, and checkpoints do not grow by its size.

    Raises:
        ValueError: an argument out of its range, no slots at all, or fewer pixel slots than one
            image fills.

    Reference: Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV
        2021, section 3.2 ("pixel-to-region contrast" and the memory bank). Admission: Alonso,
        Sabater, Ferstl, Montesano, Murillo, "Semi-Supervised Semantic Segmentation with Pixel-Level
        Contrastive Learning from a Class-wise Memory Bank", ICCV 2021.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        *,
        regions_per_class: int,
        pixels_per_class: int,
        pixels_per_image: int = 10,
        max_keys: int | None = None,
        admission: Admission = "all",
        dtype: Storage = "fp32",
        persistent: bool = True,
    ) -> None:
        for name, value, least in (
            ("regions_per_class", regions_per_class, 0),
            ("pixels_per_class", pixels_per_class, 0),
            ("pixels_per_image", pixels_per_image, 1),
            ("max_keys", max_keys, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"MemoryBank({name}={value}): needs at least {least}.")
        if regions_per_class == pixels_per_class == 0:
            raise ValueError(
                "regions_per_class=0 and pixels_per_class=0: a bank without slots. Set one of "
                "them, or memory=None."
            )
        if 0 < pixels_per_class < pixels_per_image:
            raise ValueError(
                f"pixels_per_class={pixels_per_class} is less than the pixels_per_image="
                f"{pixels_per_image} that one image brings: set it to {pixels_per_image} or more, "
                "or to 0 for a bank of regions alone."
            )
        if admission not in get_args(Admission):
            raise ValueError(f"admission={admission!r}: choose one of {list(get_args(Admission))}.")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose one of {list(_DTYPES)}.")
        slots = {"regions": regions_per_class, "pixels": pixels_per_class}
        super().__init__(num_classes, embed_dim, slots, dtype=_DTYPES[dtype], persistent=persistent)
        self.pixels_per_image = pixels_per_image
        self.max_keys = max_keys
        self.admission = admission
        logger.info(
            "Memory bank: %d classes x (%d regions + %d pixels) x %d in %s: %.1f MB%s.",
            num_classes,
            regions_per_class,
            pixels_per_class,
            embed_dim,
            dtype,
            self.keys.nbytes / 1e6,
            ", also in checkpoints" if persistent else ", not in checkpoints",
        )

    @torch.no_grad()
    def enqueue(
        self,
        embeddings: Tensor,
        labels: Tensor,
        generator: torch.Generator | None = None,
        admitted: Tensor | None = None,
    ) -> None:
        """Stores keys of a batch. With several processes every one has to call it.

        Args:
            embeddings: (B, D, h, w), not normalised.
            labels: (B, h, w) integers at the size of the map, on the host; others than 0..K-1 are
                ignored.
            generator: source of the draw of pixels, on the host; None for the default one.
            admitted: (B, h, w) bool on the maps' device, which pixels enter region keys and, of
                those drawn, which become keys; None for all.

        Raises:
            ValueError: labels of another size than the map, or a map of another width.
        """
        size = (embeddings.shape[0], *embeddings.shape[2:])
        if embeddings.shape[1] != self.embed_dim or labels.shape != size:
            raise ValueError(
                f"embeddings {tuple(embeddings.shape)} with labels {tuple(labels.shape)}: needs "
                f"(B, {self.embed_dim}, h, w) with (B, h, w); downsample_labels resizes labels."
            )
        kinds = []
        if self.slots["regions"]:
            of_pixels = on_device(labels, embeddings.device).long()
            if admitted is not None:
                of_pixels = of_pixels.masked_fill(~admitted, -1)
            kinds.append(_region_keys(embeddings, of_pixels, self.num_classes))
        if self.slots["pixels"]:
            kinds.append(self._pixel_keys(embeddings, labels, generator, admitted))
        self.push_of_all_processes(joined_sets(kinds))

    @torch.no_grad()
    def contrast_set(self, generator: torch.Generator | None = None) -> PixelSet:
        """The stored keys, or random ones of each class, `max_keys` in all.

        Args:
            generator: source of the choice, on the bank's device; None for the default one.

        Returns:
            Keys in the bank's dtype, of a number that does not depend on how full it is. -1 labels
            empty slots.
        """
        device = self.keys.device
        index = torch.arange(len(self.keys), device=device)
        ring = torch.searchsorted(self.first + self.sizes, index, right=True)
        rank = index - self.first[ring]
        labels = torch.where(rank < self.filled[ring], ring % self.num_classes, -1)
        per_class = most = sum(self.slots.values())
        if self.max_keys is not None:
            most = max(self.max_keys // self.num_classes, 1)
        if most >= per_class:  # a copy, for the bank changes before the backward pass
            return PixelSet(self.keys.clone(), labels)
        # (K, slots) all slots of a class in one row, and random numbers for the filled ones.
        slots_KS = torch.cat(
            [
                x.view(self.num_classes, -1)
                for x in index.split([self.num_classes * n for n in self.slots.values()])
            ],
            dim=1,
        )
        random_KS = torch.rand(slots_KS.shape, generator=generator, device=device)
        random_KS.masked_fill_(labels[slots_KS] < 0, -1)
        slots = slots_KS.gather(1, random_KS.topk(most, dim=1).indices).flatten()
        return PixelSet(self.keys[slots], labels[slots])

    def _pixel_keys(
        self,
        embeddings: Tensor,
        labels: Tensor,
        generator: torch.Generator | None,
        admitted: Tensor | None,
    ) -> PixelSet:
        """Unit embeddings of random pixels of each (class, image), with their rings as labels."""
        pixels = sort_pixels(labels.cpu(), self.num_classes)
        quotas = pixels.counts.clamp(max=self.pixels_per_image)[None]
        draws = draw_pixels([pixels], quotas, class_counts(quotas), generator)
        (draw,) = draws_on_device(draws, embeddings.device)
        # The ring of class c is c for its regions, K + c for its pixels.
        rings = draw.labels + self.num_classes
        if admitted is not None:
            # The host, which draws, does not know what is admitted.
            rings = rings.masked_fill(~admitted.flatten(1)[draw.image, draw.pixel], -1)
        return PixelSet(gather_embeddings(embeddings, draw.image, draw.pixel), rings)


class AnchorMemory(RingBuffer):
    """The last anchors of each class.

    Args:
        num_classes: K.
        embed_dim: D.
        size: M, anchors kept per class.

    Raises:
        ValueError: a size below 1.

    Reference: Sung et al., "Contextrast++", arXiv 2608.22679, section III; size 100 there.
    """

    def __init__(self, num_classes: int, embed_dim: int, size: int = 100) -> None:
        if size < 1:
            raise ValueError(f"AnchorMemory(size={size}): needs at least 1 anchor per class.")
        super().__init__(num_classes, embed_dim, {"anchors": size})

    def contrast_set(self) -> PixelSet:
        """As many anchors of each class as the least filled class has, the newest ones.

        Classes that have none do not count. That the numbers are equal is the paper's; it does not
        state which anchors are taken; ours: the newest, as they are nearest to the current weights.

        Returns:
            (K * M, D) anchors; -1 labels those not taken.
        """
        size = self.slots["anchors"]
        filled = self.filled > 0
        number = self.filled.masked_fill(~filled, size).amin()
        age_KM = (self.pointers[:, None] - 1 - torch.arange(size, device=self.keys.device)) % size
        taken_KM = (age_KM < number) & filled[:, None]
        classes = torch.arange(self.num_classes, device=self.keys.device)
        return PixelSet(self.keys.clone(), torch.where(taken_KM, classes[:, None], -1).flatten())


def _region_keys(embeddings: Tensor, labels: Tensor, num_classes: int) -> PixelSet:
    """Normalised mean of the unit embeddings of each (image, class): (B * K, D) with labels."""
    # Each pixel weighs 1 / length: no normalised copy of the map.
    lengths = squared_lengths(at_least_fp32(embeddings.flatten(2))).sqrt_().clamp_(min=1e-12)
    return region_centres(embeddings, labels, num_classes, lengths.reciprocal())


def region_centres(
    embeddings: Tensor, labels: Tensor, num_classes: int, weights: Tensor
) -> PixelSet:
    """The direction of the weighted sum of the pixels of each (image, class).

    Args:
        embeddings: (B, D, h, w), through which gradients flow.
        labels: (B, h, w) int64; others than 0..K-1 are in no region.
        num_classes: K.
        weights: (B, P), above 0.

    Returns:
        (B * K, D), image by image; -1 labels classes that an image does not show.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        rows_BDP = at_least_fp32(embeddings.flatten(2))
        classes = labels.flatten(1)
        known = (classes >= 0) & (classes < num_classes)
        # What is ignored goes to a further class.
        classes = torch.where(known, classes, num_classes)[:, None]
        weights_BKP = rows_BDP.new_zeros(len(labels), num_classes + 1, classes.shape[2])
        weights_BKP.scatter_(1, classes, weights[:, None].to(rows_BDP.dtype))
        weights_BKP = weights_BKP[:, :-1]
        sums = (weights_BKP @ rows_BDP.transpose(1, 2)).flatten(0, 1)
        present = (weights_BKP > 0).any(dim=2).flatten()
    found = torch.arange(num_classes, device=labels.device).repeat(len(labels))
    return PixelSet(unit_vectors(sums), found.masked_fill(~present, -1))

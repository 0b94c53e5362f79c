"""Embeddings of earlier batches, kept by class, to contrast with.

Shape letters: B images, D embedding width, K classes, S_r region slots and S_p pixel slots of each
class, N keys that come in at once, M samples of a class, h w a feature map, P its pixels.
"""

from __future__ import annotations

import logging
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .distributed import gather_set, world_size
from .gather import gather_embeddings, unit_vectors
from .sampling import draw_pixels, draw_without_replacement, sort_pixels

logger = logging.getLogger(__name__)

Storage = Literal["fp32", "fp16"]

_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


class LabelledSet(NamedTuple):
    """Embeddings with their classes.

    Attributes:
        embeddings: (N, D).
        labels: (N,) int64; -1 for rows that are none.
    """

    embeddings: Tensor
    labels: Tensor


class MemoryBank(nn.Module):
    """Two rings of slots per class: mean embeddings of regions, and embeddings of single pixels.

    From each image, each class that it shows brings one region key, the normalised mean of the unit
    embeddings of its pixels, and up to `pixels_per_image` pixel keys, drawn at random. The rings
    hold the newest keys. Slots that have not been filled yet are neither positives nor negatives.

    In distributed training the keys of all processes go into the bank of every process, in the
    order of ranks: all banks are the same. Wrap the model with `broadcast_buffers=False`, or
    DistributedDataParallel sends the first bank to all processes before each step, for nothing.

    Args:
        num_classes: K.
        embed_dim: D.
        regions_per_class: region slots of each class; 0 for none. The paper has as many as there
            are training images, the release 5000.
        pixels_per_class: pixel slots of each class; 0 for none. The paper has ten times the number
            of training images, the release 5000.
        pixels_per_image: most pixel keys of a class from one image.
        dtype: what the slots hold, "fp32" or, in half the memory, "fp16".
        persistent: keep the bank in the `state_dict`, so that a resumed run continues with it; or
            else it starts empty, and checkpoints do not grow by its size.

    Raises:
        ValueError: an argument out of its range, no slots at all, or fewer pixel slots than one
            image fills.

    Reference: Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic Segmentation", ICCV
        2021, section 3.2 ("pixel-to-region contrast" and the memory bank).
    """

    def __init__(
        self,
        num_classes: int,
        embed_dim: int,
        *,
        regions_per_class: int,
        pixels_per_class: int,
        pixels_per_image: int = 10,
        dtype: Storage = "fp32",
        persistent: bool = True,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_classes", num_classes, 1),
            ("embed_dim", embed_dim, 1),
            ("regions_per_class", regions_per_class, 0),
            ("pixels_per_class", pixels_per_class, 0),
            ("pixels_per_image", pixels_per_image, 1),
        ):
            if value < least:
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
        if dtype not in _DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose one of {list(_DTYPES)}.")
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.regions_per_class = regions_per_class
        self.pixels_per_class = pixels_per_class
        self.pixels_per_image = pixels_per_image
        sizes = torch.tensor([[regions_per_class], [pixels_per_class]]).repeat(1, num_classes)
        num_slots = num_classes * (regions_per_class + pixels_per_class)
        self.keys: Tensor
        self.pointers: Tensor
        self.filled: Tensor
        self.sizes: Tensor
        self.first: Tensor
        for name, buffer, is_state in (
            # All region rings, class by class, then all pixel rings.
            ("keys", torch.zeros(num_slots, embed_dim, dtype=_DTYPES[dtype]), True),
            # (2, K): of regions, of pixels. The slot that is written next, and how many are filled:
            # those before the pointer, in the end all.
            ("pointers", torch.zeros_like(sizes), True),
            ("filled", torch.zeros_like(sizes), True),
            ("sizes", sizes, False),
            # (2 K,) where in `keys` each ring begins.
            ("first", sizes.flatten().cumsum(dim=0) - sizes.flatten(), False),
        ):
            self.register_buffer(name, buffer, persistent=persistent and is_state)
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

    @property
    def regions(self) -> Tensor:
        """(K, S_r, D) region slots."""
        return self.keys[: self.num_classes * self.regions_per_class].unflatten(
            0, (self.num_classes, self.regions_per_class)
        )

    @property
    def pixels(self) -> Tensor:
        """(K, S_p, D) pixel slots."""
        return self.keys[self.num_classes * self.regions_per_class :].unflatten(
            0, (self.num_classes, self.pixels_per_class)
        )

    def fill_fraction(self) -> Tensor:
        """Share of the slots that are filled, 0-dim."""
        return self.filled.sum() / len(self.keys)

    def fill_by_class(self) -> dict[str, Tensor]:
        """Share of the slots of each class that are filled, (K,), by kind of key."""
        shares = dict(zip(("regions", "pixels"), self.filled / self.sizes, strict=True))
        slots = {"regions": self.regions_per_class, "pixels": self.pixels_per_class}
        return {kind: share for kind, share in shares.items() if slots[kind] > 0}

    @torch.no_grad()
    def enqueue(
        self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Stores keys of a batch; the oldest ones make room. No device is waited for.

        Keys that are not finite are not stored, nor are other regions of their image.

        With several processes every one has to call it; only then the host waits, for the number
        of keys of the others.

        Args:
            embeddings: (B, D, h, w), not normalised.
            labels: (B, h, w) integers at the size of the map; others than 0..K-1 are ignored.
            generator: source of the draw of pixels, on the labels' device; None for the default.

        Raises:
            ValueError: labels of another size than the map, or a map of another width.
        """
        size = (embeddings.shape[0], *embeddings.shape[2:])
        if embeddings.shape[1] != self.embed_dim or labels.shape != size:
            raise ValueError(
                f"embeddings {tuple(embeddings.shape)} with labels {tuple(labels.shape)}: needs "
                f"(B, {self.embed_dim}, h, w) with (B, h, w); downsample_labels resizes labels."
            )
        # Rings have numbers: that of the regions of class c is c, that of its pixels K + c.
        kinds = []
        if self.regions_per_class:
            kinds.append(_region_keys(embeddings, labels, self.num_classes))
        if self.pixels_per_class:
            keys = self._pixel_keys(embeddings, labels, generator)
            rings = torch.where(keys.labels < 0, -1, keys.labels + self.num_classes)
            kinds.append(LabelledSet(keys.embeddings, rings))
        keys, rings = (torch.cat(parts) for parts in zip(*kinds, strict=True))
        keys, rings = _of_all_processes(keys, rings)
        # An overflow of mixed precision costs one step; in the bank it would spoil all that follow.
        self._push(keys, rings.masked_fill(~keys.isfinite().all(dim=1), -1))

    @torch.no_grad()
    def contrast_set(
        self, max_per_class: int | None = None, generator: torch.Generator | None = None
    ) -> LabelledSet:
        """The stored keys, or a random part of them.

        Args:
            max_per_class: M, most keys of a class, all filled slots being equally likely; None for
                the whole bank. 19 classes of 10,000 slots make 190,000 contrast samples, so a
                matrix of 1.4 GB with 1,900 anchors.
            generator: source of the choice, on the bank's device; None for the default one.

        Returns:
            Keys in fp32 (fp64 in a module that was made so), to be used before others are stored,
            of a size that does not depend on how full the bank is: (K * M, D), or all slots. -1
            labels what is not filled.

        Raises:
            ValueError: less than one key per class.
        """
        if max_per_class is None or max_per_class >= self.regions_per_class + self.pixels_per_class:
            slots, labels = slice(None), self._slot_labels()
        else:
            slots, labels = self._random_slots(max_per_class, generator)
        return LabelledSet(_at_least_fp32(self.keys[slots]), labels)

    def _slot_labels(self) -> Tensor:
        """(slots,) classes, -1 for slots that are not filled."""
        classes = torch.arange(self.num_classes, device=self.filled.device)[:, None]
        return torch.cat(
            [
                torch.where(
                    torch.arange(size, device=filled.device) < filled[:, None], classes, -1
                ).flatten()
                for size, filled in zip(
                    (self.regions_per_class, self.pixels_per_class), self.filled, strict=True
                )
            ]
        )

    def _random_slots(
        self, max_per_class: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """(K * M,) slots, none twice, and their classes; -1 for what a class lacks."""
        if max_per_class < 1:
            raise ValueError(f"max_per_class={max_per_class}: set it to 1 or more, or to None.")
        number = torch.arange(self.num_classes * max_per_class, device=self.filled.device)
        classes, rank = number // max_per_class, number % max_per_class
        regions = self.filled[0][classes]
        filled = regions + self.filled[1][classes]
        # Places 0, 1, ... of a class are its filled slots, regions first.
        first = classes * (self.regions_per_class + self.pixels_per_class)
        random = torch.randint(2**62, number.shape, generator=generator, device=number.device)
        place = draw_without_replacement(first, filled, rank, random) - first
        in_pixels = self.first[self.num_classes + classes] + place - regions
        slots = torch.where(place < regions, self.first[classes] + place, in_pixels)
        # What a class lacks may lie beyond its last slot.
        return slots.clamp(max=len(self.keys) - 1), classes.masked_fill(rank >= filled, -1)

    def _push(self, keys: Tensor, rings: Tensor) -> None:
        """Writes keys (N, D) into rings (N,), in their order; those of ring -1 are none."""
        sizes, pointers = self.sizes.flatten(), self.pointers.flatten()
        rings, order = rings.sort(stable=True)
        starts = torch.searchsorted(rings, torch.arange(len(sizes) + 1, device=rings.device))
        counts = starts.diff()
        ring = rings.clamp(min=0)
        index = torch.arange(len(rings), device=rings.device)
        rank = index - starts[ring]
        # Of more keys than slots the newest stay.
        stored = (rings >= 0) & (rank >= (counts - sizes)[ring])
        slots = self.first[ring] + (pointers[ring] + rank) % sizes[ring].clamp(min=1)
        # To select the rows, the host would have to wait for their number. Instead, a row that is
        # not stored repeats one that is; where there is none, all write back what is there. Rows
        # that meet in a slot are equal: their order does not matter.
        source = torch.where(stored, index, stored.int().argmax())
        slots = slots[source]
        rows = keys[order[source]].to(self.keys.dtype)
        self.keys[slots] = torch.where(stored.any(), rows, self.keys[slots])
        counts = counts.view_as(self.filled)
        self.pointers.add_(counts).remainder_(self.sizes.clamp(min=1))
        self.filled.add_(counts).copy_(self.filled.minimum(self.sizes))

    def _pixel_keys(
        self, embeddings: Tensor, labels: Tensor, generator: torch.Generator | None
    ) -> LabelledSet:
        """Unit embeddings of random pixels of each (class, image), padded to a fixed size."""
        pixels = sort_pixels([labels], self.num_classes)
        most = self.num_classes * len(labels) * self.pixels_per_image
        (draw,) = draw_pixels(
            [labels],
            pixels,
            pixels.counts.clamp(max=self.pixels_per_image),
            [min(most, labels.numel())],
            generator,
            fixed_size=True,
        )
        return LabelledSet(gather_embeddings(embeddings, draw.image, draw.pixel), draw.labels)


def _at_least_fp32(keys: Tensor) -> Tensor:
    return keys if keys.dtype == torch.float64 else keys.float()


def _region_keys(embeddings: Tensor, labels: Tensor, num_classes: int) -> LabelledSet:
    """Normalised mean of the unit embeddings of each (image, class): (B * K, D) with labels."""
    with torch.autocast(embeddings.device.type, enabled=False):
        rows_BDP = _at_least_fp32(embeddings.flatten(2))
        lengths = _lengths(rows_BDP).clamp_(min=1e-12)
        classes = labels.flatten(1).long()
        known = (classes >= 0) & (classes < num_classes)
        # Each pixel weighs 1 / length in its class: no normalised copy of the map. What is
        # ignored goes to a further class.
        classes = torch.where(known, classes, num_classes)[:, None]
        weights = rows_BDP.new_zeros(len(labels), num_classes + 1, classes.shape[2])
        weights.scatter_(1, classes, lengths.reciprocal()[:, None])
        sums = (weights[:, :-1] @ rows_BDP.transpose(1, 2)).flatten(0, 1)
        present = (weights[:, :-1] > 0).any(dim=2).flatten()
    found = torch.arange(num_classes, device=labels.device).repeat(len(labels))
    return LabelledSet(unit_vectors(sums), found.masked_fill(~present, -1))


def _lengths(rows_BDP: Tensor) -> Tensor:
    """(B, P) lengths of the embeddings of all pixels."""
    if rows_BDP.device.type != "cpu":
        return torch.linalg.vector_norm(rows_BDP, dim=1)
    # Twenty times as fast on a CPU, whose cache holds the squares of a few planes.
    squares = rows_BDP.new_zeros(rows_BDP.shape[0], rows_BDP.shape[2])
    for planes in rows_BDP.split(16, dim=1):
        squares += planes.square().sum(dim=1)
    return squares.sqrt_()


def _of_all_processes(keys: Tensor, labels: Tensor) -> LabelledSet:
    """The keys of all processes in the order of ranks."""
    if world_size() == 1:
        return LabelledSet(keys, labels)
    # `gather_set` has a process's own rows first: each row brings its rank to be sorted by.
    keys, coded = gather_set(keys, labels * world_size() + dist.get_rank())
    order = (coded % world_size()).argsort(stable=True)
    return LabelledSet(keys[order], (coded // world_size())[order])

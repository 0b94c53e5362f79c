"""The InfoNCE on a CPU: samples in the order of their classes, exponentials kept while they fit.

The equations are those of `terms`. In the order of classes the positives of an anchor are one
range of columns and its negatives all others, so that no pair of samples needs a mask. Embeddings
are unit vectors and the temperature is not too low (`is_exact`), so that no exponential needs a
shift, and e^(n_i - s_ij) is the product of e^n_i and e^(-s_ij).

Among themselves, the anchors are visited in blocks of rows and only against later classes: a tile
of exponentials serves its rows and, transposed, its columns. Its gradient

    d total / d s_ij + d total / d s_ji = e^s_ij (w_i + w_j),   w_i = push_i / e^n_i

with push_i the mean of sigmoid(n_i - s_ij) over the positives of i, has to wait for w_j, that is
until the class of j has met all others. Tiles wait in a cache of limited size; those that it has
no room for are computed again. That takes 3 A^2 D operations, of which a full product of A x D by
D x A takes 2, and 4 A^2 D without any room.

Shape letters: A anchors, C contrast samples, D embedding width, R rows of one block, Q columns of
one tile, P most positives that an anchor of a block has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..sets import KernelResult, PixelSet

# Rows and columns of a tile: large enough for full speed of the products, small enough for a tile
# to stay in a core's cache while it is worked on.
_ROWS = 256
_COLUMNS = 768
# Where all tiles fit into the cache, fewer and wider ones are faster.
_WIDE_COLUMNS = 2048
# Small classes share a block of about so many rows; its positives are then looked up one by one.
_MIXED_ROWS = 192
# So few anchors make one block, in which no symmetry is used.
_FEW_ROWS = 512
_CACHE_BYTES = 72 << 20
# A block of rows against a contrast set has more than _ROWS while it is no larger than a tile, and
# fewer, down to the least, to stay below the most elements.
_TILE_ELEMENTS = 1 << 18
_BLOCK_ELEMENTS = 1 << 22
_LEAST_ROWS = 32
# Terms of a product that are summed at a time where they point the same way, with anchors among
# themselves and against a set.
_OWN_STEP = 64
_SET_STEP = 128
# e^88 is the largest power of e in fp32.
_MAX_EXPONENT = 87.0


def is_exact(temperature: float, num_contrast: int) -> bool:
    """Whether no exponential of similarities of unit vectors leaves the range of fp32."""
    return 2 / temperature + math.log(max(num_contrast, 1)) < _MAX_EXPONENT


def sorted_info_nce(
    anchors: PixelSet,
    contrast: PixelSet | None,
    *,
    temperature: float,
    holds_anchors: bool,
    needs_gradient: tuple[bool, bool],
) -> KernelResult:
    """Value and gradient of the InfoNCE on the CPU.

    Args:
        anchors, contrast: fp32 or fp64; None contrasts the anchors with each other.
        temperature: `is_exact` for it.
        holds_anchors: as in `Term`.
        needs_gradient: of anchors, of contrast.
    """
    own = _order_by_class(anchors)
    if contrast is None:
        among = _AmongThemselves(own, temperature, needs_gradient[0])
        among.run()
        gradient = _scatter(among.gradient, own, anchors) if needs_gradient[0] else None
        return KernelResult(_total(among.losses), among.num_valid, gradient, None)
    other = _order_by_class(contrast)
    against = _AgainstSet(own, other, temperature, needs_gradient)
    against.run(own_columns=_own_columns(own, other) if holds_anchors else None)
    return KernelResult(
        _total(against.losses),
        against.num_valid,
        _scatter(against.d_anchors, own, anchors) if needs_gradient[0] else None,
        _scatter(against.d_contrast, other, contrast) if needs_gradient[1] else None,
    )


def _total(losses: Tensor) -> Tensor:
    """Their sum, in fp64: the mean is then rounded once."""
    return losses.sum(dtype=torch.float64)


class _Ordered(NamedTuple):
    """The rows of a set in the order of their classes, without those of negative label.

    Attributes:
        rows: (N, D).
        order: (N,) int64, index of each row in the set; None where the set was in order.
        classes: (k,) the classes that occur, ascending.
        starts: (k + 1,) first row of each class, and N.
    """

    rows: Tensor
    order: np.ndarray | None
    classes: np.ndarray
    starts: np.ndarray


def _order_by_class(samples: PixelSet) -> _Ordered:
    rows = samples.embeddings
    if samples.class_counts is not None:
        counts = np.asarray(samples.class_counts)
        classes = np.flatnonzero(counts)
        return _Ordered(rows, None, classes, np.concatenate([[0], np.cumsum(counts[classes])]))
    values = samples.labels.numpy()
    order = np.argsort(values, kind="stable")
    order = order[np.searchsorted(values[order], 0) :]
    classes, firsts = np.unique(values[order], return_index=True)
    starts = np.append(firsts, len(order))
    if len(order) == len(values) and (np.diff(order) == 1).all():
        return _Ordered(rows, None, classes, starts)
    return _Ordered(rows[torch.from_numpy(order)], order, classes, starts)


def _own_columns(anchors: _Ordered, contrast: _Ordered) -> np.ndarray:
    """(A,) where each anchor stands among the ordered contrast samples that it leads."""
    source = np.arange(len(anchors.rows)) if anchors.order is None else anchors.order
    if contrast.order is None:
        return source
    columns = np.empty(int(contrast.order.max(initial=-1)) + 1, dtype=np.int64)
    columns[contrast.order] = np.arange(len(contrast.order))
    return columns[source]


def _scatter(gradient: Tensor, ordered: _Ordered, samples: PixelSet) -> Tensor:
    """Brings the gradient of ordered rows into the order of the set."""
    if ordered.order is None:
        return gradient
    whole = torch.zeros_like(samples.embeddings)
    return whole.index_copy_(0, torch.from_numpy(ordered.order), gradient)


class _Block(NamedTuple):
    """Rows `start` to `stop` of ordered samples: whole classes, or part of one class.

    Attributes:
        class_start, class_stop: the rows of its classes, of which a single one may have others too.
        first, last: its classes, as positions among those that occur; `last` is not one of them.
    """

    start: int
    stop: int
    class_start: int
    class_stop: int
    first: int
    last: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)

    @property
    def is_mixed(self) -> bool:
        return self.last - self.first > 1

    @property
    def is_whole(self) -> bool:
        return (self.start, self.stop) == (self.class_start, self.class_stop)


def _blocks(starts: np.ndarray, max_rows: int, mixed_rows: int) -> list[_Block]:
    """Divides ordered samples into blocks.

    Args:
        starts: first row of each class, and the number of rows.
        max_rows: about the most rows of a block.
        mixed_rows: about the most rows of a block of several classes.
    """
    sizes = np.diff(starts)
    if len(sizes) == 0:
        return []
    alone = sizes > mixed_rows // 2
    window = starts[:-1] // mixed_rows
    opens = np.ones(len(sizes), dtype=bool)
    opens[1:] = (window[1:] != window[:-1]) | alone[1:] | alone[:-1]
    firsts = np.flatnonzero(opens)
    lasts = np.append(firsts[1:], len(sizes))
    blocks = []
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        start, stop = int(starts[first]), int(starts[last])
        # Up to half as many rows again are better than two halves.
        parts = math.ceil((stop - start) / (1.5 * max_rows)) if last - first == 1 else 1
        edges = [start + (stop - start) * part // parts for part in range(parts + 1)]
        blocks += [
            _Block(low, high, start, stop, first, last)
            for low, high in zip(edges[:-1], edges[1:], strict=True)
        ]
    return blocks


def _stripes(blocks: list[_Block]) -> list[list[_Block]]:
    """Joins consecutive blocks of whole classes, as long as they have no more than 1.5 _ROWS."""
    stripes: list[list[_Block]] = []
    for block in blocks:
        last = stripes[-1] if stripes else []
        rows = block.stop - last[0].start if last else 0
        if last and rows <= 1.5 * _ROWS and last[-1].is_whole and block.is_whole:
            last.append(block)
        else:
            stripes.append([block])
    return stripes


class _Positives(NamedTuple):
    """Where the positives of the anchors of a mixed block stand.

    Attributes:
        columns: (R, P) int64; surplus entries repeat the first one, which is no negative as long as
            there is a positive.
        present: (R, P) 1 for a positive, 0 for a surplus entry and for the anchor itself.
        weights: (R, 1) one over the number of positives; 1 where there are none.
    """

    columns: Tensor
    present: Tensor
    weights: Tensor


def _find_positives(
    segments: np.ndarray, sizes: np.ndarray, own_columns: np.ndarray | None, dtype: torch.dtype
) -> _Positives:
    """Looks up the positives of R anchors of k classes.

    Args:
        segments: (k, 2) first column and number of columns of each class.
        sizes: (k,) number of anchors of each class, R in all.
        own_columns: (R,) the column of the anchor itself; None where it has none.
    """
    starts, counts = segments[:, :1], segments[:, 1:]
    rank = np.arange(counts.max(initial=0))
    there = rank < counts
    columns = np.repeat(np.where(there, starts + rank, starts), sizes, axis=0)
    present = np.repeat(there.astype(np.float32), sizes, axis=0)
    num_positives = counts
    if own_columns is not None:
        present[np.arange(len(present)), own_columns - columns[:, 0]] = 0
        num_positives = counts - 1
    weights = np.repeat(1 / np.maximum(num_positives, 1), sizes, axis=0)
    return _Positives(
        torch.from_numpy(columns),
        torch.from_numpy(present).to(dtype),
        torch.from_numpy(weights).to(dtype),
    )


def _softplus_and_sigmoid(exponentials: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + e) and e / (1 + e), elementwise; the second overwrites e."""
    return exponentials.log1p(), exponentials.div_(exponentials + 1)


def _add_in_steps(
    target: Tensor, weights: Tensor, factor: Tensor, step: int, scale: float = 1.0
) -> None:
    """target += scale * weights @ factor, for weights that hold positives.

    Their many terms point the same way, and would lose digits to the growing sum one by one, so
    `step` at a time are summed.
    """
    for start in range(0, factor.shape[0], step):
        terms = slice(start, start + step)
        target.addmm_(weights[:, terms], factor[terms], alpha=scale)


class _AmongThemselves:
    """Anchors against each other, by the upper triangle of the similarities."""

    def __init__(self, samples: _Ordered, temperature: float, needs_gradient: bool) -> None:
        rows = samples.rows
        sizes = np.diff(samples.starts)
        self.rows = rows
        self.starts = samples.starts
        self.sharpness = 1 / temperature
        self.needs_gradient = needs_gradient
        self.losses = rows.new_zeros(len(rows))
        self.num_valid = rows.new_full((), int(sizes[sizes > 1].sum()))
        self.gradient = torch.zeros_like(rows) if needs_gradient else rows.new_zeros(0)
        # Apart until the end, so that the many small terms of the gradient are added up first.
        self._attraction = torch.zeros_like(self.gradient)
        self._sums = rows.new_zeros(len(rows))  # e^n_i
        self._pushes = rows.new_zeros(len(rows))
        self._weights = rows.new_zeros(len(rows))  # w_i

    def run(self) -> None:
        if len(self.starts) < 3:  # no second class, no negative: loss and gradient are 0
            return
        few = len(self.rows) <= _FEW_ROWS
        stripes = _stripes(_blocks(self.starts, _ROWS, _FEW_ROWS if few else _MIXED_ROWS))
        tiles = _TileCache(max(stripe[-1].stop - stripe[0].start for stripe in stripes), self.rows)
        open_blocks: list[_Block] = []
        for stripe in stripes:
            self._meet_later_classes(stripe, tiles)
            open_blocks += stripe
            stop = stripe[-1].class_stop
            if stripe[-1].stop < stop:
                continue
            # All similarities of these classes are in their sums.
            if len(stripe) == 1 and not stripe[0].is_mixed:
                self._attract_in_class(open_blocks)
            else:
                for block in stripe:
                    if block.is_mixed:
                        self._attract_in_mixed(block)
                    else:
                        self._attract_in_class([block])
            open_blocks = []
            if self.needs_gradient:
                for tile in tiles.take_until(stop):
                    self._repel(tile, tiles)
        if self.needs_gradient:
            self.gradient.add_(self._attraction).mul_(self.sharpness)

    def _similarities(
        self, rows: slice, columns: slice, out: Tensor, sharpness: float | None = None
    ) -> Tensor:
        """s_ij, or times another sharpness than 1 / temperature."""
        sharpness = self.sharpness if sharpness is None else sharpness
        return torch.addmm(
            out, self.rows[rows], self.rows[columns].T, beta=0, alpha=sharpness, out=out
        )

    def _meet_later_classes(self, stripe: list[_Block], tiles: _TileCache) -> None:
        """Adds the exponentials of a stripe's negatives in later classes to the sums of both."""
        rows = slice(stripe[0].start, stripe[-1].stop)
        for columns in tiles.columns(stripe[-1].class_stop):
            self._meet(rows, columns, tiles)
        for block in stripe[:-1]:
            self._meet(block.rows, slice(block.stop, rows.stop), tiles)

    def _meet(self, rows: slice, columns: slice, tiles: _TileCache) -> None:
        tile = tiles.new(rows, columns, keep=self.needs_gradient)
        self._similarities(rows, columns, tile.values).exp_()
        self._sums[rows].add_(tile.values.sum(dim=1))
        self._sums[columns].add_(tile.values.sum(dim=0))

    def _attract_in_class(self, blocks: list[_Block]) -> None:
        """Losses and gradients of the positives of one class, which the blocks make up."""
        start, stop = blocks[0].class_start, blocks[-1].class_stop
        weight = 1 / max(stop - start - 1, 1)
        for number, block in enumerate(blocks):
            for other in blocks[number:]:
                self._attract(block.rows, other.rows, weight)
        self.losses[start:stop].mul_(weight)
        self._weights[start:stop] = self._pushes[start:stop] * weight / self._sums[start:stop]

    def _attract(self, rows: slice, columns: slice, weight: float) -> None:
        """Positives between two blocks of one class, seen from either; or within one block."""
        inverse = self.rows.new_empty(rows.stop - rows.start, columns.stop - columns.start)
        self._similarities(rows, columns, inverse, -self.sharpness).exp_()
        within = rows == columns
        gaps = inverse * self._sums[rows, None]
        if within:
            gaps.fill_diagonal_(0)
        losses, sigmoids = _softplus_and_sigmoid(gaps)
        self.losses[rows].add_(losses.sum(dim=1))
        self._pushes[rows].add_(sigmoids.sum(dim=1))
        if within:
            pull = sigmoids + sigmoids.T
        else:
            losses, others = _softplus_and_sigmoid(inverse.mul_(self._sums[columns]))
            self.losses[columns].add_(losses.sum(dim=0))
            self._pushes[columns].add_(others.sum(dim=0))
            pull = sigmoids.add_(others)
        if not self.needs_gradient:
            return
        _add_in_steps(self._attraction[rows], pull, self.rows[columns], _OWN_STEP, -weight)
        if not within:
            _add_in_steps(self._attraction[columns], pull.T, self.rows[rows], _OWN_STEP, -weight)

    def _attract_in_mixed(self, block: _Block) -> None:
        """All pairs within a block of several whole classes."""
        rows = block.rows
        number = block.stop - block.start
        sizes = np.diff(self.starts[block.first : block.last + 1])
        starts = self.starts[block.first : block.last] - block.start
        positives = _find_positives(
            np.stack([starts, sizes], axis=1), sizes, np.arange(number), self.rows.dtype
        )
        similarities = self._similarities(rows, rows, self.rows.new_empty(number, number))
        gaps = similarities.gather(1, positives.columns).neg_().exp_()
        exponentials = similarities.exp_().scatter_(1, positives.columns, 0)
        sums = self._sums[rows].add_(exponentials.sum(dim=1))[:, None]
        gaps.mul_(sums).mul_(positives.present)
        losses, pull = _softplus_and_sigmoid(gaps)
        pull.mul_(positives.weights)
        self.losses[rows] = losses.sum(dim=1) * positives.weights[:, 0]
        weights = pull.sum(dim=1, keepdim=True) / sums
        self._weights[rows] = weights[:, 0]
        if self.needs_gradient:
            d_similarities = exponentials.mul_(weights)
            # Surplus entries add 0 to a column that another entry may have written.
            d_similarities.scatter_add_(1, positives.columns, pull.neg_())
            symmetric = d_similarities + d_similarities.T
            _add_in_steps(self._attraction[rows], symmetric, self.rows[rows], _OWN_STEP)

    def _repel(self, tile: _Tile, tiles: _TileCache) -> None:
        """Gradients of the negatives of a tile, for its rows and its columns."""
        rows, columns = tile.rows, tile.columns
        if not tile.is_kept:
            tile = tiles.again(tile)
            self._similarities(rows, columns, tile.values).exp_()
        factors = tiles.scratch(tile)
        torch.add(self._weights[rows, None], self._weights[columns], out=factors)
        d_similarities = tile.values.mul_(factors)
        self.gradient[rows].addmm_(d_similarities, self.rows[columns])
        self.gradient[columns].addmm_(d_similarities.T, self.rows[rows])
        tiles.release(tile)


class _Tile(NamedTuple):
    """Exponentials of the similarities of a block of rows with some columns.

    Attributes:
        values: (R, Q), a view of `memory`.
        is_kept: whether the values will still be there when the tile is taken.
    """

    rows: slice
    columns: slice
    values: Tensor
    memory: Tensor
    is_kept: bool


class _TileCache:
    """Tiles that wait until all their columns are complete, in a limited number of buffers."""

    def __init__(self, most_rows: int, like: Tensor) -> None:
        all_fit = len(like) ** 2 * like.element_size() <= _CACHE_BYTES
        self._step = min(_WIDE_COLUMNS if all_fit else _COLUMNS, len(like))
        self._num_columns = len(like)
        self._like = like
        self._max_elements = max_elements = most_rows * self._step
        self._buffers_left = _CACHE_BYTES // (max_elements * like.element_size())
        self._free: list[Tensor] = []
        self._passing = like.new_empty(max_elements)
        self._scratch = like.new_empty(max_elements)
        self._waiting: dict[int, list[_Tile]] = defaultdict(list)
        self._taken = 0

    def columns(self, start: int) -> list[slice]:
        """The columns from `start` on, divided where all rows divide them."""
        step = self._step
        edges = [start, *range((start // step + 1) * step, self._num_columns, step)]
        edges = [edge for edge in edges if edge < self._num_columns] + [self._num_columns]
        return [slice(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]

    def new(self, rows: slice, columns: slice, keep: bool) -> _Tile:
        """An uninitialised tile; one to `keep` waits for `take_until`."""
        memory = self._buffer(columns.stop) if keep else None
        is_kept = memory is not None
        tile = self._tile(rows, columns, self._passing if memory is None else memory, is_kept)
        if keep:
            self._waiting[columns.stop].append(tile)
        return tile

    def take_until(self, column: int) -> list[_Tile]:
        """The waiting tiles whose columns end at `column` or before."""
        ready = [stop for stop in self._waiting if stop <= column]
        return [tile for stop in ready for tile in self._waiting.pop(stop)]

    def again(self, tile: _Tile) -> _Tile:
        """Memory to compute anew a tile that was not kept."""
        return self._tile(tile.rows, tile.columns, self._passing, is_kept=False)

    def scratch(self, tile: _Tile) -> Tensor:
        """Uninitialised memory of the shape of a tile, until the next call."""
        return self._scratch[: tile.values.numel()].view_as(tile.values)

    def release(self, tile: _Tile) -> None:
        """Gives the memory of a taken tile to others."""
        if tile.is_kept:
            self._free.append(tile.memory)

    def _tile(self, rows: slice, columns: slice, memory: Tensor, is_kept: bool) -> _Tile:
        shape = rows.stop - rows.start, columns.stop - columns.start
        return _Tile(rows, columns, memory[: shape[0] * shape[1]].view(shape), memory, is_kept)

    def _buffer(self, stop: int) -> Tensor | None:
        """Memory for a tile that waits for column `stop`; None if there is no better use of it."""
        if self._free:
            return self._free.pop()
        if self._buffers_left:
            self._buffers_left -= 1
            return self._like.new_empty(self._max_elements)
        # Who waits longest makes room: that keeps the most tiles in all.
        kept = [column for column, tiles in self._waiting.items() if tiles and tiles[-1].is_kept]
        if not kept or max(kept) <= stop:
            return None
        longest = self._waiting[max(kept)]
        tile = longest.pop()
        longest.insert(0, tile._replace(is_kept=False))
        return tile.memory


class _AgainstSet:
    """Anchors against another set, a block of anchors at a time."""

    def __init__(
        self,
        anchors: _Ordered,
        contrast: _Ordered,
        temperature: float,
        needs_gradient: tuple[bool, bool],
    ) -> None:
        rows, columns = anchors.rows, contrast.rows
        self.rows = rows
        self.columns = columns
        self.starts = anchors.starts
        self.sharpness = 1 / temperature
        self.needs_gradient = needs_gradient
        self.losses = rows.new_zeros(len(rows))
        self.num_valid = rows.new_zeros(())
        self.d_anchors = torch.zeros_like(rows) if needs_gradient[0] else rows.new_zeros(0)
        self.d_contrast = torch.zeros_like(columns) if needs_gradient[1] else rows.new_zeros(0)
        # The segment of columns of each of the anchors' classes, of length 0 for an absent one.
        found_at = np.searchsorted(contrast.classes, anchors.classes)
        found_at = np.minimum(found_at, max(len(contrast.classes) - 1, 0))
        if len(contrast.classes) == 0:
            self._segments = np.zeros((len(anchors.classes), 2), dtype=np.int64)
            return
        found = contrast.classes[found_at] == anchors.classes
        sizes = np.where(found, np.diff(contrast.starts)[found_at], 0)
        self._segments = np.stack([contrast.starts[found_at], sizes], axis=1)

    def run(self, own_columns: np.ndarray | None) -> None:
        """Visits all anchors.

        Args:
            own_columns: (A,) the column of each anchor itself; None where the set has none of them.
        """
        least = 1 if own_columns is None else 2
        sizes = np.diff(self.starts)
        self.num_valid.fill_(int(sizes[self._segments[:, 1] >= least].sum()))
        if len(self.columns):
            max_rows = max(_ROWS, _TILE_ELEMENTS // len(self.columns))
            max_rows = max(_LEAST_ROWS, min(max_rows, _BLOCK_ELEMENTS // len(self.columns)))
            for block in _blocks(self.starts, max_rows, max_rows):
                self._visit(block, None if own_columns is None else own_columns[block.rows])
        for gradient in (self.d_anchors, self.d_contrast):
            gradient.mul_(self.sharpness)

    def _visit(self, block: _Block, own_columns: np.ndarray | None) -> None:
        rows = block.rows
        sizes = np.diff(self.starts[block.first : block.last + 1])
        if not block.is_mixed:
            sizes[:] = block.stop - block.start
        segments = self._segments[block.first : block.last]
        positives = _find_positives(segments, sizes, own_columns, self.rows.dtype)
        similarities = self.rows.new_empty(block.stop - block.start, len(self.columns))
        torch.addmm(
            similarities,
            self.rows[rows],
            self.columns.T,
            beta=0,
            alpha=self.sharpness,
            out=similarities,
        )
        gaps = similarities.gather(1, positives.columns).neg_().exp_()
        exponentials = similarities.exp_().scatter_(1, positives.columns, 0)
        sums = exponentials.sum(dim=1, keepdim=True)
        gaps.mul_(sums).mul_(positives.present)
        losses, pull = _softplus_and_sigmoid(gaps)
        pull.mul_(positives.weights)
        self.losses[rows] = losses.sum(dim=1) * positives.weights[:, 0]
        if not any(self.needs_gradient):
            return
        # Without a negative the sum is 0, and so is every gradient.
        weights = pull.sum(dim=1, keepdim=True) / sums.clamp(min=torch.finfo(sums.dtype).tiny)
        d_similarities = exponentials.mul_(weights)
        d_similarities.scatter_add_(1, positives.columns, pull.neg_())
        if self.needs_gradient[0]:
            _add_in_steps(self.d_anchors[rows], d_similarities, self.columns, _SET_STEP)
        if self.needs_gradient[1]:
            _add_in_steps(self.d_contrast, d_similarities.T, self.rows[rows], _SET_STEP)

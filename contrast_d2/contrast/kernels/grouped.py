"""All InfoNCE terms of a step on an NVIDIA GPU: a few launches, whatever the number of terms.

The equations are those of `terms`. Each set of embeddings is copied once, in 16 bits, and every
kernel works on all terms: a table tells each program which rows it owns and which tiles of columns
it visits.

1. `pack` copies the sets; one that is fp16 already and gets no gradient is read where it lies.
2. `negatives` sums e^(s - 1/temperature) over the negatives of each anchor. Unit vectors need no
   running maximum.
3. `positives` sums the losses, their slopes and the number of positives, and `coefficients` what
   the programs found. Tiles that share no class with the rows are skipped.
4. `gradient`, in the backward pass, owns rows and visits all that they meet in any term, as anchors
   or as contrast samples, and `add_up` adds what its programs found.

The table is made from the sizes of the sets alone, so that the host never waits. There are no
atomic additions: equal inputs give equal results.

Under autocast, products are those of fp16. Otherwise rows and weights stand in two parts of fp16,
which keeps them as exact as products of fp32.

Shape letters: S sets, N rows of one, D embedding width, T terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import e, log2
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ..sets import PixelSet, refuse_second_derivative
from . import grouped_triton as kernels
from .triton_tools import is_usable, launch

if TYPE_CHECKING:
    from ..terms import Side, Term

# Sets begin at multiples of this, which every block and tile divides.
_ALIGN = 128
# Programs per multiprocessor: enough to even out the last round, and few for what they write.
_PROGRAMS_PER_PROCESSOR = 4
_MAX_WIDTH = 512
# Below, the sum of e^(s - 1/temperature) leaves the range of fp32.
_MIN_TEMPERATURE = 0.025


class Shape(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        rows, columns: of the block that a program owns, and of a tile.
        piece: elements of the width that are multiplied at a time.
        out: elements of the gradient that a program owns.
        warps, stages: of a program, and of its software pipeline.
    """

    rows: int
    columns: int
    piece: int
    out: int
    warps: int
    stages: int = 2


class Variant(NamedTuple):
    """A kernel as it is compiled: for a width, rows in one part or two, and a shape."""

    kernel: str
    width: int
    split: bool
    shape: Shape | None

    @property
    def constants(self) -> dict[str, Any]:
        """Arguments that are compiled into the kernel."""
        if self.kernel == "coefficients":
            return {}
        values: dict[str, Any] = {"WIDTH": self.width}
        if self.kernel != "add_up":
            values["SPLIT"] = self.split
        if self.shape is not None:
            shape = self.shape
            values |= {"PIECE": shape.piece, "R": shape.rows, "Q": shape.columns}
            if self.kernel == "gradient":
                values["OUT"] = shape.out
        return values

    @property
    def options(self) -> dict[str, int]:
        """What else its compilation depends on."""
        if self.shape is None:
            return {}
        return {"num_warps": self.shape.warps, "num_stages": self.shape.stages}


# On Hopper, by kernel, split and width: for little work and for much.
_HOPPER = {
    ("negatives", False): {
        64: [Shape(64, 64, 64, 64, 4), Shape(128, 128, 64, 64, 8)],
        128: [Shape(64, 64, 128, 128, 4), Shape(128, 128, 128, 128, 8)],
        256: [Shape(64, 64, 256, 256, 4), Shape(128, 128, 256, 256, 8)],
        512: [Shape(64, 64, 64, 512, 4), Shape(128, 128, 64, 512, 8, 3)],
    },
    ("negatives", True): {
        64: [Shape(64, 64, 64, 64, 4), Shape(128, 128, 64, 64, 8)],
        128: [Shape(64, 64, 128, 128, 4), Shape(128, 128, 128, 128, 8)],
        256: [Shape(64, 64, 256, 256, 4), Shape(128, 64, 64, 256, 8, 3)],
        512: [Shape(64, 64, 64, 512, 4), Shape(128, 128, 64, 512, 8, 3)],
    },
    ("gradient", False): {
        64: [Shape(64, 64, 64, 64, 4), Shape(128, 64, 64, 64, 8)],
        128: [Shape(64, 64, 128, 128, 4), Shape(128, 64, 128, 128, 8)],
        256: [Shape(64, 32, 256, 256, 4), Shape(128, 64, 256, 256, 8)],
        512: [Shape(64, 32, 64, 256, 4), Shape(128, 32, 64, 256, 8)],
    },
    ("gradient", True): {
        64: [Shape(64, 64, 64, 64, 4), Shape(128, 64, 64, 64, 8)],
        128: [Shape(64, 32, 128, 128, 4), Shape(128, 32, 128, 128, 8)],
        256: [Shape(64, 32, 64, 128, 4), Shape(128, 32, 256, 256, 8)],
        512: [Shape(64, 32, 64, 128, 4), Shape(128, 32, 64, 128, 8)],
    },
}


def shapes(kernel: str, width: int, split: bool, capability: tuple[int, int]) -> list[Shape]:
    """The shapes of a kernel, for little work and for much, or one for both.

    No register is spilled in any of them. A warp owns 16 rows, whose weights then stay in its
    registers.

    Args:
        kernel: "negatives", "positives" or "gradient".
        width: of the rows, a power of two.
        split: whether rows stand in two parts.
        capability: of the GPU. Those of data centres since Hopper (9, 10) have 227 KB of shared
            memory for a program; others are given shapes that keep to 99 KB.
    """
    data_centre = capability[0] in (9, 10)
    piece, out = min(width, 64), min(width, 128)
    if kernel == "positives":
        wide = capability[0] == 10 or (capability[0] == 9 and not split)
        return [Shape(64, 64 if wide else 32, piece, width, 4)]
    if capability[0] == 9:
        return _HOPPER[kernel, split][width]
    if kernel == "negatives":
        few, many = Shape(64, 64, piece, width, 4), Shape(128, 64, piece, width, 8)
    else:
        if split and not data_centre and width > 64:
            piece = 32
        few, many = Shape(64, 32, piece, out, 4), Shape(128, 32, piece, out, 8)
    return [few, many] if data_centre else [few]


def variants(capability: tuple[int, int]) -> list[Variant]:
    """Everything that is ever compiled for a GPU."""
    found = []
    for width in (64, 128, 256, 512):
        for split in (False, True):
            found.append(Variant("pack", width, split, None))
            for kernel in ("negatives", "positives", "gradient"):
                for shape in shapes(kernel, width, split, capability):
                    found.append(Variant(kernel, width, split, shape))
        found.append(Variant("add_up", width, False, None))
    return [*found, Variant("coefficients", 0, False, None)]


def is_available(embeddings: Tensor, temperature: float) -> bool:
    """Whether `grouped_info_nce` can take such anchors, with what they are contrasted with.

    Args:
        embeddings: (A, D), of any A.
        temperature: of the term.
    """
    narrow = 1 <= embeddings.shape[1] <= _MAX_WIDTH
    return narrow and temperature >= _MIN_TEMPERATURE and is_usable(embeddings)


def grouped_info_nce(
    terms: Sequence[Term], sides: Sequence[Sequence[Side]]
) -> list[tuple[Tensor, Tensor]]:
    """Sums of the losses of all terms, without waiting for the device.

    Sets are told apart by their embeddings and labels. Embeddings are unit vectors, in fp32 or
    fp16; the sums are fp32. They cannot be differentiated twice.

    Args:
        terms: without `pairs`, of which `is_available` is true.
        sides: the contrast set of each. Where the term `holds_anchors`, they are the first rows of
            its first side.

    Returns:
        For each term the sum over its anchors of the mean loss over their positives, and the number
        of anchors that have a positive; 0-dim both.
    """
    results: dict[int, tuple[Tensor, Tensor]] = {}
    widths = [term.anchors.embeddings.shape[1] for term in terms]
    for width in sorted(set(widths)):
        chosen = [i for i, other in enumerate(widths) if other == width]
        plan = _Plan([terms[i] for i in chosen], [sides[i] for i in chosen], width)
        sums = _GroupedInfoNCE.apply(plan, *(x.embeddings for x in plan.sets))
        pairs = zip(*(values.unbind() for values in sums), strict=True)
        results.update(zip(chosen, pairs, strict=True))
    return [results[i] for i in range(len(terms))]


class _GroupedInfoNCE(Function):
    """(T,) sums of the losses of all terms, and of the anchors that have a positive."""

    @staticmethod
    def forward(ctx, plan: _Plan, *embeddings: Tensor) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[1:]
        ctx.run = _Run(plan, embeddings, needs_gradient)
        totals, valid = ctx.run.forward()
        # What is read in place must not change before the backward pass: PyTorch sees to that.
        kept = [x for x, here in zip(embeddings, ctx.run.in_place, strict=True) if here]
        ctx.save_for_backward(*ctx.run.buffers, *kept)
        ctx.run.buffers = ()
        ctx.mark_non_differentiable(valid)
        return totals, valid

    @staticmethod
    def backward(ctx, d_totals: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("info_nce")
        return None, *ctx.run.backward(d_totals.contiguous(), *ctx.saved_tensors[:6])


class _Visit(NamedTuple):
    """A set whose tiles are visited by the rows of another: an entry of the table.

    Attributes:
        owner: number of the term, or in the backward pass of the set, whose rows visit.
        columns: number of the set.
        term: whose similarities these are.
        flags: 1 where pairs of two classes are negatives, 2 where those of one are positives, 4
            where the rows of equal number are the same, and no pair.
        row_is_anchor, column_is_anchor: of the term.
    """

    owner: int
    columns: int
    term: int
    flags: int
    row_is_anchor: bool = True
    column_is_anchor: bool = False


_ROLES = {"both": 3, "negatives": 1, "positives": 2}


class _Plan:
    """Which sets there are, and which terms they meet in.

    Attributes:
        sets: each once.
        anchors: number of the set of each term.
        temperatures: of the terms.
        rectangles: (term, number of the contrast set, flags as in `_Visit`).
        width: D.
        split: whether rows stand in two parts.
    """

    def __init__(self, terms: Sequence[Term], sides: Sequence[Sequence[Side]], width: int) -> None:
        self.sets: list[PixelSet] = []
        numbers: dict[tuple[int, int], int] = {}

        def number(x: PixelSet) -> int:
            key = id(x.embeddings), id(x.labels)
            if key not in numbers:
                numbers[key] = len(self.sets)
                self.sets.append(x)
            return numbers[key]

        self.anchors = [number(term.anchors) for term in terms]
        self.temperatures = [term.temperature for term in terms]
        self.rectangles = [
            (t, number(side.set), _ROLES[side.role] + 4 * (term.holds_anchors and first == 0))
            for t, (term, part) in enumerate(zip(terms, sides, strict=True))
            for first, side in enumerate(part)
        ]
        self.width = width
        device = self.sets[0].embeddings.device
        self.split = not torch.is_autocast_enabled(device.type)

    def visits(self, flag: int) -> list[_Visit]:
        """What the anchors of each term visit to find their negatives (flag 1) or positives (2)."""
        return [_Visit(t, c, t, flags) for t, c, flags in self.rectangles if flags & flag]

    def gradient_visits(self, needs_gradient: Sequence[bool]) -> list[_Visit]:
        """What the rows of each set visit to find their gradients."""
        found = []
        for t, c, flags in self.rectangles:
            a = self.anchors[t]
            if needs_gradient[a]:
                found.append(_Visit(a, c, t, flags, True, a == c))
            if needs_gradient[c] and a != c:
                found.append(_Visit(c, a, t, flags, False, True))
        return sorted(found, key=lambda visit: visit.owner)


class _Work(NamedTuple):
    """The programs of a launch.

    Attributes:
        programs: (P, 8) their rows of the table: set and first row, first and last visit, first and
            last tile, where the results go, and the term.
        visits: (V, 8) set, first tile among those of the owner, tiles, term, flags.
        shares: (owners,) programs that share a block of rows.
        places: (owners,) where the results of each begin.
        size: of all results.
        shape: how the work is cut.
    """

    programs: np.ndarray
    visits: np.ndarray
    shares: np.ndarray
    places: np.ndarray
    size: int
    shape: Shape


def _blocks(rows: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The blocks of some sets, by the rows of each: number of the set, and of the first row."""
    counts = -(-rows // size)
    owner = np.repeat(np.arange(len(rows)), counts)
    return owner, (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * size


def _aligned(rows: np.ndarray) -> np.ndarray:
    return -(-rows // _ALIGN) * _ALIGN


def _starts(sizes: np.ndarray) -> np.ndarray:
    """Where each of several parts begins that stand one after the other."""
    return np.cumsum(sizes) - sizes


def _cut(
    sizes: np.ndarray,
    owners: np.ndarray,
    visits: Sequence[_Visit],
    shapes: Sequence[Shape],
    programs: int,
    results_per_row: int = 1,
) -> _Work:
    """Cuts the tiles that each block of rows visits into about equal shares.

    Args:
        sizes: (S,) rows of each set.
        owners: (owners,) number of the set that visits.
        visits: in the order of their owners.
        shapes: for little work and, if it leaves enough for all programs, for much.
        programs: how many there should be, at least.
        results_per_row: numbers that a program writes for each of its rows.
    """
    table = np.array(visits, dtype=np.int64).reshape(-1, 6)
    table = table[sizes[table[:, 1]] > 0]
    owner = table[:, 0]

    def tiles_of(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tiles of each visit, and those of each owner for each of its blocks."""
        tiles = -(-sizes[table[:, 1]] // shape.columns)
        lengths = np.bincount(owner, weights=tiles, minlength=len(owners)).astype(np.int64)
        return tiles, lengths, -(-sizes[owners] // shape.rows)

    few, many = shapes[0], shapes[-1]
    _, lengths, blocks = tiles_of(many)
    shape = many if lengths @ blocks >= programs else few
    tiles, lengths, blocks = tiles_of(shape)
    total = int(lengths @ blocks)
    length = max(1, total // programs)
    shares = -(-lengths // length)
    # The blocks of rows that visit the same tiles stand together, which then stay in the cache.
    counts = shares * blocks
    who = np.repeat(np.arange(len(owners)), counts)
    share, block = np.divmod(np.arange(len(who)) - np.repeat(_starts(counts), counts), blocks[who])
    begin, end = (part * lengths[who] // shares[who] for part in (share, share + 1))
    ends = np.cumsum(tiles)
    before = _starts(lengths)
    rows = _aligned(sizes[owners])
    places = _starts(shares * rows * results_per_row)
    entries = np.zeros((len(who), 8), dtype=np.int64)
    entries[:, 0], entries[:, 1] = owners[who], block * shape.rows
    entries[:, 2] = np.searchsorted(ends, before[who] + begin, side="right")
    entries[:, 3] = np.searchsorted(ends, before[who] + end, side="left") + 1
    entries[:, 4], entries[:, 5] = begin, end
    entries[:, 6] = places[who] + share * results_per_row * rows[who] + block * shape.rows
    entries[:, 7] = who
    visited = np.zeros((len(table), 8), dtype=np.int64)
    visited[:, 0], visited[:, 1] = table[:, 1], ends - tiles - before[owner]
    visited[:, 2], visited[:, 3], visited[:, 4] = tiles, table[:, 2], table[:, 3]
    visited[:, 5:7] = table[:, 4:6]
    size = int((shares * rows * results_per_row).sum())
    return _Work(entries, visited, shares, places, size, shape)


class _Table:
    """Collects parts of the table, of which each begins at a multiple of 16 bytes."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.size = 0

    def add(self, part: np.ndarray) -> int:
        """Appends a part, and says where it begins."""
        start = self.size
        self.parts.append(part)
        self.size += -(-part.size // 2) * 2
        return start

    def to(self, target: Tensor) -> None:
        """Fills a device tensor, in one copy."""
        host = torch.zeros(self.size, dtype=torch.int64, pin_memory=target.is_cuda)
        values, start = host.numpy(), 0
        for part in self.parts:
            values[start : start + part.size] = part.ravel()
            start += -(-part.size // 2) * 2
        target.copy_(host, non_blocking=True)


class _Run:
    """The launches of one step.

    Attributes:
        in_place: for each set, whether it is read where it lies.
        buffers: what the backward pass needs: table, rows, labels, their ranges,
            coefficients, and the bounds of what they say.
    """

    def __init__(
        self, plan: _Plan, embeddings: Sequence[Tensor], needs_gradient: Sequence[bool]
    ) -> None:
        self.device = embeddings[0].device
        self.split = plan.split
        self.width = max(64, 1 << (plan.width - 1).bit_length())
        self.num_terms = len(plan.anchors)
        self.needs_gradient = needs_gradient
        self.embed_dim = plan.width
        # Copies of what the kernels cannot read live until `pack` is launched.
        sources = [x.detach().contiguous() for x in embeddings]
        sources = [x if x.dtype in (torch.float32, torch.float16) else x.float() for x in sources]
        labels = [x.labels.long().contiguous() for x in plan.sets]
        self._sources = sources, labels
        self.sizes = sizes = np.array([len(x) for x in labels])
        self.in_place = [
            x.dtype == torch.float16
            and x.shape[1] == self.width
            and x.data_ptr() % 16 == 0
            and not needed
            and x.data_ptr() == original.data_ptr()
            for x, original, needed in zip(sources, embeddings, needs_gradient, strict=True)
        ]
        processors, capability = 1, (9, 0)
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            processors = properties.multi_processor_count
            capability = properties.major, properties.minor
        programs = processors * _PROGRAMS_PER_PROCESSOR
        anchors = np.array(plan.anchors)
        rows = _aligned(sizes)

        def cut(kernel: str, owners: np.ndarray, visits: list[_Visit], results: int = 1) -> _Work:
            forms = shapes(kernel, self.width, self.split, capability)
            return _cut(sizes, owners, visits, forms, programs, results)

        self.negatives = cut("negatives", anchors, plan.visits(1))
        self.positives = cut("positives", anchors, plan.visits(2), 3)
        self.gradient = cut("gradient", np.arange(len(sizes)), plan.gradient_visits(needs_gradient))

        # Coefficients of each term and anchor, behind a block of zeros for rows that are none.
        own_rows = rows[anchors]
        weights_at = _ALIGN + _starts(own_rows)
        self.num_weights = _ALIGN + int(own_rows.sum())
        visits = self.gradient.visits
        visits[:, 5:7] *= weights_at[visits[:, 3], None]

        table = _Table()
        entries = np.zeros((len(sizes), 10), dtype=np.int64)
        table.add(entries)
        zeros_at = table.add(np.zeros(self.width // 4, dtype=np.int64))
        terms = np.zeros((self.num_terms, 8), dtype=np.int64)
        sharpness = np.array([log2(e) / t for t in plan.temperatures], dtype=np.float32)
        terms[:, 0], terms[:, 1], terms[:, 2] = sharpness.view(np.int32), sizes[anchors], own_rows
        terms[:, 3], terms[:, 4] = self.negatives.places, self.negatives.shares
        terms[:, 5], terms[:, 6] = self.positives.places, self.positives.shares
        terms[:, 7] = weights_at
        self.terms_at = table.add(terms)
        self.works_at = [
            (table.add(work.programs), table.add(work.visits))
            for work in (self.negatives, self.positives, self.gradient)
        ]
        packed = np.stack(_blocks(rows, 32), axis=1)
        self.num_packed, self.packed_at = len(packed), table.add(packed)
        self._plan_sums(table, needs_gradient)

        self.num_rows = int(rows.sum())
        copied = np.where(self.in_place, 0, rows)
        copies = _empty(self.device, (1 + self.split, int(copied.sum()), self.width), torch.float16)
        values = _empty(self.device, (table.size,), torch.int64)
        row_bytes = 2 * self.width
        address, low = copies.data_ptr(), copies.nbytes // 2
        entries[:, 0] = address + _starts(copied) * row_bytes
        entries[:, 1] = entries[:, 0] + low
        entries[:, 2] = np.maximum(copied - 1, 0)
        entries[:, 3] = entries[:, 2]
        entries[:, 4] = _starts(rows)
        entries[:, 5] = [x.data_ptr() for x in labels]
        entries[:, 6], entries[:, 7] = sizes, plan.width
        entries[:, 8] = [x.data_ptr() for x in sources]
        entries[:, 9] = [1 if x.dtype == torch.float32 else 2 for x in sources]
        for number in np.flatnonzero(self.in_place):
            # Rounding took nothing: one row of zeros stands for all.
            zeros = values.data_ptr() + 8 * zeros_at
            entries[number, :4] = sources[number].data_ptr(), zeros, max(sizes[number] - 1, 0), 0
            entries[number, 9] = 0
        table.to(values)
        self.buffers: tuple[Tensor, ...] = (
            values,
            copies,
            _empty(self.device, (self.num_rows,), torch.int32),
            _empty(self.device, (self.num_rows // 16,), torch.int32),
            _empty(self.device, (3, self.num_weights)),
            _empty(self.device, (self.num_terms,)),
        )

    def _plan_sums(self, table: _Table, needs_gradient: Sequence[bool]) -> None:
        """Plans `add_up`, for the rows of sets that get a gradient."""
        needed = np.where(needs_gradient, self.sizes, 0)
        owner, start = _blocks(needed, 32)
        entries = np.zeros((len(owner), 8), dtype=np.int64)
        self.gradients_at = _starts(needed * self.embed_dim)
        entries[:, 0], entries[:, 1] = owner, start
        entries[:, 2] = self.gradient.places[owner]
        entries[:, 3] = _aligned(self.sizes)[owner]
        entries[:, 4] = self.gradient.shares[owner]
        entries[:, 5] = self.gradients_at[owner]
        self.num_sums, self.sums_at = len(owner), table.add(entries)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(T,) totals and valid anchors."""
        table, _, labels, ranges, weights, steepest = self.buffers
        sums = _empty(self.device, (self.negatives.size,))
        found = _empty(self.device, (self.positives.size,))
        results = _empty(self.device, (2, self.num_terms))
        sets = self.terms_at, labels, ranges
        self._launch(table, "pack", (self.num_packed,), None, self.packed_at, labels, ranges)
        work, places = self.negatives, self.works_at[0]
        self._launch(table, "negatives", (len(work.programs),), work.shape, *places, *sets, sums)
        work, places = self.positives, self.works_at[1]
        self._launch(
            table, "positives", (len(work.programs),), work.shape, *places, *sets, sums, found
        )
        outputs = weights, steepest, results, self.num_weights, self.num_terms
        self._launch(
            table, "coefficients", (self.num_terms,), None, self.terms_at, sums, found, *outputs
        )
        self._sources = ()
        return results[0], results[1]

    def backward(self, d_totals: Tensor, *buffers: Tensor) -> list[Tensor | None]:
        """The gradients of the embeddings of each set, (N, D); None where not needed."""
        table, _, labels, ranges, weights, steepest = buffers
        work = self.gradient
        shares = _empty(self.device, (work.size, self.width))
        sizes = np.where(self.needs_gradient, self.sizes, 0) * self.embed_dim
        gradients = _empty(self.device, (int(sizes.sum()),))
        sets = self.terms_at, d_totals, labels, ranges
        outputs = weights, steepest, shares, self.num_weights, self.num_terms
        grid = len(work.programs), self.width // work.shape.out
        self._launch(table, "gradient", grid, work.shape, *self.works_at[2], *sets, *outputs)
        self._launch(
            table, "add_up", (self.num_sums,), None, self.sums_at, labels, shares, gradients
        )
        parts = gradients.split(sizes.tolist())
        return [
            part.view(-1, self.embed_dim) if needed else None
            for part, needed in zip(parts, self.needs_gradient, strict=True)
        ]

    def _launch(
        self,
        table: Tensor,
        kernel: str,
        grid: tuple[int, ...],
        shape: Shape | None,
        *arguments: Any,
    ) -> None:
        variant = Variant(kernel, self.width, self.split, shape)
        constants = variant.constants | variant.options
        launch(getattr(kernels, kernel), grid, table, *arguments, **constants)


def _empty(device: torch.device, size: tuple[int, ...], dtype: torch.dtype = torch.float32):
    return torch.empty(size, dtype=dtype, device=device)

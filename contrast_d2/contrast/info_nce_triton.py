"""The InfoNCE on NVIDIA GPUs: value and gradient in linear memory, written in Triton.

The equations are those of `terms`. Similarities are computed block by block and thrown away, in
three passes:

1. n_i, the log-sum-exp over the negatives of each anchor, with a running maximum;
2. sums over the positives of each anchor. Pairs of blocks that share no class are skipped, which
   leaves little to do where the samples come sorted by class, and all where they do not;
3. the gradients. Row i of d total / d s needs n_i. Where the anchors meet each other, s_ij = s_ji,
   and what s_ji owes to n_j is added in the same visit.

Each program owns a block of rows and visits one of several equal shares of the columns, so that
there are programs enough for all multiprocessors, however few the rows. It writes its results to
memory of its own, and the shares are added up later: no atomic additions, equal inputs give equal
results.

Shape letters: A anchors, C contrast samples, D embedding width. In the kernels the rows are the
samples that a program owns (R in a block), the columns those it visits (Q in a block), S the
shares; WIDTH is D rounded up to a power of two, of which BLOCK_D are multiplied at a time.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are written in Triton's language, whose types Python's checkers do not know.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .sets import KernelResult, PixelSet

try:
    # Of PyTorch's wheels, only those for CUDA bring it.
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Programs per multiprocessor: enough to even out the last round. Since there are more shares only
# while there are few rows, it also bounds what the shares of a gradient take, for any A: 35 MB on a
# GPU of 132 multiprocessors, at D = 256 and 64 rows in a block.
_PROGRAMS_PER_PROCESSOR = 4
# Wider rows would leave the accumulator of a gradient fewer than the 16 rows that a product needs.
_MAX_WIDTH = 1024


def _jit(function: Callable) -> Any:
    """`triton.jit`, for kernels whose sizes change in every step: no compilation per divisor.

    Where there is no Triton nothing calls the kernels, and they stay plain functions.
    """
    if triton is None:
        return function
    return triton.jit(function, do_not_specialize=["num_rows", "num_columns"])


def is_available(embeddings: Tensor) -> bool:
    """Whether `triton_info_nce` can take such embeddings.

    It needs Triton 3 and an NVIDIA GPU of the Ampere generation or later. With TRITON_INTERPRET=1
    in the environment when Triton is first imported, its interpreter takes tensors of any device.

    Args:
        embeddings: (A, D), of any A.
    """
    if triton is None or int(triton.__version__.split(".")[0]) < 3:
        return False
    if embeddings.dtype == torch.float64 or embeddings.shape[1] > _MAX_WIDTH:
        return False
    if _is_interpreted():
        return True
    return (
        embeddings.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(embeddings.device) >= (8, 0)
    )


def triton_info_nce(
    anchors: PixelSet,
    contrast: PixelSet | None,
    *,
    temperature: float,
    holds_anchors: bool,
    needs_gradient: tuple[bool, bool],
) -> KernelResult:
    """Value and gradient of the InfoNCE, without waiting for the device.

    Products have the precision that PyTorch is set to: by default that of fp32, in three products
    of TF32 parts, else that of one product of TF32.

    Args:
        anchors, contrast: fp32; None contrasts the anchors with each other.
        temperature, holds_anchors: as in `Term`.
        needs_gradient: of anchors, of contrast.
    """
    within = contrast is None
    samples = anchors if contrast is None else contrast
    needs_d_anchors, needs_d_contrast = needs_gradient[0], needs_gradient[1] and not within
    if not len(anchors.labels) or not len(samples.labels):
        zero = anchors.embeddings.new_zeros(())
        return KernelResult(
            zero,
            zero.clone(),
            torch.zeros_like(anchors.embeddings) if needs_d_anchors else None,
            torch.zeros_like(samples.embeddings) if needs_d_contrast else None,
        )
    kernels = _Kernels(anchors.embeddings, temperature)
    rows = _prepared(anchors)
    columns = rows if within else _prepared(samples)
    exclude_self = within or holds_anchors

    lse = kernels.negatives(rows, columns)
    loss, pull, number = kernels.positives(rows, columns, lse, exclude_self)
    weight = number.clamp(min=1).reciprocal()
    of_anchors = lse, weight, pull * weight
    d_anchors = d_contrast = None
    if needs_d_anchors:
        d_anchors = kernels.gradient(
            rows,
            columns,
            of_anchors,
            rows_are_anchors=True,
            columns_are_anchors=within,
            exclude_self=exclude_self,
        )
    if needs_d_contrast:
        d_contrast = kernels.gradient(
            columns,
            rows,
            of_anchors,
            rows_are_anchors=False,
            columns_are_anchors=True,
            exclude_self=exclude_self,
        )
    return KernelResult(
        total=(loss * weight).sum(),
        num_valid=(number > 0).sum(dtype=loss.dtype),
        d_anchors=d_anchors,
        d_contrast=d_contrast,
    )


# ---- parts of the kernels


@_jit
def _share_of_columns(num_columns, BLOCK_Q: tl.constexpr):
    """Begin and end of the columns that this program visits."""
    blocks = tl.cdiv(tl.cdiv(num_columns, BLOCK_Q), tl.num_programs(1))
    begin = tl.program_id(1) * blocks * BLOCK_Q
    return begin, tl.minimum(begin + blocks * BLOCK_Q, num_columns)


@_jit
def _load(pointer, start, number, first, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D):
    """(BLOCK, BLOCK_D): samples from `start` on, at most `number` in all; their elements from
    `first` on. Zeros beyond."""
    rows, elements = tl.arange(0, BLOCK), first + tl.arange(0, BLOCK_D)
    # 64 bits for the one product that can pass 2^31.
    block = pointer + tl.cast(start, tl.int64) * D
    inside = (start + rows < number)[:, None] & (elements < D)[None, :]
    return tl.load(block + rows[:, None] * D + elements[None, :], mask=inside, other=0.0)


@_jit
def _load_labels(pointer, samples, number):
    """Labels of the samples; -1 beyond the last."""
    return tl.load(pointer + samples, mask=samples < number, other=-1)


@_jit
def _similarities(
    x,
    y,
    row_pointer,
    row_start,
    num_rows,
    column_pointer,
    column_start,
    num_columns,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(R, Q) scalar products over the temperature; `x` and `y` are the first BLOCK_D elements."""
    if BLOCK_D == WIDTH:
        return tl.dot(x, tl.trans(y), input_precision=PRECISION) * scale
    products = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
    # No tl.static_range: the compiler would keep all elements of the rows on the chip.
    for first in range(0, WIDTH, BLOCK_D):
        x = _load(row_pointer, row_start, num_rows, first, BLOCK_R, D, BLOCK_D)
        y = _load(column_pointer, column_start, num_columns, first, BLOCK_Q, D, BLOCK_D)
        # Tensor cores round each partial sum towards zero, so that long sums come out too small:
        # short ones are added here. Without the factor the compiler would join them again.
        products += scale * tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return products


@_jit
def _pairs(rows, columns, row_labels, column_labels, EXCLUDE_SELF: tl.constexpr):
    """(R, Q) masks of the positive and of the negative pairs."""
    same = row_labels[:, None] == column_labels[None, :]
    known = (row_labels >= 0)[:, None] & (column_labels >= 0)[None, :]
    positive = same & known
    if EXCLUDE_SELF:
        positive = positive & (rows[:, None] != columns[None, :])
    return positive, known & (row_labels[:, None] != column_labels[None, :])


@_jit
def _may_share_a_class(row_labels, column_labels):
    """Whether the ranges of the known labels overlap: never False where there is a positive."""
    row_low = tl.min(tl.where(row_labels < 0, 2147483647, row_labels), axis=0)
    column_low = tl.min(tl.where(column_labels < 0, 2147483647, column_labels), axis=0)
    row_high, column_high = tl.max(row_labels, axis=0), tl.max(column_labels, axis=0)
    return (row_low <= column_high) & (column_low <= row_high)


@_jit
def _sigmoid(x):
    """1 / (1 + e^-x), exact in both tails."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@_jit
def _softplus(x):
    """log(1 + e^x), exact in both tails."""
    small = tl.exp(-tl.abs(x))
    # log1p(e) without a library call: the rounding of 1 + e cancels in log(u) / (u - 1).
    above = 1.0 + small
    step = above - 1.0
    lost = step == 0.0
    log1p = tl.where(lost, small, tl.log(above) * (small / tl.where(lost, 1.0, step)))
    return tl.maximum(x, 0.0) + log1p


# ---- kernels


@_jit
def _negatives_kernel(
    row_pointer,
    row_label_pointer,
    column_pointer,
    column_label_pointer,
    lse_pointer,
    num_rows,
    num_columns,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes the (S, A) log-sum-exps of the anchors over the negatives of each share."""
    row_start = tl.program_id(0) * BLOCK_R
    rows = row_start + tl.arange(0, BLOCK_R)
    row_labels = _load_labels(row_label_pointer, rows, num_rows)
    x = _load(row_pointer, row_start, num_rows, 0, BLOCK_R, D, BLOCK_D)
    maximum = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    begin, end = _share_of_columns(num_columns, BLOCK_Q)
    for start in range(begin, end, BLOCK_Q):
        columns = start + tl.arange(0, BLOCK_Q)
        column_labels = _load_labels(column_label_pointer, columns, num_columns)
        y = _load(column_pointer, start, num_columns, 0, BLOCK_Q, D, BLOCK_D)
        logits = _similarities(
            x,
            y,
            row_pointer,
            row_start,
            num_rows,
            column_pointer,
            start,
            num_columns,
            scale,
            D,
            WIDTH,
            BLOCK_R,
            BLOCK_Q,
            BLOCK_D,
            PRECISION,
        )
        _, negative = _pairs(rows, columns, row_labels, column_labels, False)
        logits = tl.where(negative, logits, float("-inf"))
        higher = tl.maximum(maximum, tl.max(logits, axis=1))
        # As long as no negative was seen, -inf - -inf would be nan.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(maximum - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)
        maximum = higher
    found = total > 0
    lse = tl.where(found, maximum + tl.log(tl.where(found, total, 1.0)), float("-inf"))
    tl.store(lse_pointer + tl.program_id(1) * num_rows + rows, lse, mask=rows < num_rows)


@_jit
def _positives_kernel(
    row_pointer,
    row_label_pointer,
    column_pointer,
    column_label_pointer,
    lse_pointer,
    sums_pointer,
    num_rows,
    num_columns,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
):
    """Writes (3, S, A) sums over the positives of each share: softplus(n_i - s_ij), its derivative,
    and 1."""
    row_start = tl.program_id(0) * BLOCK_R
    rows = row_start + tl.arange(0, BLOCK_R)
    row_labels = _load_labels(row_label_pointer, rows, num_rows)
    lse = tl.load(lse_pointer + rows, mask=rows < num_rows, other=0.0)
    x = _load(row_pointer, row_start, num_rows, 0, BLOCK_R, D, BLOCK_D)
    loss = tl.zeros((BLOCK_R,), tl.float32)
    pull = tl.zeros((BLOCK_R,), tl.float32)
    number = tl.zeros((BLOCK_R,), tl.float32)
    begin, end = _share_of_columns(num_columns, BLOCK_Q)
    for start in range(begin, end, BLOCK_Q):
        columns = start + tl.arange(0, BLOCK_Q)
        column_labels = _load_labels(column_label_pointer, columns, num_columns)
        if _may_share_a_class(row_labels, column_labels):
            y = _load(column_pointer, start, num_columns, 0, BLOCK_Q, D, BLOCK_D)
            logits = _similarities(
                x,
                y,
                row_pointer,
                row_start,
                num_rows,
                column_pointer,
                start,
                num_columns,
                scale,
                D,
                WIDTH,
                BLOCK_R,
                BLOCK_Q,
                BLOCK_D,
                PRECISION,
            )
            positive, _ = _pairs(rows, columns, row_labels, column_labels, EXCLUDE_SELF)
            gap = lse[:, None] - logits
            loss += tl.sum(tl.where(positive, _softplus(gap), 0.0), axis=1)
            pull += tl.sum(tl.where(positive, _sigmoid(gap), 0.0), axis=1)
            number += tl.sum(tl.where(positive, 1.0, 0.0), axis=1)
    own = sums_pointer + tl.program_id(1) * num_rows + rows
    plane = tl.num_programs(1) * num_rows
    tl.store(own, loss, mask=rows < num_rows)
    tl.store(own + plane, pull, mask=rows < num_rows)
    tl.store(own + 2 * plane, number, mask=rows < num_rows)


@_jit
def _gradient_kernel(
    row_pointer,
    row_label_pointer,
    column_pointer,
    column_label_pointer,
    lse_pointer,
    weight_pointer,
    push_pointer,
    gradient_pointer,
    num_rows,
    num_columns,
    scale,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    ROWS_ARE_ANCHORS: tl.constexpr,
    COLUMNS_ARE_ANCHORS: tl.constexpr,
):
    """Writes the (S, rows, D) gradients of the rows from the columns of each share.

    With w = 1 / number of positives, p the mean of the derivatives over them, and n, all of an
    anchor: d total / d s is -w sigmoid(n - s) for a positive pair and p e^(s - n) for a negative.
    """
    row_start = tl.program_id(0) * BLOCK_R
    rows = row_start + tl.arange(0, BLOCK_R)
    row_labels = _load_labels(row_label_pointer, rows, num_rows)
    if ROWS_ARE_ANCHORS:
        row_lse = tl.load(lse_pointer + rows, mask=rows < num_rows, other=0.0)[:, None]
        row_weight = tl.load(weight_pointer + rows, mask=rows < num_rows, other=0.0)[:, None]
        row_push = tl.load(push_pointer + rows, mask=rows < num_rows, other=0.0)[:, None]
    x = _load(row_pointer, row_start, num_rows, 0, BLOCK_R, D, BLOCK_D)
    gradient = tl.zeros((BLOCK_R, WIDTH), tl.float32)
    begin, end = _share_of_columns(num_columns, BLOCK_Q)
    for start in range(begin, end, BLOCK_Q):
        columns = start + tl.arange(0, BLOCK_Q)
        column_labels = _load_labels(column_label_pointer, columns, num_columns)
        y = _load(column_pointer, start, num_columns, 0, BLOCK_Q, D, BLOCK_D)
        logits = _similarities(
            x,
            y,
            row_pointer,
            row_start,
            num_rows,
            column_pointer,
            start,
            num_columns,
            scale,
            D,
            WIDTH,
            BLOCK_R,
            BLOCK_Q,
            BLOCK_D,
            PRECISION,
        )
        positive, negative = _pairs(rows, columns, row_labels, column_labels, EXCLUDE_SELF)
        d_logits = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
        if ROWS_ARE_ANCHORS:
            d_logits += row_push * tl.exp(logits - row_lse)
        if COLUMNS_ARE_ANCHORS:
            inside = columns < num_columns
            column_lse = tl.load(lse_pointer + columns, mask=inside, other=0.0)[None, :]
            column_weight = tl.load(weight_pointer + columns, mask=inside, other=0.0)[None, :]
            column_push = tl.load(push_pointer + columns, mask=inside, other=0.0)[None, :]
            d_logits += column_push * tl.exp(logits - column_lse)
        d_logits = tl.where(negative, d_logits, 0.0)
        if _may_share_a_class(row_labels, column_labels):
            pull = tl.zeros((BLOCK_R, BLOCK_Q), tl.float32)
            if ROWS_ARE_ANCHORS:
                pull += row_weight * _sigmoid(row_lse - logits)
            if COLUMNS_ARE_ANCHORS:
                pull += column_weight * _sigmoid(column_lse - logits)
            d_logits = tl.where(positive, -pull, d_logits)
        if BLOCK_D < WIDTH:
            y = _load(column_pointer, start, num_columns, 0, BLOCK_Q, D, WIDTH)
        if PRECISION == "tf32x3":
            # As in the similarities, for sums over thousands of columns.
            gradient += scale * tl.dot(d_logits, y, input_precision=PRECISION)
        else:
            gradient = tl.dot(d_logits, y, gradient, input_precision=PRECISION)
    if PRECISION != "tf32x3":
        gradient = gradient * scale
    elements = tl.arange(0, WIDTH)
    share = tl.cast(tl.program_id(1), tl.int64) * num_rows
    own = gradient_pointer + (share + rows)[:, None] * D + elements[None, :]
    inside = (rows < num_rows)[:, None] & (elements < D)[None, :]
    tl.store(own, gradient, mask=inside)


# ---- launching them


class _Blocks(NamedTuple):
    """How a kernel cuts up its work: rows, columns and elements of the width at a time, powers of
    two from 16 on; warps; and stages of the software pipeline."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int


def _prepared(samples: PixelSet) -> PixelSet:
    """The set as the kernels read it: contiguous, with int32 labels."""
    return PixelSet(samples.embeddings.contiguous(), samples.labels.to(torch.int32).contiguous())


class _Kernels:
    """Launches the kernels for one width and temperature.

    Args:
        like: (N, D) embeddings of the width and on the device in question.
        temperature: divides the similarities.
    """

    def __init__(self, like: Tensor, temperature: float) -> None:
        self.scale = 1 / temperature
        self.precision = _input_precision()
        self.processors = 1
        if like.is_cuda:
            properties = torch.cuda.get_device_properties(like.device)
            self.processors = properties.multi_processor_count
        self.embed_dim = like.shape[1]
        self.width = max(16, triton.next_power_of_2(self.embed_dim))
        self.loss_blocks = _choose_blocks(self.width, gradient=False)
        self.gradient_blocks = _choose_blocks(self.width, gradient=True)

    def negatives(self, anchors: PixelSet, contrast: PixelSet) -> Tensor:
        """(A,) log-sum-exps over the negatives; -inf without any."""
        shares = self._num_shares(anchors, contrast, self.loss_blocks)
        lse_SA = anchors.embeddings.new_empty(shares, len(anchors.labels), dtype=torch.float32)
        self._launch(_negatives_kernel, self.loss_blocks, shares, anchors, contrast, lse_SA)
        return lse_SA.logsumexp(dim=0)

    def positives(
        self, anchors: PixelSet, contrast: PixelSet, lse: Tensor, exclude_self: bool
    ) -> Tensor:
        """(3, A) sums over the positives: the softplus, its derivative, and 1."""
        shares = self._num_shares(anchors, contrast, self.loss_blocks)
        sums_3SA = lse.new_empty(3, shares, len(lse))
        self._launch(
            _positives_kernel,
            self.loss_blocks,
            shares,
            anchors,
            contrast,
            lse,
            sums_3SA,
            EXCLUDE_SELF=exclude_self,
        )
        return sums_3SA.sum(dim=1)

    def gradient(
        self,
        rows: PixelSet,
        columns: PixelSet,
        of_anchors: tuple[Tensor, Tensor, Tensor],
        *,
        rows_are_anchors: bool,
        columns_are_anchors: bool,
        exclude_self: bool,
    ) -> Tensor:
        """Gradient (N, D) of the losses of the anchors among both with respect to the rows.

        `of_anchors`, (A,) each: n, 1 / number of positives, and the mean over them of the
        derivative of the softplus.
        """
        shares = self._num_shares(rows, columns, self.gradient_blocks)
        gradient_SND = of_anchors[0].new_empty(shares, *rows.embeddings.shape)
        self._launch(
            _gradient_kernel,
            self.gradient_blocks,
            shares,
            rows,
            columns,
            *of_anchors,
            gradient_SND,
            EXCLUDE_SELF=exclude_self,
            ROWS_ARE_ANCHORS=rows_are_anchors,
            COLUMNS_ARE_ANCHORS=columns_are_anchors,
        )
        return gradient_SND[0] if shares == 1 else gradient_SND.sum(dim=0)

    def _num_shares(self, rows: PixelSet, columns: PixelSet, blocks: _Blocks) -> int:
        programs = _PROGRAMS_PER_PROCESSOR * self.processors
        row_blocks = triton.cdiv(len(rows.labels), blocks.rows)
        return min(
            triton.cdiv(programs, row_blocks), triton.cdiv(len(columns.labels), blocks.columns)
        )

    def _launch(
        self,
        kernel: Any,
        blocks: _Blocks,
        shares: int,
        rows: PixelSet,
        columns: PixelSet,
        *tensors: Tensor,
        **constants: Any,
    ) -> None:
        num_rows, num_columns = len(rows.labels), len(columns.labels)
        # Triton launches on the current device, whichever the tensors are on.
        with torch.cuda.device_of(rows.embeddings):
            kernel[(triton.cdiv(num_rows, blocks.rows), shares)](
                *rows[:2],
                *columns[:2],
                *tensors,
                num_rows,
                num_columns,
                self.scale,
                D=self.embed_dim,
                WIDTH=self.width,
                BLOCK_R=blocks.rows,
                BLOCK_Q=blocks.columns,
                BLOCK_D=blocks.width,
                PRECISION=self.precision,
                num_warps=blocks.warps,
                num_stages=blocks.stages,
                **constants,
            )


def _choose_blocks(width: int, *, gradient: bool) -> _Blocks:
    """Sizes that fit the registers and the shared memory of a multiprocessor.

    Three products of TF32 parts need twice the room for each factor: both sets are read piece by
    piece, from the L2 cache, which large blocks relieve. The gradient, rows x width, stays in
    registers: 16,384 floats are 64 for each thread of eight warps, and leave it 190 for the block
    of similarities.

    Args:
        width: D rounded up to a power of two.
        gradient: for the kernel of the gradient.
    """
    rows, columns = 128, 64
    if gradient:
        rows, columns = max(16, min(64, 16384 // width)), max(16, min(32, 8192 // width))
    return _Blocks(rows=rows, columns=columns, width=min(width, 32), warps=8, stages=2)


def _input_precision() -> str:
    """The kind of fp32 product that PyTorch is set to, in Triton's words."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # since PyTorch 2.9, where the other question may raise
        exact = matmul.fp32_precision in ("none", "ieee")
    else:
        exact = torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def _is_interpreted() -> bool:
    return not isinstance(_negatives_kernel, triton.JITFunction)

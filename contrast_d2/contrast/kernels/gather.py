"""Reading drawn pixels off feature maps, and writing their gradients back.

On a CPU the maps are read one after the other, plane by plane. On an NVIDIA GPU with Triton one
launch reads all maps, and one writes all their gradients, after these are filled with zeros.

Shape letters: S maps, B images, C channels, h w a map, N pixels read off it, R rows of a program.
"""

# pyright: reportOptionalMemberAccess=false, reportInvalidTypeForm=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Kernels are written in Triton's language, whose types Python's checkers do not know.
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ..sets import PixelDraw, at_least_fp32, refuse_second_derivative
from .triton_tools import is_usable, jit, launch, tl, upload


def gather_pixels(maps: Tensor, image: Tensor, pixel: Tensor, *, distinct: bool = False) -> Tensor:
    """Reads the channels of drawn pixels, with one scatter into the map's gradient.

    The result cannot be differentiated twice.

    Args:
        maps: (B, C, h, w), in any memory format, which the gradient shares.
        image: (N,) int64, index in 0..B-1 of each pixel.
        pixel: (N,) int64, row-major index in 0..h*w-1 of each pixel.
        distinct: no pixel is drawn twice, so that gradients are written and not added up. This is
            not checked.

    Returns:
        (N, C), of the same dtype, connected to the graph even where N = 0.
    """
    pixels = _Pixels(image, pixel, (len(image),) if distinct else ())
    return _Gather.apply([pixels], False, maps)[0]


def gather_embeddings(
    embeddings: Tensor, image: Tensor, pixel: Tensor, *, distinct: bool = False
) -> Tensor:
    """Reads pixels off an embedding map (B, D, h, w), as `gather_pixels`, at length 1: (N, D)."""
    pixels = _Pixels(image, pixel, (len(image),) if distinct else ())
    return _Gather.apply([pixels], True, embeddings)[0]


def gather_draws(
    maps: Sequence[Tensor], draws: Sequence[Sequence[PixelDraw]], *, normalize: bool
) -> tuple[Tensor, ...]:
    """Reads the draws from several maps together, as `gather_pixels` or `gather_embeddings` do.

    Args:
        maps: S maps (B, C, h, w).
        draws: from each map, in none of which a pixel is twice.
        normalize: bring the rows to length 1.

    Returns:
        S tensors (N, C), the rows of one draw after those of the other.
    """
    pixels = [
        _Pixels(
            torch.cat([x.image for x in of_map]),
            torch.cat([x.pixel for x in of_map]),
            tuple(len(x.image) for x in of_map),
        )
        for of_map in draws
    ]
    return _Gather.apply(pixels, normalize, *maps)


class _Pixels(NamedTuple):
    """Pixels of a map.

    Attributes:
        image, pixel: (N,) int64.
        parts: sizes of parts in which no pixel is twice; empty where that is not known.
    """

    image: Tensor
    pixel: Tensor
    parts: tuple[int, ...]


class _Gather(Function):
    """Reads pixels and, where asked for, brings them to length 1."""

    @staticmethod
    def forward(
        ctx, pixels: Sequence[_Pixels], normalize: bool, *maps: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.parts = [x.parts for x in pixels]
        ctx.forms = [(x.shape, x.dtype, _memory_format(x)) for x in maps]
        ctx.normalize = normalize
        read = _read_on_gpu if is_usable(*maps) else _read
        rows, lengths = read(maps, pixels, normalize)
        units = rows if normalize else []
        ctx.save_for_backward(*(x for y in pixels for x in y[:2]), *units, *lengths)
        return tuple(rows)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gather_pixels")
        number, saved = len(grads), ctx.saved_tensors
        pixels = [_Pixels(*saved[2 * i : 2 * i + 2], part) for i, part in enumerate(ctx.parts)]
        units, lengths = saved[2 * number : 3 * number], saved[3 * number :]
        d_maps: list[Tensor | None] = [None] * number
        needed = [i for i in range(number) if ctx.needs_input_grad[2 + i]]
        for i in needed:
            shape, dtype, form = ctx.forms[i]
            d_maps[i] = torch.empty(shape, dtype=dtype, device=grads[i].device, memory_format=form)
        given = [x for x in d_maps if x is not None]
        write = _write
        if is_usable(*given) and all(ctx.parts):
            write = _write_on_gpu
        write(
            given,
            [pixels[i] for i in needed],
            [grads[i] for i in needed],
            [(units[i], lengths[i]) for i in needed] if ctx.normalize else None,
        )
        return None, None, *d_maps


def _memory_format(maps: Tensor) -> torch.memory_format:
    last = maps.stride(1) == 1 and not maps.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


# ---- any device


def _read(
    maps: Sequence[Tensor], pixels: Sequence[_Pixels], normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of each map, and their lengths where they are brought to length 1."""
    every, lengths = [], []
    for x, (image, pixel, _) in zip(maps, pixels, strict=True):
        if x.is_contiguous():
            rows = _read_planes(x, image, pixel)
        else:
            width = x.shape[3]
            rows = x.permute(0, 2, 3, 1)[image, pixel // width, pixel % width]
        if normalize:
            rows = at_least_fp32(rows)
            length = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)
            rows = rows / length
            lengths.append(length)
        every.append(rows)
    return every, lengths


def _write(
    d_maps: Sequence[Tensor],
    pixels: Sequence[_Pixels],
    grads: Sequence[Tensor],
    normalized: Sequence[tuple[Tensor, Tensor]] | None,
) -> None:
    """Fills the gradients of maps, by those of the rows."""
    for i, (d_map, (image, pixel, parts), grad) in enumerate(
        zip(d_maps, pixels, grads, strict=True)
    ):
        if normalized is not None:
            units, lengths = normalized[i]
            along = (units * grad).sum(dim=1, keepdim=True)
            grad = torch.addcmul(grad, units, along, value=-1).div_(lengths)
        grad, add = grad.to(d_map.dtype), len(parts) != 1
        if d_map.is_contiguous():
            _write_planes(d_map, image, pixel, grad, add=add)
        else:
            width = d_map.shape[3]
            where = image, pixel // width, pixel % width
            d_map.zero_().permute(0, 2, 3, 1).index_put_(where, grad, accumulate=add)


# The channels of a pixel lie a plane (h, w) apart. Pixel by pixel, a CPU would miss every cache and
# page table at each step, so one plane is read after the other, by all pixels. In groups of planes,
# a gradient is still in the cache from its zero-fill when the rows are written into it.
_GROUP_BYTES = 8 << 20


def _read_planes(maps: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    """(N, C) from a contiguous map."""
    rows_CN = maps.new_empty(maps.shape[1], image.shape[0])
    index, groups = _plane_groups(maps, image, pixel)
    if maps.numel() <= torch.iinfo(torch.int32).max:
        index = index.int()  # a fifth faster
    for channels, plane in groups:
        rows = rows_CN[channels]
        torch.index_select(
            maps.view(-1)[plane:], 0, index[: rows.shape[0]].view(-1), out=rows.view(-1)
        )
    return rows_CN.T.contiguous()


def _write_planes(
    d_maps: Tensor, image: Tensor, pixel: Tensor, d_rows: Tensor, *, add: bool
) -> None:
    """Fills a contiguous map with zeros, and with (N, C) rows where pixels were drawn."""
    rows_CN = d_rows.T.contiguous()
    index, groups = _plane_groups(d_maps, image, pixel)
    for channels, plane in groups:
        for of_image in d_maps[:, channels]:
            _zero(of_image)
        rest = d_maps.view(-1)[plane:]
        rows = rows_CN[channels]
        write = rest.scatter_add_ if add else rest.scatter_
        write(0, index[: rows.shape[0]].view(-1), rows.view(-1))


def _zero(values: Tensor) -> None:
    """Fills a contiguous tensor with zeros."""
    if values.device.type == "cpu" and values.is_contiguous():
        # A third faster than PyTorch's fill, which reads each cache line before it writes it.
        ctypes.memset(values.data_ptr(), 0, values.nbytes)
    else:
        values.zero_()


def _plane_groups(
    maps: Tensor, image: Tensor, pixel: Tensor
) -> tuple[Tensor, list[tuple[slice, int]]]:
    """Divides the channels of a contiguous map into groups; on a GPU all make one.

    Returns:
        (G, N) indices of the pixels in the planes of a group, and for each group its channels and
        the index of its first element.
    """
    batch, channels, height, width = maps.shape
    plane = height * width
    size = channels
    if maps.device.type == "cpu":
        size = min(max(1, _GROUP_BYTES // max(1, batch * plane * maps.element_size())), channels)
    index = image * (channels * plane) + pixel
    index = index + torch.arange(size, device=maps.device)[:, None] * plane
    groups = [
        (slice(first, min(first + size, channels)), first * plane)
        for first in range(0, channels, size)
    ]
    return index, groups


# ---- GPUs

# Rows of a program, and the channels of these that it reads at a time.
_ROWS, _CHANNELS = 16, 64
# Entries of the table for each map.
_ENTRIES = 13
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _read_on_gpu(
    maps: Sequence[Tensor], pixels: Sequence[_Pixels], normalize: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """As `_read`, in one launch for all maps of a dtype."""
    rows = [
        x.new_empty(len(p.image), x.shape[1], dtype=torch.float32 if normalize else x.dtype)
        for x, p in zip(maps, pixels, strict=True)
    ]
    lengths = [x.new_empty(len(x), 1) for x in rows] if normalize else []
    for chosen in _by_dtype(maps):
        entries = [
            _entry(maps[i], pixels[i], rows[i], lengths[i] if normalize else rows[i], rows[i])
            for i in chosen
        ]
        blocks = [(i, n) for i, e in enumerate(entries) for n in range(0, e[5], _ROWS)]
        table = _table(entries, [(i, n, entries[i][5]) for i, n in blocks], maps[0].device)
        launch(
            _read_rows,
            (len(blocks),),
            table,
            len(entries) * _ENTRIES,
            NORMALIZE=normalize,
            KIND=_KINDS[maps[chosen[0]].dtype],
            R=_ROWS,
            STEP=_CHANNELS,
        )
    return rows, lengths


def _write_on_gpu(
    d_maps: Sequence[Tensor],
    pixels: Sequence[_Pixels],
    grads: Sequence[Tensor],
    normalized: Sequence[tuple[Tensor, Tensor]] | None,
) -> None:
    """As `_write`, in one launch for the first draws of all maps, and one for each further draw,
    whose pixels may be the same and are then added up in this order."""
    grads = [x.contiguous() for x in grads]
    for d_map in d_maps:
        d_map.zero_()
    for chosen in _by_dtype(d_maps):
        entries = []
        for i in chosen:
            units, lengths = normalized[i] if normalized else (grads[i], grads[i])
            entries.append(_entry(d_maps[i], pixels[i], grads[i], lengths, units))
        for part in range(max(len(pixels[i].parts) for i in chosen)):
            blocks = []
            for number, i in enumerate(chosen):
                ends = [*accumulate(pixels[i].parts, initial=0), *[len(grads[i])] * 2]
                begin, end = ends[min(part, len(ends) - 2) :][:2]
                blocks += [(number, n, end) for n in range(begin, end, _ROWS)]
            table = _table(entries, blocks, d_maps[0].device)
            launch(
                _write_rows,
                (len(blocks),),
                table,
                len(entries) * _ENTRIES,
                ADD=part > 0,
                NORMALIZED=normalized is not None,
                KIND=_KINDS[d_maps[chosen[0]].dtype],
                R=_ROWS,
                STEP=_CHANNELS,
            )


def _by_dtype(maps: Sequence[Tensor]) -> list[list[int]]:
    found: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(maps):
        found.setdefault(x.dtype, []).append(i)
    return list(found.values())


def _entry(
    maps: Tensor, pixels: _Pixels, rows: Tensor, lengths: Tensor, units: Tensor
) -> list[int]:
    """What the table says of a map."""
    return [
        maps.data_ptr(),
        rows.data_ptr(),
        lengths.data_ptr(),
        pixels.image.data_ptr(),
        pixels.pixel.data_ptr(),
        len(pixels.image),
        maps.shape[1],
        *maps.stride(),
        maps.shape[3],
        units.data_ptr(),
    ]


def _table(
    entries: Sequence[Sequence[int]], blocks: Sequence[Sequence[int]], device: torch.device
) -> Tensor:
    """(values,) int64: of each map, then of each program its map, its first row and the end."""
    return upload(np.concatenate([np.ravel(entries), np.ravel(blocks)]).astype(np.int64), device)


@jit
def _pointer(entry, KIND: tl.constexpr):
    """The pointer that an entry holds, to elements of a dtype of `_KINDS`."""
    # One way out: the compiler wants one type of all that are reached, and reads on behind an `if`.
    if KIND == 0:
        pointer = tl.load(entry).to(tl.pointer_type(tl.float32))
    elif KIND == 1:
        pointer = tl.load(entry).to(tl.pointer_type(tl.float16))
    else:
        pointer = tl.load(entry).to(tl.pointer_type(tl.bfloat16))
    return pointer


@jit
def _where(entry, rows, inside):
    """Offsets of the first channel of pixels, in elements."""
    images = tl.load(entry + 3).to(tl.pointer_type(tl.int64))
    pixels = tl.load(entry + 4).to(tl.pointer_type(tl.int64))
    image = tl.load(images + rows, mask=inside, other=0)
    pixel = tl.load(pixels + rows, mask=inside, other=0)
    width = tl.load(entry + 11)
    across = tl.load(entry + 10) * (pixel % width)
    return tl.load(entry + 7) * image + tl.load(entry + 9) * (pixel // width) + across


@jit
def _read_rows(
    table,
    programs_at,
    NORMALIZE: tl.constexpr,
    KIND: tl.constexpr,
    R: tl.constexpr,
    STEP: tl.constexpr,
):
    """Reads a block of rows off its map."""
    program = table + programs_at + tl.program_id(0) * 3
    entry = table + tl.load(program) * 13
    rows = tl.load(program + 1) + tl.arange(0, R)
    inside = rows < tl.load(program + 2)
    channels, stride = tl.load(entry + 6), tl.load(entry + 8)
    source = _pointer(entry, KIND) + _where(entry, rows, inside)[:, None]
    scale = tl.full((R,), 1.0, tl.float32)
    if NORMALIZE:
        target = _pointer(entry + 1, 0)
        squares = tl.zeros((R,), tl.float32)
        for first in range(0, channels, STEP):
            c = first + tl.arange(0, STEP)[None, :]
            x = tl.load(source + c * stride, mask=inside[:, None] & (c < channels), other=0.0)
            x = x.to(tl.float32)
            squares += tl.sum(x * x, axis=1)
        length = tl.maximum(tl.sqrt(squares), 1e-12)
        tl.store(_pointer(entry + 2, 0) + rows, length, mask=inside)
        scale = 1.0 / length
    else:
        target = _pointer(entry + 1, KIND)
    for first in range(0, channels, STEP):
        c = first + tl.arange(0, STEP)[None, :]
        mask = inside[:, None] & (c < channels)
        x = tl.load(source + c * stride, mask=mask, other=0.0)
        if NORMALIZE:
            x = x.to(tl.float32) * scale[:, None]
        tl.store(target + rows[:, None] * channels + c, x, mask=mask)


@jit
def _write_rows(
    table,
    programs_at,
    ADD: tl.constexpr,
    NORMALIZED: tl.constexpr,
    KIND: tl.constexpr,
    R: tl.constexpr,
    STEP: tl.constexpr,
):
    """Writes the gradients of a block of rows into that of their map, or adds them to it."""
    program = table + programs_at + tl.program_id(0) * 3
    entry = table + tl.load(program) * 13
    rows = tl.load(program + 1) + tl.arange(0, R)
    inside = rows < tl.load(program + 2)
    channels, stride = tl.load(entry + 6), tl.load(entry + 8)
    target = _pointer(entry, KIND) + _where(entry, rows, inside)[:, None]
    at = rows[:, None] * channels
    along = tl.zeros((R,), tl.float32)
    scale = tl.full((R,), 1.0, tl.float32)
    if NORMALIZED:
        grads, units = _pointer(entry + 1, 0), _pointer(entry + 12, 0)
        for first in range(0, channels, STEP):
            c = first + tl.arange(0, STEP)[None, :]
            mask = inside[:, None] & (c < channels)
            grad = tl.load(grads + at + c, mask=mask, other=0.0)
            along += tl.sum(grad * tl.load(units + at + c, mask=mask, other=0.0), axis=1)
        scale = 1.0 / tl.load(_pointer(entry + 2, 0) + rows, mask=inside, other=1.0)
    else:
        grads, units = _pointer(entry + 1, KIND), _pointer(entry + 1, KIND)
    for first in range(0, channels, STEP):
        c = first + tl.arange(0, STEP)[None, :]
        mask = inside[:, None] & (c < channels)
        grad = tl.load(grads + at + c, mask=mask, other=0.0).to(tl.float32)
        if NORMALIZED:
            unit = tl.load(units + at + c, mask=mask, other=0.0)
            grad = (grad - unit * along[:, None]) * scale[:, None]
        if ADD:
            grad += tl.load(target + c * stride, mask=mask, other=0.0).to(tl.float32)
        tl.store(target + c * stride, grad, mask=mask)

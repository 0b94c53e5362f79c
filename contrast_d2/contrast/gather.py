"""Reading the drawn pixels off a map, with one scatter into its gradient.

Shape letters: B images, C channels, D embedding width, h w the size of a map, A drawn pixels,
G planes of one group.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function


def gather_pixels(maps: Tensor, image: Tensor, pixel: Tensor, *, distinct: bool = False) -> Tensor:
    """Reads the channels of drawn pixels.

    The backward pass zero-fills one gradient map, in the memory format of `maps`, and writes the
    rows into it once. The result cannot be differentiated twice.

    Args:
        maps: (B, C, h, w), in any memory format.
        image: (A,) int64, index in 0..B-1 of each drawn pixel.
        pixel: (A,) int64, row-major index in 0..h*w-1 of each drawn pixel.
        distinct: no pixel is drawn twice: gradients are then written, not added up. A promise
            that is not checked; with repeated pixels the gradient would be wrong.

    Returns:
        (A, C), of the same dtype, connected to the graph even where A = 0.
    """
    return _GatherPixels.apply(maps, image, pixel, distinct)


def gather_embeddings(
    embeddings: Tensor, image: Tensor, pixel: Tensor, *, distinct: bool = False
) -> Tensor:
    """Reads pixels off an embedding map and normalises them.

    Args:
        embeddings: (B, D, h, w), not normalised.
        image, pixel, distinct: as in `gather_pixels`.

    Returns:
        (A, D) unit vectors, fp32 (fp64 for fp64 input), connected to the graph even where A = 0.
    """
    return unit_vectors(gather_pixels(embeddings, image, pixel, distinct=distinct))


def unit_vectors(rows: Tensor) -> Tensor:
    """(A, D) rows at length 1, in fp32 (fp64 for fp64 input); rows of zeros stay what they are.

    The result cannot be differentiated twice.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return _UnitVectors.apply(rows.to(dtype))


class _UnitVectors(Function):
    """`torch.nn.functional.normalize` with half as many passes over the rows."""

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12)
        units = rows / lengths
        ctx.save_for_backward(units, lengths)
        return units

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        _refuse_second_derivative("unit_vectors")
        units, lengths = ctx.saved_tensors
        along = (units * grad).sum(dim=1, keepdim=True)
        return torch.addcmul(grad, units, along, value=-1).div_(lengths)


class _GatherPixels(Function):
    @staticmethod
    def forward(ctx, maps: Tensor, image: Tensor, pixel: Tensor, distinct: bool) -> Tensor:
        ctx.save_for_backward(image, pixel)
        ctx.shape, ctx.distinct = maps.shape, distinct
        ctx.memory_format = _memory_format(maps)
        if maps.is_contiguous():
            return _read_planes(maps, image, pixel)
        width = maps.shape[3]
        return maps.permute(0, 2, 3, 1)[image, pixel // width, pixel % width]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        _refuse_second_derivative("gather_pixels")
        image, pixel = ctx.saved_tensors
        d_maps = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format
        )
        if ctx.memory_format == torch.contiguous_format:
            _write_planes(d_maps, image, pixel, grad, add=not ctx.distinct)
        else:
            rows = image, pixel // ctx.shape[3], pixel % ctx.shape[3]
            d_maps.zero_()
            d_maps.permute(0, 2, 3, 1).index_put_(rows, grad, accumulate=not ctx.distinct)
        return d_maps, None, None, None


# The channels of a pixel lie a plane (h, w) apart. Pixel by pixel, a CPU would miss every cache and
# page table at each step; so one plane is read after the other, by all pixels. In groups of planes,
# a gradient is still in the cache from its zero-fill when the rows are written into it.
_GROUP_BYTES = 8 << 20


def _read_planes(maps: Tensor, image: Tensor, pixel: Tensor) -> Tensor:
    """(A, C) from a contiguous map."""
    rows_CA = maps.new_empty(maps.shape[1], image.shape[0])
    places, groups = _plane_groups(maps, image, pixel)
    if maps.numel() <= torch.iinfo(torch.int32).max:
        places = places.int()  # a fifth faster
    for channels, plane in groups:
        rows = rows_CA[channels]
        torch.index_select(
            maps.view(-1)[plane:], 0, places[: rows.shape[0]].view(-1), out=rows.view(-1)
        )
    return rows_CA.T.contiguous()


def _write_planes(
    d_maps: Tensor, image: Tensor, pixel: Tensor, d_rows: Tensor, *, add: bool
) -> None:
    """Fills a contiguous map with zeros, and with (A, C) rows where pixels were drawn."""
    rows_CA = d_rows.T.contiguous()
    places, groups = _plane_groups(d_maps, image, pixel)
    for channels, plane in groups:
        d_maps[:, channels].zero_()
        rest = d_maps.view(-1)[plane:]
        rows = rows_CA[channels]
        write = rest.scatter_add_ if add else rest.scatter_
        write(0, places[: rows.shape[0]].view(-1), rows.view(-1))


def _plane_groups(
    maps: Tensor, image: Tensor, pixel: Tensor
) -> tuple[Tensor, list[tuple[slice, int]]]:
    """Divides the channels of a contiguous map into groups; on a GPU all make one.

    Returns:
        (G, A) places of the pixels in the planes of a group, and for each group its channels and
        the place of its first plane.
    """
    batch, channels, height, width = maps.shape
    plane = height * width
    size = channels
    if maps.device.type == "cpu":
        size = min(max(1, _GROUP_BYTES // max(1, batch * plane * maps.element_size())), channels)
    places = image * (channels * plane) + pixel
    places = places + torch.arange(size, device=maps.device)[:, None] * plane
    groups = [
        (slice(first, min(first + size, channels)), first * plane)
        for first in range(0, channels, size)
    ]
    return places, groups


def _refuse_second_derivative(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} cannot be differentiated twice: leave out create_graph.")


def _memory_format(maps: Tensor) -> torch.memory_format:
    """Channels last where the channels of a pixel are neighbours in memory."""
    last = maps.stride(1) == 1 and not maps.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format

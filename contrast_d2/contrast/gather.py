"""Reading the drawn pixels off a map, with one scatter into its gradient.

Shape letters: B images, C channels, D embedding width, h w the size of a map, A drawn pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
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
    """(A, D) rows at length 1, in fp32 (fp64 for fp64 input)."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return nn.functional.normalize(rows.to(dtype), dim=1)


class _GatherPixels(Function):
    @staticmethod
    def forward(ctx, maps: Tensor, image: Tensor, pixel: Tensor, distinct: bool) -> Tensor:
        ctx.save_for_backward(image, pixel)
        ctx.shape, ctx.distinct = maps.shape, distinct
        ctx.memory_format = _memory_format(maps)
        if maps.is_contiguous():
            places_CA = _places(maps.shape, image, pixel)
            return (
                maps.view(-1).index_select(0, places_CA.view(-1)).view_as(places_CA).T.contiguous()
            )
        width = maps.shape[3]
        return maps.permute(0, 2, 3, 1)[image, pixel // width, pixel % width]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "gather_pixels cannot be differentiated twice: leave out create_graph."
            )
        image, pixel = ctx.saved_tensors
        d_maps = torch.empty(
            ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=ctx.memory_format
        ).zero_()
        if ctx.memory_format == torch.contiguous_format:
            places = _places(ctx.shape, image, pixel).view(-1)
            write = d_maps.view(-1).scatter_ if ctx.distinct else d_maps.view(-1).scatter_add_
            write(0, places, grad.T.reshape(-1))
        else:
            rows = image, pixel // ctx.shape[3], pixel % ctx.shape[3]
            d_maps.permute(0, 2, 3, 1).index_put_(rows, grad, accumulate=not ctx.distinct)
        return d_maps, None, None, None


def _places(shape: torch.Size, image: Tensor, pixel: Tensor) -> Tensor:
    """(C, A) indices into a contiguous map: one plane after the other, each read by all anchors.

    The channels of a pixel lie a plane apart, so that reading pixel by pixel misses every cache and
    page table at each step; that takes half as long again on a CPU.
    """
    _, channels, height, width = shape
    plane = height * width
    first_A = image * (channels * plane) + pixel
    return first_A + torch.arange(channels, device=image.device)[:, None] * plane


def _memory_format(maps: Tensor) -> torch.memory_format:
    """Channels last where the channels of a pixel are neighbours in memory."""
    last = maps.stride(1) == 1 and not maps.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format

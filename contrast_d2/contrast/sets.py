"""Labelled sets of embeddings: read off feature maps, summed by class, collected over processes.

Shape letters: B images, C channels, D embedding width, K classes, h w a feature map, N rows of a
set, G planes of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class PixelDraw(NamedTuple):
    """Pixels drawn from one label map, grouped by class.

    Attributes:
        image: (N,) int64, index of the image in the batch.
        pixel: (N,) int64, row-major index of the pixel in the (h, w) map.
        labels: (N,) int64, class of the pixel. A draw whose size predictions decide is padded
            on a GPU: label -1, with valid indices of no meaning. None is there twice.
        class_counts: number of pixels of each class 0..K-1, host integers; None where the host does
            not know.
        wrong: (N,) bool, whether the network predicts another class; None without predictions.
    """

    image: Tensor
    pixel: Tensor
    labels: Tensor
    class_counts: tuple[int, ...] | None
    wrong: Tensor | None = None


class PixelSet(NamedTuple):
    """Embeddings with their classes, and where they came from.

    Attributes:
        embeddings: (N, D) unit vectors.
        labels: (N,) integer classes; -1 for rows that are none, such as padding or empty slots.
        class_counts: rows of each class 0..K-1, host integers, where the rows are in the order of
            their classes; else None.
        feature: name of the feature map that the rows were drawn from; "" for others.
        draw: the drawn pixels; None for rows that are no pixels of this batch.
    """

    embeddings: Tensor
    labels: Tensor
    class_counts: tuple[int, ...] | None = None
    feature: str = ""
    draw: PixelDraw | None = None


class KernelResult(NamedTuple):
    """What every kernel of the InfoNCE returns.

    Attributes:
        total: 0-dim, sum over the anchors of the mean loss over their positives.
        num_valid: 0-dim, number of anchors that have a positive.
        d_anchors: (N, D) gradient of `total` with respect to the anchors, in both of their roles
            where they are contrasted with each other; None where not asked for.
        d_contrast: that with respect to a contrast set; None where not asked for.
    """

    total: Tensor
    num_valid: Tensor
    d_anchors: Tensor | None
    d_contrast: Tensor | None


def joined_sets(sets: Sequence[PixelSet]) -> PixelSet:
    """The rows of several sets, one set after the other."""
    if len(sets) == 1:
        return sets[0]
    return PixelSet(torch.cat([x.embeddings for x in sets]), torch.cat([x.labels for x in sets]))


class ClassSums(NamedTuple):
    """What the mean similarities of a set of embeddings follow from, without a matrix of pairs.

    Those of several sets can be stacked along dimensions that stand before these.

    Attributes:
        sums: (K, D), sum of the embeddings of each class.
        counts: (K,) number of them, as floats.
        squares: 0-dim, sum of all squared lengths.
    """

    sums: Tensor
    counts: Tensor
    squares: Tensor


@torch.no_grad()
def class_sums(embeddings: Tensor, labels: Tensor, num_classes: int) -> ClassSums:
    """Sums up the embeddings (N, D) of each class; rows with a negative label do not count."""
    # Slot 0 takes what does not count.
    slot = labels.clamp(min=-1).long() + 1
    lengths = embeddings.square().sum(dim=1)
    sums = embeddings.new_zeros(num_classes + 1, embeddings.shape[1])
    counts, squares = sums.new_zeros(num_classes + 1), sums.new_zeros(num_classes + 1)
    sums.index_add_(0, slot, embeddings)
    counts.index_add_(0, slot, torch.ones_like(lengths))
    squares.index_add_(0, slot, lengths)
    return ClassSums(sums[1:], counts[1:], squares[1:].sum())


@torch.no_grad()
def mean_similarities(
    anchors: ClassSums,
    contrast: ClassSums,
    own_squares: Tensor | float = 0.0,
    own_pairs: Tensor | float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean cosine similarity of all (anchor, positive) and of all (anchor, negative) pairs.

    Args:
        anchors: sums of unit vectors.
        contrast: those of the contrast set.
        own_squares, own_pairs: sum of the anchors' squared lengths, and their number, where they
            are part of the contrast set and none is paired with itself; else 0.

    Returns:
        Two tensors, 0-dim for each set; nan where there is no such pair.
    """
    same = (anchors.sums * contrast.sums).sum(dim=(-2, -1))
    same_pairs = (anchors.counts * contrast.counts).sum(dim=-1)
    everything = (anchors.sums.sum(dim=-2) * contrast.sums.sum(dim=-2)).sum(dim=-1)
    all_pairs = anchors.counts.sum(dim=-1) * contrast.counts.sum(dim=-1)
    negative = _mean(everything - same, all_pairs - same_pairs)
    return _mean(same - own_squares, same_pairs - own_pairs), negative


def _mean(total: Tensor, count: Tensor) -> Tensor:
    """total / count; nan for a count of 0, where rounding leaves a total that is not quite 0."""
    return torch.where(count > 0, total / count, torch.nan)


# ---- rows and vectors


def unit_vectors(rows: Tensor) -> Tensor:
    """(N, D) rows at length 1, in fp32 (fp64 for fp64 input); rows of zeros stay as they are."""
    return F.normalize(at_least_fp32(rows), dim=1)


def at_least_fp32(values: Tensor) -> Tensor:
    """fp32 values, unless they are fp64."""
    return values if values.dtype == torch.float64 else values.float()


def squared_lengths(vectors: Tensor) -> Tensor:
    """(B, N) squared lengths of the vectors (B, D, N) of all pixels of a map."""
    if vectors.device.type != "cpu":
        return vectors.square().sum(dim=1)
    # Many times faster on a CPU, whose cache holds the squares of a few planes.
    squares = vectors.new_zeros(vectors.shape[0], vectors.shape[2])
    for planes in vectors.split(16, dim=1):
        squares += planes.square().sum(dim=1)
    return squares


def refuse_second_derivative(name: str) -> None:
    """Raises RuntimeError in a backward pass that builds a graph.

    `once_differentiable` raises only where the upstream gradient itself needs one: after
    loss.backward(create_graph=True) it would drop the second derivative without a word.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} cannot be differentiated twice: leave out create_graph.")


def on_device(values: Tensor, device: torch.device) -> Tensor:
    """Values from the host on a device, without waiting for it; others as they are."""
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def draws_on_device(draws: Sequence[PixelDraw], device: torch.device) -> list[PixelDraw]:
    """Draws on a device, by one copy for all that are on the host."""
    host = [draw for draw in draws if draw.image.device != device]
    if not host:
        return list(draws)
    columns = torch.cat([torch.stack([x.image, x.pixel, x.labels]) for x in host], dim=1)
    parts = on_device(columns, device).split([len(x.image) for x in host], dim=1)
    moved = iter(parts)
    return [
        draw
        if draw.image.device == device
        else draw._replace(**dict(zip(("image", "pixel", "labels"), next(moved), strict=True)))
        for draw in draws
    ]


# ---- collecting over processes


def world_size() -> int:
    """Number of processes that train together; 1 outside of distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@cache
def host_group() -> dist.ProcessGroup | None:
    """A group of all processes that exchanges what is on the host; None where the default does."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")  # pyright: ignore[reportReturnType]


def gather_parts(*tensors: Tensor) -> list[list[Tensor]]:
    """The rows (N, ...) of all processes.

    Gradients flow back to the process that a row came from. Every process has to make the call, in
    the same order, and to run its backward pass. Sizes are exchanged between the hosts.

    Args:
        tensors: with the same N, which may differ between processes.

    Returns:
        For each tensor the rows of every process, in the order of ranks.
    """
    if world_size() == 1:
        return [[x] for x in tensors]
    from torch.distributed.nn.functional import all_gather  # not in every build of torch

    own = torch.tensor([len(tensors[0])])
    sizes = [torch.zeros_like(own) for _ in range(world_size())]
    dist.all_gather(sizes, own, group=host_group())
    counts = torch.cat(sizes).tolist()
    gathered = []
    for x in tensors:
        parts = all_gather(torch.cat([x, x.new_zeros(max(counts) - len(x), *x.shape[1:])]))
        gathered.append([part[:count] for part, count in zip(parts, counts, strict=True)])
    return gathered


def gathered_set(own: PixelSet) -> PixelSet:
    """The set of all processes, the rows of this process first."""
    rank = dist.get_rank()
    embeddings, labels = (
        torch.cat([parts[rank], *parts[:rank], *parts[rank + 1 :]])
        for parts in gather_parts(own.embeddings, own.labels)
    )
    return PixelSet(embeddings, labels)


def stack_processes(values: Tensor) -> Tensor:
    """(W, ...) values of all W processes in the order of ranks; gradients flow back to them."""
    (parts,) = gather_parts(values.reshape(1, -1))
    return torch.cat(parts).view(-1, *values.shape)

"""Contrasting over the images of all processes.

Shape letters: A anchors of this process, D embedding width, G anchors of all processes, S scales,
K classes, B images of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class GatheredSet(NamedTuple):
    """The embeddings of all processes, those of this process first.

    Attributes:
        embeddings: (G, D); gradients flow back to the process that each row came from.
        labels: (G,) int64.
    """

    embeddings: Tensor
    labels: Tensor


def world_size() -> int:
    """Number of processes that train together; 1 outside of distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_share(budget: int) -> int:
    """This process's part of a budget for the whole batch, rounded up."""
    return -(-budget // world_size())


def gather_set(embeddings: Tensor, labels: Tensor) -> GatheredSet:
    """Joins the sets of all processes, which may differ in size.

    Every process has to call it in the same order.

    Args:
        embeddings: (A, D).
        labels: (A,) int64.
    """
    size = torch.tensor([len(labels)], device=labels.device)
    sizes = [torch.zeros_like(size) for _ in range(world_size())]
    dist.all_gather(sizes, size)
    counts = torch.cat(sizes).tolist()
    padded = labels.new_zeros(max(counts))
    padded[: len(labels)] = labels
    all_labels = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(all_labels, padded)
    all_labels = [part[:count] for part, count in zip(all_labels, counts, strict=True)]
    return GatheredSet(
        gather_rows(embeddings, counts),
        torch.cat(_own_first(all_labels)),
    )


def gather_rows(rows: Tensor, counts: list[int]) -> Tensor:
    """Joins the rows of all processes, those of this process first.

    Every process has to call it in the same order, and to run its backward pass.

    Args:
        rows: (A, D); gradients flow back to the process that each row came from.
        counts: A of every process, in the order of ranks.

    Returns:
        (G, D).
    """
    return _GatherRows.apply(rows, counts)


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum of a tensor over the processes, without gradient."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def mean_over_processes(mean: Tensor, count: Tensor) -> Tensor:
    """This process's share of the mean over the items of all processes.

    The shares add up to that mean times the number of processes, by which DistributedDataParallel
    divides the gradients, and the trainer the losses that it logs.

    Args:
        mean: 0-dim, over this process's items.
        count: 0-dim floating-point number of these, which may be 0.
    """
    return mean * count * world_size() / sum_over_processes(count).clamp(min=1)


def quotas_of_all(counts: Tensor, quotas_of: Callable[[Tensor], Tensor]) -> Tensor:
    """Quotas of this process's images, set for the images of all processes together.

    Every process has to call it in the same order.

    Args:
        counts: (S, K, B, ...) int64 pixel counts; B may differ between processes.
        quotas_of: the counts of all images -> their quotas, likewise.

    Returns:
        (S, K, B, ...) quotas, on the CPU where there are several processes.
    """
    if world_size() == 1:
        return quotas_of(counts)
    counts = counts.cpu()  # the only wait for the device, in this case
    gathered: list[Tensor] = [counts] * world_size()
    dist.all_gather_object(gathered, counts)
    quotas = quotas_of(torch.cat(gathered, dim=2))
    return quotas.split([part.shape[2] for part in gathered], dim=2)[dist.get_rank()]


def _own_first(parts: list[Tensor]) -> list[Tensor]:
    rank = dist.get_rank()
    return [parts[rank], *parts[:rank], *parts[rank + 1 :]]


class _GatherRows(Function):
    """all_gather of rows; the backward sums each row's gradient over all processes."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(_own_first(parts))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        rank, counts = dist.get_rank(), ctx.counts
        # Back from "own rows first" to the order of ranks, in which all processes can add up.
        own, others = grad[: counts[rank]], grad[counts[rank] :]
        before = sum(counts[:rank])
        by_rank = torch.cat([others[:before], own, others[before:]])
        dist.all_reduce(by_rank)
        return by_rank[before : before + counts[rank]], None

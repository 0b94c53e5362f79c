"""The log of the negatives' mean over the positives', for groups of anchors with sets of their own.

Shape letters: D embedding width, G groups or ranges, A anchors, R samples, S most samples of a set,
M blocks of anchors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from .sets import refuse_second_derivative


class Ranges(NamedTuple):
    """Ranges of indices, one per group.

    Attributes:
        first: (G,) int64, where each begins.
        size: (G,) int64, its length.
    """

    first: Tensor
    size: Tensor


def consecutive(sizes: Tensor) -> Ranges:
    """Ranges of the given sizes, one after the other."""
    return Ranges(sizes.cumsum(dim=0) - sizes, sizes)


def at(ranges: Ranges, number: Tensor) -> Ranges:
    """The ranges of the given numbers."""
    return Ranges(ranges.first[number], ranges.size[number])


def expand(ranges: Ranges, total: int) -> tuple[Tensor, Tensor]:
    """The range that each of `total` indices lies in, and the index's rank in it.

    Indices beyond the last range have the number of ranges, and rank on in the last one.
    """
    index = torch.arange(total, device=ranges.size.device)
    number = torch.searchsorted(ranges.first + ranges.size, index, right=True)
    return number, index - ranges.first[number.clamp(max=len(ranges.size) - 1)]


class Groups(NamedTuple):
    """What is contrasted with what, as ranges among the anchors and among the samples.

    Attributes:
        anchors: of each group; one after the other, they hold all anchors.
        positives, negatives: of each group among the samples.
    """

    anchors: Ranges
    positives: Ranges
    negatives: Ranges


def log_ratios(
    anchors: Tensor,
    samples: Tensor,
    log_weights: Tensor,
    groups: Groups,
    *,
    temperature: float,
    max_samples: int,
) -> Tensor:
    """For each anchor, x = log( mean_{n in N} e^{s(a,n)} / mean_{p in P} w_p e^{s(a,p)} ).

    The loss of the anchor is softplus(x). Similarities are taken block by block, with value and
    gradient together: memory is that of the anchors and samples. Only anchors have a gradient. It
    is the softmax-weighted mean of the negatives less that of the positives, over the temperature,
    so that both sides weigh the same. The result cannot be differentiated twice.

    Args:
        anchors: (A, D) unit vectors, fp32 or fp64, group by group.
        samples: (R, D) unit vectors, of the same dtype.
        log_weights: log w of the samples, as far as they are positives: (R,), or shorter where the
            last ones are negatives only.
        groups: the anchors' groups, each with at least one positive and one negative.
        temperature: divides the similarities.
        max_samples: S, size of the largest set of positives or negatives.

    Returns:
        (A,), of the same dtype.

    Reference: Wang et al., arXiv:2207.01417, and the official code, whose tiling of anchors,
        positives and negatives to the same number these means replace.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        return _LogRatios.apply(anchors, samples, log_weights, groups, temperature, max_samples)


# Anchors of a group that are multiplied with its samples at once. Groups differ much in size: in
# blocks, a small one pads little.
_BLOCK_ANCHORS = 16
# Elements of the samples that are held at a time, once for each block that uses them. On a CPU few,
# to stay in the cache.
_CHUNK_ELEMENTS = 1 << 24
_CPU_CHUNK_ELEMENTS = 1 << 20


class _LogRatios(Function):
    """Computes the values and, where asked for, their gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        anchors: Tensor,
        samples: Tensor,
        log_weights: Tensor,
        groups: Groups,
        temperature: float,
        max_samples: int,
    ) -> Tensor:
        num_anchors, width = anchors.shape
        # The padding of blocks is written to one more row, which is cut off.
        values = anchors.new_empty(num_anchors + 1)
        gradients = anchors.new_empty(num_anchors + 1, width)
        group_of_block, members = _blocks(groups.anchors, num_anchors)
        elements = _CPU_CHUNK_ELEMENTS if anchors.device.type == "cpu" else _CHUNK_ELEMENTS
        size = max(1, elements // (max_samples * width))
        for group, member in zip(group_of_block.split(size), members.split(size), strict=True):
            block = anchors[member.clamp(max=num_anchors - 1)] / temperature
            negatives, away = _log_mean_exp(
                block, samples, None, at(groups.negatives, group), max_samples
            )
            positives, towards = _log_mean_exp(
                block, samples, log_weights, at(groups.positives, group), max_samples
            )
            values[member] = negatives - positives
            gradients[member] = (away - towards) / temperature
        ctx.save_for_backward(gradients[:-1])
        return values[:-1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("log_ratios")
        (gradients,) = ctx.saved_tensors
        return gradients * grad[:, None], None, None, None, None, None


def _blocks(anchors: Ranges, num_anchors: int) -> tuple[Tensor, Tensor]:
    """Cuts the groups' anchors into blocks.

    Returns:
        (M,) int64 group and (M, block) int64 anchors of each block; A for its padding.
    """
    size = _BLOCK_ANCHORS
    num_groups = len(anchors.size)
    # At least as many blocks as there are: to know their number the host would have to wait.
    bound = (num_anchors + num_groups * (size - 1)) // size
    per_group = consecutive((anchors.size + size - 1).div(size, rounding_mode="floor"))
    group, rank = expand(per_group, bound)
    group.clamp_(max=num_groups - 1)
    within = rank[:, None] * size + torch.arange(size, device=group.device)
    own = at(anchors, group)
    members = own.first[:, None] + within
    return group, members.masked_fill(within >= own.size[:, None], num_anchors)


def _log_mean_exp(
    block: Tensor, samples: Tensor, log_weights: Tensor | None, chosen: Ranges, max_samples: int
) -> tuple[Tensor, Tensor]:
    """log mean_x w_x e^{a.x} over the samples of each block, and its gradient in a.

    Args:
        block: (M, block, D) anchors, over the temperature.
        samples: (R, D).
        log_weights: (R,) log w; None for w = 1.
        chosen: the samples of each block.
        max_samples: S, at least their number.

    Returns:
        (M, block) and (M, block, D).
    """
    rank = torch.arange(max_samples, device=block.device)
    outside = rank >= chosen.size[:, None]
    index = (chosen.first[:, None] + rank).masked_fill(outside, 0)
    bias = samples.new_zeros(()).expand(index.shape) if log_weights is None else log_weights[index]
    bias = bias.masked_fill(outside, -torch.inf)
    rows = samples.index_select(0, index.flatten()).view(*index.shape, samples.shape[1])
    scores = torch.baddbmm(bias[:, None], block, rows.mT)
    log_sum = scores.logsumexp(dim=2, keepdim=True)
    mean = scores.sub_(log_sum).exp_() @ rows
    return log_sum.squeeze(2) - chosen.size.to(scores.dtype).log()[:, None], mean

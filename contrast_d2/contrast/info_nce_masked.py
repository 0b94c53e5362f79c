"""The InfoNCE on any device in plain PyTorch: blocks of similarities under masks.

The equations are those of `info_nce`. Nothing is assumed of order, norm or temperature, and nothing
is read by the host.

Shape letters: A anchors, C contrast samples, D embedding width, R anchors of one block.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from .kernel_result import KernelResult
from .pairs import PairSelector

# Elements of one R x C block of similarities; a handful of such blocks is alive at a time.
_BLOCK_ELEMENTS = 1 << 21


def masked_info_nce(
    anchors: Tensor,
    labels: Tensor,
    contrast: Tensor | None,
    contrast_labels: Tensor | None,
    *,
    temperature: float,
    anchors_lead_contrast: bool,
    needs_gradient: tuple[bool, bool],
    products: Literal["fp32", "bf16"],
    pairs: PairSelector | None = None,
) -> KernelResult:
    """Value and gradient of the InfoNCE, with three products of (A, D) by (D, C) at most.

    Args:
        anchors, labels, contrast, contrast_labels: fp32 or fp64 embeddings (A, D), (C, D) with
            their labels, as in `info_nce`.
        temperature, anchors_lead_contrast, products, pairs: as in `info_nce`.
        needs_gradient: whether to compute the gradients of anchors and of contrast.
    """
    among_themselves = contrast is None or contrast_labels is None
    if contrast is None or contrast_labels is None:
        contrast, contrast_labels = anchors, labels
        needs_gradient = needs_gradient[0], False
    total, num_valid = anchors.new_zeros(()), anchors.new_zeros(())
    d_anchors = torch.zeros_like(anchors) if needs_gradient[0] else None
    if among_themselves:
        d_contrast = d_anchors  # both roles of the same samples
    else:
        d_contrast = torch.zeros_like(contrast) if needs_gradient[1] else None
    lowered = torch.bfloat16 if products == "bf16" else anchors.dtype
    anchors_factor, contrast_factor = anchors.to(lowered), contrast.to(lowered)
    known = contrast_labels >= 0
    block = max(1, _BLOCK_ELEMENTS // max(1, len(contrast)))
    for start in range(0, len(anchors), block):
        rows = slice(start, min(start + block, len(anchors)))
        logits_RC = (anchors[rows] @ contrast.T).div_(temperature)
        same_RC = labels[rows, None] == contrast_labels
        negative_RC = ~same_RC & known
        positive_RC = same_RC & known
        if among_themselves or anchors_lead_contrast:
            positive_RC.diagonal(start).fill_(False)
        if pairs is not None:
            positive_RC, negative_RC = pairs(logits_RC, positive_RC, negative_RC)
        loss, valid, d_logits_RC = _block(logits_RC, positive_RC, negative_RC, any(needs_gradient))
        total += loss
        num_valid += valid
        if d_logits_RC is None:
            continue
        d_logits_RC = d_logits_RC.div_(temperature).to(lowered)
        if d_anchors is not None:
            d_anchors[rows] += d_logits_RC @ contrast_factor
        if d_contrast is not None:
            d_contrast += d_logits_RC.T @ anchors_factor[rows]
    return KernelResult(total, num_valid, d_anchors, None if among_themselves else d_contrast)


def _block(
    logits_RC: Tensor, positive_RC: Tensor, negative_RC: Tensor, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sum of the anchors' losses over a block of rows.

    Returns:
        The sum, the number of anchors that have a positive, and the (R, C) gradient of the sum with
        respect to the logits, or None.
    """
    num_positives_R = positive_RC.sum(dim=1, dtype=logits_RC.dtype)
    weight_R = num_positives_R.clamp(min=1).reciprocal()[:, None]
    lse_R = logits_RC.masked_fill(~negative_RC, -torch.inf).logsumexp(dim=1, keepdim=True)
    gap_RC = lse_R - logits_RC
    # The threshold is where softplus(x) = x to the last bit of float64 as well.
    loss = (
        F.softplus(gap_RC, threshold=40).masked_fill_(~positive_RC, 0).sum(dim=1) * weight_R[:, 0]
    ).sum()
    valid = (num_positives_R > 0).sum()
    if not needs_gradient:
        return loss, valid, None
    # d softplus(n - s)/ds = -sigmoid(n - s) for each positive; n passes their mean on to the
    # negatives in proportion to their softmax, exp(s - n).
    pull_RC = gap_RC.sigmoid().masked_fill_(~positive_RC, 0).mul_(weight_R)
    push_R = pull_RC.sum(dim=1, keepdim=True)
    d_logits_RC = gap_RC.neg_().exp_().masked_fill_(~negative_RC, 0).mul_(push_R).sub_(pull_RC)
    return loss, valid, d_logits_RC

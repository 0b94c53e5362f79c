"""The InfoNCE of any sets, pairs, dtype and device, in plain PyTorch: blocks under masks.

Shape letters: A anchors, C contrast samples, R anchors of one block.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sets import KernelResult, PixelSet


class PairSelector(Protocol):
    """Chooses among the pairs of one block of anchors."""

    def __call__(
        self, similarities: Tensor, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Chooses.

        Args:
            similarities: (R, C), divided by the temperature. Not to be changed.
            positive: (R, C) bool, pairs of one class; no anchor with itself.
            negative: (R, C) bool, pairs of two classes.

        Returns:
            (R, C) bool positives and negatives to count, parts of those given.
        """
        ...


# Elements of one R x C block of similarities; a handful of such blocks is alive at a time.
_BLOCK_ELEMENTS = 1 << 21


def masked_info_nce(
    anchors: PixelSet,
    contrast: PixelSet | None,
    *,
    temperature: float,
    holds_anchors: bool,
    needs_gradient: tuple[bool, bool],
    pairs: PairSelector | None = None,
) -> KernelResult:
    """Value and gradient of the InfoNCE on any device: blocks of similarities under masks.

    Nothing is assumed of order, norm or temperature, and nothing is read by the host.

    Args:
        anchors, contrast: fp32 or fp64; None contrasts the anchors with each other.
        temperature, holds_anchors, pairs: as in `Term`.
        needs_gradient: of anchors, of contrast.
    """
    among_themselves = contrast is None
    rows, labels = anchors.embeddings, anchors.labels
    columns, column_labels = (rows, labels) if contrast is None else contrast[:2]
    total, num_valid = rows.new_zeros(()), rows.new_zeros(())
    d_rows = torch.zeros_like(rows) if needs_gradient[0] else None
    if among_themselves:
        d_columns = d_rows  # both roles of the same samples
    else:
        d_columns = torch.zeros_like(columns) if needs_gradient[1] else None
    known = column_labels >= 0
    block = max(1, _BLOCK_ELEMENTS // max(1, len(columns)))
    for start in range(0, len(rows), block):
        part = slice(start, min(start + block, len(rows)))
        logits_RC = (rows[part] @ columns.T).div_(temperature)
        same_RC = labels[part, None] == column_labels
        positive_RC, negative_RC = same_RC & known, ~same_RC & known
        if among_themselves or holds_anchors:
            positive_RC.diagonal(start).fill_(False)
        if pairs is not None:
            positive_RC, negative_RC = pairs(logits_RC, positive_RC, negative_RC)
        loss, valid, d_logits_RC = _block(logits_RC, positive_RC, negative_RC)
        total += loss
        num_valid += valid
        d_logits_RC.div_(temperature)
        if d_rows is not None:
            d_rows[part] += d_logits_RC @ columns
        if d_columns is not None:
            d_columns += d_logits_RC.T @ rows[part]
    return KernelResult(total, num_valid, d_rows, None if among_themselves else d_columns)


def _block(
    logits_RC: Tensor, positive_RC: Tensor, negative_RC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the anchors' losses over a block of rows.

    Returns:
        The sum, the number of anchors that have a positive, and the (R, C) gradient of the sum with
        respect to the logits.
    """
    num_positives_R = positive_RC.sum(dim=1, dtype=logits_RC.dtype)
    weight_R = num_positives_R.clamp(min=1).reciprocal()[:, None]
    lse_R = logits_RC.masked_fill(~negative_RC, -torch.inf).logsumexp(dim=1, keepdim=True)
    gap_RC = lse_R - logits_RC
    # The threshold is where softplus(x) = x to the last bit of float64 as well.
    loss = (
        F.softplus(gap_RC, threshold=40).masked_fill_(~positive_RC, 0).sum(dim=1) * weight_R[:, 0]
    ).sum()
    # d softplus(n - s)/ds = -sigmoid(n - s) for each positive; n passes their mean on to the
    # negatives in proportion to their softmax, exp(s - n).
    pull_RC = gap_RC.sigmoid().masked_fill_(~positive_RC, 0).mul_(weight_R)
    push_R = pull_RC.sum(dim=1, keepdim=True)
    d_logits_RC = gap_RC.neg_().exp_().masked_fill_(~negative_RC, 0).mul_(push_R).sub_(pull_RC)
    return loss, (num_positives_R > 0).sum(), d_logits_RC

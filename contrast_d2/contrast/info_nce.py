"""The supervised InfoNCE loss that all pixel-contrast methods share, exact and in linear memory.

For anchor i with positives P(i) (its class) and negatives N(i) (others), s = z.z / temperature:

    l(i, j) = -log( e^s_ij / (e^s_ij + sum_{n in N(i)} e^s_in) ) = softplus( n_i - s_ij )
    n_i     = logsumexp_{n in N(i)} s_in
    L       = mean_i mean_{j in P(i)} l(i, j)

Only the one positive stands in each denominator, unlike in SupCon. The softplus form never leaves
the range of fp32, at any temperature.

Shape letters: A anchors, C contrast samples, D embedding width, R anchors of one chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

# Elements of one R x C block of similarities; a handful of such blocks is alive at a time.
_BLOCK_ELEMENTS = 1 << 21


def info_nce(
    anchors: Tensor,
    labels: Tensor,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    anchors_lead_contrast: bool = False,
    count_empty_anchors: bool = False,
) -> Tensor:
    """Supervised InfoNCE of anchors against a contrast set.

    Value and gradient are computed in one pass over blocks of the similarity matrix, so neither an
    A x C matrix nor a graph over one is ever held. Gradients reach both sets. The result cannot be
    differentiated twice. Similarities run in fp32 (fp64 for fp64 input), whatever autocast says.

    Args:
        anchors: (A, D) unit vectors.
        labels: (A,) integer classes; an anchor with a negative label has no positives.
        contrast: (C, D) unit vectors; None contrasts the anchors among themselves, each without
            itself.
        contrast_labels: (C,) integer classes, required with `contrast`. A sample with a negative
            label, such as an unfilled slot of a memory bank, is neither positive nor negative.
        temperature: divides the similarities; above 0.
        anchors_lead_contrast: the first A contrast samples are the anchors, in their order: an
            anchor is then not its own positive.
        count_empty_anchors: average over all anchors, of which those without a positive give 0, and
            not only over those with one.

    Returns:
        The loss, 0-dim fp32 (or fp64). It is 0, still connected to the graph, where no anchor has a
        positive or no anchor has a negative.

    Raises:
        ValueError: shapes, temperature or a missing argument.

    Reference: Pissas et al., ECCV 2022, equations (1), (2) and, with another scale's anchors as
        contrast set, (4); Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic
        Segmentation", ICCV 2021, equation (3).
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0.")
    if contrast is None:
        if contrast_labels is not None or anchors_lead_contrast:
            raise ValueError("contrast_labels and anchors_lead_contrast go with a contrast set.")
        contrast, contrast_labels, anchors_lead_contrast = anchors, labels, True
    elif contrast_labels is None:
        raise ValueError("a contrast set needs contrast_labels.")
    _check_set("anchors", anchors, labels)
    _check_set("contrast", contrast, contrast_labels)
    if anchors.shape[1] != contrast.shape[1]:
        raise ValueError(
            f"anchors are {anchors.shape[1]} wide and contrast samples {contrast.shape[1]}: "
            "both must come from projectors of the same embed_dim."
        )
    if anchors_lead_contrast and len(contrast) < len(anchors):
        raise ValueError(
            f"anchors_lead_contrast: {len(contrast)} contrast samples cannot begin with "
            f"{len(anchors)} anchors."
        )
    dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    with torch.autocast(anchors.device.type, enabled=False):
        return _InfoNCE.apply(
            anchors.to(dtype),
            labels,
            contrast.to(dtype),
            contrast_labels,
            temperature,
            anchors_lead_contrast,
            count_empty_anchors,
        )


def _check_set(name: str, embeddings: Tensor, labels: Tensor) -> None:
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name}: expected (N, D) embeddings with (N,) labels, got "
            f"{tuple(embeddings.shape)} and {tuple(labels.shape)}."
        )


class _InfoNCE(Function):
    """Computes the loss and, where asked for, its gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        anchors: Tensor,
        labels: Tensor,
        contrast: Tensor,
        contrast_labels: Tensor,
        temperature: float,
        anchors_lead_contrast: bool,
        count_empty_anchors: bool,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        num_anchors, num_contrast = len(anchors), len(contrast)
        total = anchors.new_zeros(())
        num_valid = anchors.new_zeros(())
        d_anchors = torch.zeros_like(anchors) if needs_gradient else None
        d_contrast = torch.zeros_like(contrast) if needs_gradient else None
        known = contrast_labels >= 0
        chunk = max(1, _BLOCK_ELEMENTS // max(1, num_contrast))
        for start in range(0, num_anchors, chunk):
            rows = slice(start, min(start + chunk, num_anchors))
            logits_RC = (anchors[rows] @ contrast.T).div_(temperature)
            same_RC = labels[rows, None] == contrast_labels
            negative_RC = ~same_RC & known
            positive_RC = same_RC & known
            if anchors_lead_contrast:
                positive_RC.diagonal(start).fill_(False)
            loss, valid, d_logits_RC = _block(logits_RC, positive_RC, negative_RC, needs_gradient)
            total += loss
            num_valid += valid
            if needs_gradient:
                d_anchors[rows] = d_logits_RC @ contrast
                d_contrast.addmm_(d_logits_RC.T, anchors[rows])
        if count_empty_anchors:
            num_valid.fill_(num_anchors)
        num_valid.clamp_(min=1)
        if needs_gradient:
            scale = temperature * num_valid
            ctx.save_for_backward(d_anchors.div_(scale), d_contrast.div_(scale))
        return total / num_valid

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable says so only where `grad` itself needs a gradient: after a plain
            # loss.backward(create_graph=True) it would drop the second derivative in silence.
            raise RuntimeError("info_nce cannot be differentiated twice: leave out create_graph.")
        d_anchors, d_contrast = ctx.saved_tensors
        return (
            d_anchors * grad if ctx.needs_input_grad[0] else None,
            None,
            d_contrast * grad if ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )


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

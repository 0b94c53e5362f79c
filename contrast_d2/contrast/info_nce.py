"""The supervised InfoNCE loss that all pixel-contrast methods share, exact and in linear memory.

For anchor i with positives P(i) (its class) and negatives N(i) (others), s = z.z / temperature:

    l(i, j) = -log( e^s_ij / (e^s_ij + sum_{n in N(i)} e^s_in) ) = softplus( n_i - s_ij )
    n_i     = logsumexp_{n in N(i)} s_in
    L       = mean_i mean_{j in P(i)} l(i, j)

Only the one positive stands in each denominator, unlike in SupCon. The softplus form never leaves
the range of fp32, at any temperature.

Shape letters: A anchors, C contrast samples, D embedding width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from .info_nce_masked import masked_info_nce
from .info_nce_sorted import Products, is_exact, sorted_info_nce
from .info_nce_triton import is_available, triton_info_nce
from .kernel_result import KernelResult
from .pairs import PairSelector

PRODUCTS: tuple[Products, ...] = ("fp32", "bf16")


def info_nce(
    anchors: Tensor,
    labels: Tensor,
    contrast: Tensor | None = None,
    contrast_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    anchors_lead_contrast: bool = False,
    count_empty_anchors: bool = False,
    class_counts: Sequence[int] | None = None,
    contrast_class_counts: Sequence[int] | None = None,
    products: Products = "fp32",
    host_reads: bool = True,
    pairs: PairSelector | None = None,
) -> Tensor:
    """Supervised InfoNCE of anchors against a contrast set.

    Value and gradient are computed together, block by block of the similarity matrix, so neither an
    A x C matrix nor a graph over one is ever held. Gradients reach both sets. The result cannot be
    differentiated twice. Similarities are fp32 (fp64 for fp64 input), whatever autocast says.

    Three kernels share the work: a Triton kernel on CUDA; on the CPU one for samples in the order
    of their classes; and one in plain PyTorch for all else, that is fp64 on CUDA, GPUs without
    Triton, on the CPU temperatures below about 0.03, and a selection of `pairs`.

    Args:
        anchors: (A, D) unit vectors. Much longer ones leave the range of fp32 on the CPU, and the
            loss is then not finite.
        labels: (A,) integer classes. A negative label is padding: no anchor.
        contrast: (C, D) unit vectors; None contrasts the anchors among themselves, each without
            itself.
        contrast_labels: (C,) integer classes, required with `contrast`. A sample with a negative
            label, such as an unfilled slot of a memory bank, is neither positive nor negative.
        temperature: divides the similarities; above 0.
        anchors_lead_contrast: the first A contrast samples are the anchors, in their order: an
            anchor is then not its own positive.
        count_empty_anchors: average over all anchors, of which those without a positive give 0, and
            not only over those with one.
        class_counts: number of anchors of each class 0..K-1, where the anchors are ordered by class
            and the host knows, as after a draw. Spares the CPU the sorting.
        contrast_class_counts: the same of the contrast set.
        products: "bf16" rounds the operands of the products to bf16: on CUDA with Triton all of
            them, elsewhere those of the gradient. Similarities and sums stay fp32.
        host_reads: False keeps the host from reading labels, at the price of the CPU's fast kernel
            where the class counts are not given. On CUDA nothing is read anyway.
        pairs: chooses which positives and negatives of each anchor count; None for all of them.
            An anchor whose positives are all left out counts as one without a positive.

    Returns:
        The loss, 0-dim fp32 (or fp64). It is 0, still connected to the graph, where no anchor has a
        positive or no anchor has a negative.

    Raises:
        ValueError: shapes, temperature, an unknown or missing argument, or counts that do not match
            the samples.

    Reference: Pissas et al., ECCV 2022, equations (1), (2) and, with another scale's anchors as
        contrast set, (4); Wang et al., "Exploring Cross-Image Pixel Contrast for Semantic
        Segmentation", ICCV 2021, equation (3).
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be above 0.")
    _check_set("anchors", anchors, labels, class_counts)
    _check_contrast(anchors, contrast, contrast_labels, contrast_class_counts)
    if anchors_lead_contrast:
        if contrast is None:
            raise ValueError("anchors_lead_contrast goes with a contrast set.")
        if len(contrast) < len(anchors):
            raise ValueError(
                f"anchors_lead_contrast: {len(contrast)} contrast samples cannot begin with "
                f"{len(anchors)} anchors."
            )
    dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
    if products not in PRODUCTS:
        raise ValueError(f"products={products!r}: choose one of {list(PRODUCTS)}.")
    if products == "bf16" and dtype == torch.float64:
        raise ValueError("products='bf16' with fp64 embeddings: give fp32 ones, or 'fp32'.")

    counts_known = class_counts is not None and (
        contrast is None or contrast_class_counts is not None
    )
    kernel: Callable[..., KernelResult] = masked_info_nce
    if pairs is not None:
        kernel = partial(masked_info_nce, pairs=pairs)
    elif dtype == torch.float32 and is_available(anchors):
        kernel = triton_info_nce
    elif (
        anchors.device.type == "cpu"
        and (host_reads or counts_known)
        and is_exact(temperature, len(anchors) if contrast is None else len(contrast))
    ):
        kernel = partial(
            sorted_info_nce,
            class_counts=class_counts,
            contrast_class_counts=contrast_class_counts,
        )
    options: dict[str, Any] = {
        "contrast_labels": contrast_labels,
        "temperature": temperature,
        "anchors_lead_contrast": anchors_lead_contrast,
        "products": products,
    }
    with torch.autocast(anchors.device.type, enabled=False):
        return _InfoNCE.apply(
            anchors.to(dtype),
            None if contrast is None else contrast.to(dtype),
            labels,
            partial(kernel, **options),
            count_empty_anchors,
        )


def _check_contrast(
    anchors: Tensor,
    contrast: Tensor | None,
    labels: Tensor | None,
    class_counts: Sequence[int] | None,
) -> None:
    if contrast is None:
        if labels is not None or class_counts is not None:
            raise ValueError("contrast_labels and contrast_class_counts go with a contrast set.")
        return
    if labels is None:
        raise ValueError("a contrast set needs contrast_labels.")
    _check_set("contrast", contrast, labels, class_counts)
    if anchors.shape[1] != contrast.shape[1]:
        raise ValueError(
            f"anchors are {anchors.shape[1]} wide and contrast samples {contrast.shape[1]}: "
            "both must come from projectors of the same embed_dim."
        )


def _check_set(
    name: str, embeddings: Tensor, labels: Tensor, class_counts: Sequence[int] | None
) -> None:
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{name}: expected (N, D) embeddings with (N,) labels, got "
            f"{tuple(embeddings.shape)} and {tuple(labels.shape)}."
        )
    if class_counts is not None and sum(class_counts) != len(labels):
        raise ValueError(
            f"{name}: the class counts add up to {sum(class_counts)}, not to {len(labels)} samples."
        )


class _InfoNCE(Function):
    """Computes the loss and, where asked for, its gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx,
        anchors: Tensor,
        contrast: Tensor | None,
        labels: Tensor,
        kernel: Callable[..., KernelResult],
        count_empty_anchors: bool,
    ) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        result = kernel(anchors, labels, contrast, needs_gradient=needs_gradient)
        count = (labels >= 0).sum() if count_empty_anchors else result.num_valid
        count = count.clamp(min=1)
        ctx.save_for_backward(count, result.d_anchors, result.d_contrast)
        return (result.total / count).to(anchors.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # once_differentiable says so only where `grad` itself needs a gradient: after a plain
            # loss.backward(create_graph=True) it would drop the second derivative in silence.
            raise RuntimeError("info_nce cannot be differentiated twice: leave out create_graph.")
        count, d_anchors, d_contrast = ctx.saved_tensors
        grad = grad / count.to(grad.dtype)
        return (
            None if d_anchors is None else d_anchors * grad,
            None if d_contrast is None else d_contrast * grad,
            None,
            None,
            None,
        )

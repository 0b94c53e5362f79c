"""Class means as anchors, and the loss of pixels against them.

Shape letters: I layers, B images, K classes, D embedding width, h w a feature map, P its pixels,
W processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from .sampling import Batch
from .sets import at_least_fp32, refuse_second_derivative, squared_lengths


class LayerPixels(NamedTuple):
    """The pixels of one layer.

    Attributes:
        vectors: (B, D, P) fp32 (fp64 for fp64 maps), not normalised: where unit vectors are meant,
            columns of products are multiplied by `inverse_lengths`, which spares a copy of the map.
        inverse_lengths: (B, P).
        of_class: (B, K, P) bool, whether the pixel's label is the class; nowhere for ignored ones.
    """

    vectors: Tensor
    inverse_lengths: Tensor
    of_class: Tensor


class ClassMeans(NamedTuple):
    """Class means of unit embeddings at all layers, over the batch.

    Attributes:
        means: (I, K, D); zero where there is no pixel.
        counts: (I, K) number of pixels, as floats.
        exists: (I, K) bool, whether the layer has a pixel of the class.
    """

    means: Tensor
    counts: Tensor
    exists: Tensor


def layer_pixels(embeddings: Tensor, label_map: Tensor, num_classes: int) -> LayerPixels:
    """Brings embeddings (B, D, h, w), not normalised, and their labels (B, h, w) together."""
    vectors = at_least_fp32(embeddings.flatten(2))
    classes = torch.arange(num_classes, device=label_map.device)[:, None]
    of_class = label_map.flatten(1)[:, None] == classes
    return LayerPixels(vectors, _InverseLengths.apply(vectors), of_class)


class _InverseLengths(Function):
    """1 / length of vectors (B, D, P), in a third of the time that autograd takes; 1e12, and no
    gradient, for those that are no longer than 1e-12."""

    @staticmethod
    def forward(ctx, vectors: Tensor) -> Tensor:
        squares = squared_lengths(vectors)
        regular = squares > 1e-24
        inverse = squares.clamp_(min=1e-24).rsqrt_()
        ctx.save_for_backward(vectors, inverse, regular)
        return inverse

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        refuse_second_derivative("Contextrast")
        vectors, inverse, regular = ctx.saved_tensors
        factor = torch.where(regular, -(inverse**3) * grad, 0)
        return vectors * factor[:, None]


def class_means(layers: Sequence[LayerPixels], batch: Batch) -> ClassMeans:
    """Means of the unit embeddings of each class at all layers of a batch."""
    sums, counts = [], []
    for pixels in layers:
        weights_BKP = pixels.of_class * pixels.inverse_lengths[:, None]
        sums.append((weights_BKP @ pixels.vectors.mT).sum(dim=0))
        counts.append(pixels.of_class.sum(dim=(0, 2)))
    sums_IKD = torch.stack(sums)
    counts_IK1 = torch.stack(counts).to(sums_IKD.dtype)[..., None]
    both = batch.of_all_processes(torch.cat([sums_IKD, counts_IK1], dim=-1)).sum(dim=0)
    sums_IKD, counts_IK = both[..., :-1], both[..., -1].detach()
    return ClassMeans(sums_IKD / counts_IK.clamp(min=1)[..., None], counts_IK, counts_IK > 0)


def prioritised_anchors(anchors_IKD: Tensor, exists_IK: Tensor) -> tuple[Tensor, Tensor]:
    """The anchor of each class at the deepest layer where it exists, (K, D); and whether it does.

    At that layer no anchor is mixed: it is the deepest of all, or the class has vanished there.
    """
    depth = torch.arange(1, len(anchors_IKD) + 1, device=anchors_IKD.device)[:, None]
    deepest_K = (exists_IK * depth).amax(dim=0)
    layer = (deepest_K - 1).clamp(min=0)[None, :, None].expand(1, -1, anchors_IKD.shape[2])
    return anchors_IKD.gather(0, layer)[0], deepest_K > 0


def log_sum_of_negatives(logits: Tensor, negative: Tensor) -> Tensor:
    """(K,) log-sum-exps over the negatives (B, K, P) of each class; about -1e38 without any.

    Finite, so that the log-sum-exp over no negatives has a gradient of 0 and not one that depends
    on how -inf - -inf is treated.
    """
    least = torch.finfo(logits.dtype).min
    return torch.where(negative, logits, least).logsumexp(dim=(0, 2))


def pixel_anchor_loss(
    logits: Tensor, of_class: Tensor, log_negatives: Tensor, weights: Tensor
) -> Tensor:
    """Contrasts pixels with the anchor of their class.

        sum_n weights_n sum_{p of class n} softplus( log_negatives_n - logits_np )

    which with log_negatives_n = logsumexp over the negatives of class n and weights_n = 1 / (number
    of classes * number of pixels of class n) is the mean over classes of the InfoNCE whose anchor
    is the class, with one positive in each denominator. A class without negatives gives 0.

    Args:
        logits: (B, K, P) similarities of anchors and pixels, over the temperature.
        of_class: (B, K, P) bool, at most one class for each pixel.
        log_negatives: (K,).
        weights: (K,).

    Reference: Sung et al., CVPR 2024; in "Contextrast++", arXiv 2608.22679, equations (5), (6).
    """
    # Sums with one term each: cheaper to differentiate than an index.
    gap_BP = torch.where(of_class, log_negatives[:, None] - logits, 0).sum(dim=1)
    weight_BP = torch.where(of_class, weights[:, None], 0).sum(dim=1)
    # The threshold is where softplus(x) = x to the last bit of float64 as well.
    return (F.softplus(gap_BP, threshold=40) * weight_BP).sum()

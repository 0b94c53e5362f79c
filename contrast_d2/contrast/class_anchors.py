"""Class means as anchors, and the loss of pixels against them.

Shape letters: I layers, B images, K classes, D embedding width, h w a feature map, P its pixels,
W processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        vectors: (B, D, P) fp32 (fp64 for fp64 maps), not normalised: columns of products are
            divided by their lengths instead, which spares a copy of the map.
        labels: (B, P) int64 classes; K for ignored pixels.
    """

    vectors: Tensor
    labels: Tensor


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
    labels = label_map.flatten(1)
    ignored = (labels < 0) | (labels >= num_classes)
    labels = labels.masked_fill(ignored, num_classes)
    return LayerPixels(at_least_fp32(embeddings.flatten(2)), labels)


# Elements of classes and pixels (K, P) of several images that are alive at a time: on a CPU they
# should stay in the cache, a GPU does better with few launches.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 24


def _chunks(vectors: Tensor, num_classes: int, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of the batch: its slice, the vectors, their inverse lengths, and others."""
    elements = _CPU_ELEMENTS if vectors.device.type == "cpu" else _GPU_ELEMENTS
    size = max(1, elements // ((num_classes + 1) * vectors.shape[2]))
    return zip(*(x.split(size) for x in (vectors, *others)), strict=True)


def _inverse_lengths(vectors: Tensor) -> Tensor:
    """(B, P) 1 / length of vectors (B, D, P); 0 for those that are no longer than 1e-12, which
    stand for no direction and get no gradient."""
    squares = squared_lengths(vectors)
    return squares.clamp(min=1e-24).rsqrt_().mul_(squares > 1e-24)


def _towards_vectors(d_units: Tensor, vectors: Tensor, inverse: Tensor) -> Tensor:
    """The gradient (B, D, P) of vectors, by that of the unit vectors, which it takes apart."""
    units = vectors * inverse[:, None]
    along = (units * d_units).sum(dim=1, keepdim=True)
    return d_units.addcmul_(units, along, value=-1).mul_(inverse[:, None])


class _ClassSums(Function):
    """(K, D) sums of the unit vectors of each class, without a normalised copy of the map."""

    @staticmethod
    def forward(ctx, vectors: Tensor, labels: Tensor, num_classes: int) -> Tensor:
        inverse = _inverse_lengths(vectors)
        ctx.save_for_backward(vectors, labels, inverse)
        sums = vectors.new_zeros(num_classes, vectors.shape[1])
        for z, y, of_pixel in _chunks(vectors, num_classes, labels, inverse):
            weights = z.new_zeros(len(z), num_classes + 1, z.shape[2])
            weights.scatter_(1, y[:, None], of_pixel[:, None])
            sums += (weights[:, :-1] @ z.mT).sum(dim=0)
        return sums

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative("Contextrast")
        vectors, labels, inverse = ctx.saved_tensors
        of_class_DK = F.pad(grad, (0, 0, 0, 1)).T.contiguous()
        d_vectors = torch.empty_like(vectors)
        for d, z, y, of_pixel in _chunks(d_vectors, len(grad), vectors, labels, inverse):
            d_units = of_class_DK[:, y].transpose(0, 1)
            d.copy_(_towards_vectors(d_units, z, of_pixel))
        return d_vectors, None, None


class AnchorLogits(NamedTuple):
    """Similarities of pixels and class anchors, over the temperature.

    Attributes:
        own: (B, P) of each pixel and the anchor of its class; 0 for ignored pixels.
        log_negatives: (K,) log-sum-exp over the negatives of each class; about -1e38 without any.
        negative_sums: (K,) sum over these negatives, without gradient.
        num_negatives: (K,) their number.
    """

    own: Tensor
    log_negatives: Tensor
    negative_sums: Tensor
    num_negatives: Tensor


def anchor_logits(
    pixels: LayerPixels, anchors: Tensor, chosen: Tensor, *, own_class: bool
) -> AnchorLogits:
    """Compares the pixels of a layer with class anchors, a part of the batch at a time.

    Args:
        pixels: of the layer.
        anchors: (K, D), over the temperature.
        chosen: (B, P) int64, the class that each negative is drawn for; -1 for other pixels.
        own_class: whether a negative is one of its own class, or of all others.
    """
    return AnchorLogits(*_AnchorLogits.apply(*pixels, anchors, chosen, own_class))


class _AnchorLogits(Function):
    """Computes what `AnchorLogits` says, and in the backward pass the similarities once more."""

    @staticmethod
    def forward(
        ctx, vectors: Tensor, labels: Tensor, anchors: Tensor, chosen: Tensor, own_class: bool
    ) -> tuple[Tensor, ...]:
        inverse = _inverse_lengths(vectors)
        own, parts = [], []
        sums, numbers = anchors.new_zeros(2, len(anchors))
        for z, y, where, of_pixel in _chunks(vectors, len(anchors), labels, chosen, inverse):
            logits, negative = _compare(z, of_pixel, anchors, where, own_class)
            own.append(F.pad(logits, (0, 0, 0, 1)).gather(1, y[:, None]).squeeze(1))
            sums += torch.where(negative, logits, 0).sum(dim=(0, 2))
            numbers += negative.sum(dim=(0, 2))
            parts.append(_log_sum(logits, negative))
        log_negatives = torch.stack(parts).logsumexp(dim=0)
        ctx.own_class = own_class
        ctx.save_for_backward(vectors, labels, anchors, chosen, inverse, log_negatives)
        results = torch.cat(own), log_negatives, sums, numbers
        ctx.mark_non_differentiable(*results[2:])
        return results

    @staticmethod
    def backward(ctx, d_own: Tensor, d_negatives: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("Contextrast")
        vectors, labels, anchors, chosen, inverse, log_negatives = ctx.saved_tensors
        d_vectors, d_anchors = torch.empty_like(vectors), torch.zeros_like(anchors)
        for d, z, y, where, of_pixel, d_y in _chunks(
            d_vectors, len(anchors), vectors, labels, chosen, inverse, d_own
        ):
            logits, negative = _compare(z, of_pixel, anchors, where, ctx.own_class)
            softmax = (logits - log_negatives[:, None]).masked_fill_(~negative, -torch.inf).exp_()
            d_logits = F.pad(softmax.mul_(d_negatives[:, None]), (0, 0, 0, 1))
            d_logits = d_logits.scatter_add_(1, y[:, None], d_y[:, None])[:, :-1]
            d_anchors += ((d_logits * of_pixel[:, None]) @ z.mT).sum(dim=0)
            d_units = anchors.T.expand(len(z), -1, -1) @ d_logits
            d.copy_(_towards_vectors(d_units, z, of_pixel))
        return d_vectors, None, d_anchors, None, None


def _compare(
    vectors: Tensor, inverse: Tensor, anchors: Tensor, chosen: Tensor, own_class: bool
) -> tuple[Tensor, Tensor]:
    """(B, K, P) similarities, and which pixels are negatives of which class."""
    # Two factors of three dimensions: with one of two, matmul would copy the map.
    logits = (anchors.expand(len(vectors), -1, -1) @ vectors).mul_(inverse[:, None])
    classes = torch.arange(len(anchors), device=anchors.device)[:, None]
    own = chosen[:, None] == classes
    return logits, own if own_class else ~own & (chosen >= 0)[:, None]


def _log_sum(logits: Tensor, negative: Tensor) -> Tensor:
    """(K,) log-sum-exps over the negatives of each class.

    Finite, so that those over no negatives have a gradient of 0 and not one that depends on how
    -inf - -inf is treated.
    """
    least = torch.finfo(logits.dtype).min
    return torch.where(negative, logits, least).logsumexp(dim=(0, 2))


def class_means(layers: Sequence[LayerPixels], num_classes: int, batch: Batch) -> ClassMeans:
    """Means of the unit embeddings of each class at all layers of a batch."""
    sums, counts = [], []
    for vectors, labels in layers:
        sums.append(_ClassSums.apply(vectors, labels, num_classes))
        ones = torch.ones_like(labels, dtype=vectors.dtype).flatten()
        counts.append(vectors.new_zeros(num_classes + 1).index_add_(0, labels.flatten(), ones)[:-1])
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


def pixel_anchor_loss(
    logits: Tensor, labels: Tensor, log_negatives: Tensor, weights: Tensor
) -> Tensor:
    """Contrasts pixels with the anchor of their class.

        sum_n weights_n sum_{p of class n} softplus( log_negatives_n - logits_p )

    which with log_negatives_n = logsumexp over the negatives of class n and weights_n = 1 / (number
    of classes * number of pixels of class n) is the mean over classes of the InfoNCE whose anchor
    is the class, with one positive in each denominator. A class without negatives gives 0.

    Args:
        logits: (B, P) similarities of pixels and the anchor of their class, over the temperature.
        labels: (B, P) classes; K for ignored pixels.
        log_negatives: (K,).
        weights: (K,).

    Reference: Sung et al., CVPR 2024; in "Contextrast++", arXiv 2608.22679, equations (5), (6).
    """
    gap = F.pad(log_negatives, (0, 1))[labels] - logits
    # The threshold is where softplus(x) = x to the last bit of float64 as well.
    return (F.softplus(gap, threshold=40) * F.pad(weights, (0, 1))[labels]).sum()

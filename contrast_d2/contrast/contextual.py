"""Contextrast: contextual contrastive learning (Sung et al., CVPR 2024).

Shape letters: I layers, B images, K classes, D embedding width, h w a feature map, P its pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .boundary import BoundaryPixels, boundary_negatives, check_fraction
from .class_anchors import (
    AnchorLogits,
    ClassMeans,
    LayerPixels,
    anchor_logits,
    class_means,
    layer_pixels,
    pixel_anchor_loss,
)
from .inspection import evenly_spread
from .method import ContrastMethod
from .projector import MultiScaleProjector
from .sampling import Batch
from .sets import PixelDraw, unit_vectors
from .terms import OwnTerm, PairSample, Term

Negatives = Literal["other_classes", "false_positives", "own_class"]


class Contextrast(ContrastMethod):
    """Contrasts pixels with class anchors that know the deepest layer's context.

    At each layer i, the anchor of class n is the mean of the unit embeddings of its pixels in the
    batch, mixed with the deepest layer's mean where the class still exists there:

        a_in = (1 - w_h) mean_in + w_h mean_In,  at length 1 again
        L    = weight * sum_i lambda_i mean_n mean_{z of class n} softplus( LSE_in - a_in.z / t )
        LSE_in = logsumexp of a_in.z / t over the negatives of class n at layer i

    Negatives are wrongly predicted pixels near the boundary of their region of errors
    (`boundary_negatives`). Gradients reach pixels and, through the means, anchors. The text of the
    paper admits more than one reading of who the negatives of class n are:

    * `negatives="other_classes"`: pixels of the other classes, near the boundary of the region in
      which their own class was missed. None of them belongs to class n.
    * `negatives="false_positives"`: pixels wrongly predicted as class n. A rare class may have
      none, and then gives 0.
    * `negatives="own_class"`: pixels of class n that were missed, the equations to the letter. The
      same pixels are positives of class n, so it pulls and pushes at once; for comparison.

    Args:
        projector, num_classes, warmup_iters, across_processes: as in `ContrastMethod`.
        layers: lambda_i by name of the feature map, from shallow to deep; the last is the deepest
            layer, e.g. {"res2": 0.1, "res3": 0.4, "res4": 0.7, "res5": 1.0}.
        weight: of the contrast in the total loss, the paper's alpha.
        temperature: t. The paper does not state it; ours: that of the methods it compares with.
        deepest_weight: w_h. The paper does not state it; ours: one half.
        boundary_fraction: part of each region of errors that is selected, in (0, 1].
        negatives: "other_classes", "false_positives" or "own_class".

    Raises:
        ValueError: no layer, a layer without projector, an argument out of its range, or an unknown
            choice.

    Reference: Sung et al., "Contextrast: Contextual Contrastive Learning for Semantic
        Segmentation", CVPR 2024.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        num_classes: int,
        *,
        layers: Mapping[str, float],
        weight: float = 0.1,
        temperature: float = 0.1,
        deepest_weight: float = 0.5,
        boundary_fraction: float = 0.5,
        negatives: Negatives = "other_classes",
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        if negatives not in get_args(Negatives):
            raise ValueError(f"negatives={negatives!r}: choose one of {list(get_args(Negatives))}.")
        if not layers:
            raise ValueError("layers={}: name at least one feature map, with its weight.")
        above_0 = {f"layers[{name!r}]": value for name, value in layers.items()}
        for name, value in {**above_0, "weight": weight, "temperature": temperature}.items():
            if not value > 0:
                raise ValueError(f"{name}={value}: must be above 0.")
        if not 0 <= deepest_weight <= 1:
            raise ValueError(f"deepest_weight={deepest_weight}: must be from 0 to 1.")
        check_fraction(boundary_fraction)
        super().__init__(
            projector,
            num_classes,
            features=list(layers),
            names=list(layers),
            needs_dense_embeddings=True,
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.layers = dict(layers)
        self.weight = weight
        self.temperature = temperature
        self.deepest_weight = deepest_weight
        self.boundary_fraction = boundary_fraction
        self.negatives = negatives

    def terms(self, batch: Batch) -> list[Term | OwnTerm]:
        """One term for each layer."""
        with torch.autocast(batch.device.type, enabled=False):
            layers, means, anchors_IKD = self.class_anchors(batch)
            return self.pixel_anchor_terms(batch, layers, means, anchors_IKD)

    def class_anchors(self, batch: Batch) -> tuple[list[LayerPixels], ClassMeans, Tensor]:
        """The pixels of all layers, the class means, and the anchors (I, K, D) made of these."""
        layers = [
            layer_pixels(batch.maps[name], batch.label_map(name), self.num_classes)
            for name in self.layers
        ]
        means = class_means(layers, self.num_classes, batch)
        shallow, deepest = means.means[:-1], means.means[-1]
        # A class that has vanished at the deepest layer keeps its own mean.
        mixed = torch.where(means.exists[-1][:, None], self.mix(means), shallow)
        anchors_IKD = torch.cat([mixed, deepest[None]])
        return layers, means, F.normalize(anchors_IKD, dim=-1)

    def mix(self, means: ClassMeans) -> Tensor:
        """The means of all layers but the deepest, mixed with those of the deepest."""
        return means.means[:-1].lerp(means.means[-1], self.deepest_weight)

    def pixel_anchor_terms(
        self, batch: Batch, layers: list[LayerPixels], means: ClassMeans, anchors_IKD: Tensor
    ) -> list[Term | OwnTerm]:
        """Pixels against the anchors of their class, layer by layer."""
        parts = [
            self._layer(batch, name, pixels, anchors_KD)
            for name, pixels, anchors_KD in zip(self.layers, layers, anchors_IKD, strict=True)
        ]
        own_IK = torch.stack([part.logits.log_negatives for part in parts])
        log_negatives_IK = batch.of_all_processes(own_IK).logsumexp(dim=0)
        num_classes_I = means.exists.sum(dim=1, keepdim=True).clamp(min=1)
        weights_IK = means.exists / means.counts.clamp(min=1) / num_classes_I
        terms: list[Term | OwnTerm] = []
        for i, ((name, weight), part) in enumerate(zip(self.layers.items(), parts, strict=True)):
            labels, exists_K = layers[i].labels, means.exists[i]
            share = pixel_anchor_loss(part.logits.own, labels, log_negatives_IK[i], weights_IK[i])
            terms.append(
                OwnTerm(
                    name,
                    share,
                    self.weight * weight,
                    self._statistics(part, labels, exists_K),
                    partial(_drawn, batch.label_map(name), part.errors.selected),
                    partial(self._pairs, part, layers[i], anchors_IKD[i].detach(), exists_K),
                    means.counts[i],
                )
            )
        return terms

    def _layer(self, batch: Batch, name: str, pixels: LayerPixels, anchors_KD: Tensor) -> _Layer:
        errors = boundary_negatives(
            batch.label_map(name),
            batch.predictions(name),
            self.num_classes,
            fraction=self.boundary_fraction,
            error_map=(
                "false_positives" if self.negatives == "false_positives" else "false_negatives"
            ),
            generator=batch.generator,
        )
        chosen = errors.region.masked_fill(~errors.selected, -1).flatten(1)
        own_class = self.negatives != "other_classes"
        logits = anchor_logits(pixels, anchors_KD / self.temperature, chosen, own_class=own_class)
        return _Layer(logits, chosen, errors)

    @torch.no_grad()
    def _statistics(self, part: _Layer, labels: Tensor, exists_K: Tensor) -> dict[str, Tensor]:
        wrong = part.errors.region >= 0
        at_boundary = (part.errors.squared_distance == 1).float()
        logits = part.logits
        positive = _masked_mean(logits.own, labels < self.num_classes)
        negatives = (logits.num_negatives * exists_K).sum()
        return {
            "errors": wrong.sum().float(),
            "negatives": part.errors.selected.sum().float(),
            # The share of wrong pixels from which selection is by chance alone.
            "errors_at_boundary": _masked_mean(at_boundary, wrong),
            "classes": exists_K.sum().float(),
            "positive_similarity": positive * self.temperature,
            "negative_similarity": (logits.negative_sums * exists_K).sum()
            / negatives
            * self.temperature,
        }

    @torch.no_grad()
    def _pairs(
        self, part: _Layer, pixels: LayerPixels, anchors_KD: Tensor, exists_K: Tensor, most: int
    ) -> PairSample:
        """Anchors against evenly spread pixels."""
        classes = exists_K.nonzero()[:, 0]
        every = pixels.labels.flatten()
        used = evenly_spread(every < self.num_classes, most // self.num_classes)
        image = used.div(pixels.labels.shape[1], rounding_mode="floor")
        rows = pixels.vectors[image, :, used - image * pixels.labels.shape[1]]
        cosines = anchors_KD[classes] @ unit_vectors(rows).T
        labels, chosen = every[used], part.chosen.flatten()[used]
        negative = chosen == classes[:, None]
        if self.negatives == "other_classes":
            negative = ~negative & (chosen >= 0)
        return PairSample(cosines, labels == classes[:, None], negative, classes, labels)


class _Layer(NamedTuple):
    """What the term of a layer is made of.

    Attributes:
        logits: of its pixels.
        chosen: (B, P) int64, in whose region of errors a negative lies; -1 for other pixels.
        errors: wrong pixels.
    """

    logits: AnchorLogits
    chosen: Tensor
    errors: BoundaryPixels


def _drawn(label_map: Tensor, selected: Tensor) -> dict[str, PixelDraw]:
    image, pixel = selected.flatten(1).nonzero(as_tuple=True)
    labels = label_map.flatten(1)[image, pixel].long()
    return {"boundary negatives": PixelDraw(image, pixel, labels, None)}


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where the mask is set; nan where it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum()

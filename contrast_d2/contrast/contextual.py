"""Contextrast: contextual contrastive learning (Sung et al., CVPR 2024), and its extension.

Shape letters: I layers, B images, K classes, D embedding width, H W the labels' size, h w a feature
map, P its pixels, W processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from .boundary import BoundaryPixels, boundary_negatives, check_fraction
from .class_anchors import (
    ClassMeans,
    LayerPixels,
    class_means,
    layer_pixels,
    of_all_processes,
    pixel_anchor_loss,
    prioritised_anchors,
)
from .contextual_plus import AdaptiveFusion, AnchorMemory
from .distributed import world_size
from .info_nce import info_nce
from .inspection import MOST_PAIRS, Inspection, evenly_spread
from .method import ContrastMethod, Warmup, connected_zero
from .output import ContrastOutput
from .projector import MultiScaleProjector
from .sampling import PixelDraw, predicted_labels

Negatives = Literal["other_classes", "false_positives", "own_class"]
Fusion = Literal["static", "adaptive"]


class Contextrast(ContrastMethod):
    """Contrasts pixels with class anchors that know the deepest layer's context.

    At each layer i, the anchor of class n is the mean of the unit embeddings of its pixels in the
    batch, mixed with the deepest layer's mean where the class still exists there:

        a_in = (1 - w_h) mean_in + w_h mean_In,  at length 1 again
        L    = weight * sum_i lambda_i mean_n mean_{z of class n} softplus( LSE_in - a_in.z / t )
        LSE_in = logsumexp of a_in.z / t over the negatives of class n at layer i

    Negatives are wrongly predicted pixels near the boundary of their region of errors
    (`boundary_negatives`). Gradients reach pixels and, through the means, anchors. Nothing is
    capped, and the host reads nothing from the device. Used in training only.

    The text of the paper admits more than one reading of who the negatives of class n are:

    * `negatives="other_classes"`: pixels of the other classes, near the boundary of the region in
      which their own class was missed. None of them belongs to class n.
    * `negatives="false_positives"`: pixels wrongly predicted as class n. A rare class may have
      none, and then gives 0.
    * `negatives="own_class"`: pixels of class n that were missed, the equations to the letter. The
      same pixels are positives of class n, so it pulls and pushes at once; for comparison.

    Contextrast++ adds two parts, here options. `fusion="adaptive"` learns the mixture of anchors
    (`AdaptiveFusion`). `anchor_memory` keeps so many past anchors of each class, and one more term,
    `loss_contrast_anchors`, contrasts with them the current anchor of each class, taken from the
    deepest layer where it exists; the memory holds the same anchors. The paper does not state
    the form of this InfoNCE; ours is that of `info_nce`, and its weight that of the others.

    Means and losses are those of one process, unless `across_processes` is set: then sums, counts
    and log-sum-exps of all processes are added up, and loss and gradients are those of one process
    with the global batch. The memory receives the anchors of all processes in either case.

    Args:
        projector: heads for the feature maps; those of maps that are no layer are dropped.
        num_classes: K.
        layers: lambda_i by name of the feature map, from shallow to deep; the last is the deepest
            layer, e.g. {"res2": 0.1, "res3": 0.4, "res4": 0.7, "res5": 1.0}. Contextrast++ has 0.3
            in the second place.
        weight: of the contrast in the total loss, the paper's alpha.
        temperature: t. The paper does not state it; ours: that of the methods it compares with.
        deepest_weight: w_h. The paper does not state it; ours: one half. An adaptive fusion begins
            with it.
        detach_deepest: send no gradient through the deepest means into the anchors of other layers.
        normalize_anchors: bring mixed anchors to length 1. Otherwise classes that spread have
            shorter anchors, as if they had a higher temperature.
        boundary_fraction: part of each region of errors that is selected, in (0, 1].
        negatives: "other_classes", "false_positives" or "own_class".
        extra_negatives: so many random labelled pixels of each layer are negatives too, of all
            classes but their own. None in the paper.
        min_pixels: a class with fewer pixels at a layer has no anchor there; 1 as in the paper.
        fusion: "static" or "adaptive".
        anchor_memory: anchors kept per class, 100 in Contextrast++; 0 for none, and no such term.
        warmup_iters: passes without contrast; the memory is filled. None in the paper.
        ramp_iters: passes over which the contrast then grows.
        across_processes: contrast over the global batch.

    Raises:
        ValueError: no layer, a layer without projector, an argument out of its range, or an unknown
            choice.

    Reference: Sung et al., "Contextrast: Contextual Contrastive Learning for Semantic
        Segmentation", CVPR 2024; Sung et al., "Contextrast++", arXiv 2608.22679, section III,
        equations (1) to (6) and (12) to (14).
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
        detach_deepest: bool = False,
        normalize_anchors: bool = True,
        boundary_fraction: float = 0.5,
        negatives: Negatives = "other_classes",
        extra_negatives: int = 0,
        min_pixels: int = 1,
        fusion: Fusion = "static",
        anchor_memory: int = 0,
        warmup_iters: int = 0,
        ramp_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        super().__init__(projector)
        for name, value, choices in (
            ("negatives", negatives, get_args(Negatives)),
            ("fusion", fusion, get_args(Fusion)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: choose one of {list(choices)}.")
        _check_numbers(
            layers, weight=weight, temperature=temperature, deepest_weight=deepest_weight
        )
        for name, count, least in (
            ("num_classes", num_classes, 1),
            ("extra_negatives", extra_negatives, 0),
            ("min_pixels", min_pixels, 1),
            ("anchor_memory", anchor_memory, 0),
        ):
            if count < least:
                raise ValueError(f"{name}={count}: needs at least {least}.")
        check_fraction(boundary_fraction)
        if fusion == "adaptive" and len(layers) == 1:
            raise ValueError(
                f"fusion='adaptive' with the one layer {list(layers)}: name another, or set "
                "fusion='static'."
            )
        projector.keep(layers)
        self.num_classes = num_classes
        self.layers = dict(layers)
        self.weight = weight
        self.temperature = temperature
        self.deepest_weight = deepest_weight
        self.detach_deepest = detach_deepest
        self.normalize_anchors = normalize_anchors
        self.boundary_fraction = boundary_fraction
        self.negatives = negatives
        self.extra_negatives = extra_negatives
        self.min_pixels = min_pixels
        self.across_processes = across_processes
        self.warmup = Warmup(warmup_iters, ramp_iters)
        width = projector.embed_dim
        self.fusion = None
        if fusion == "adaptive":
            self.fusion = AdaptiveFusion(width, len(layers) - 1, deepest_weight)
        self.memory = AnchorMemory(num_classes, width, anchor_memory) if anchor_memory else None

    # Random numbers and, in distributed training, collective calls: a break in one place.
    @torch.compiler.disable
    def contrast(
        self,
        maps: Mapping[str, Tensor],
        logits: Tensor | None,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """As in `ContrastMethod`; logits are needed.

        Returns:
            Losses `loss_contrast_<layer>`, and `loss_contrast_anchors` with an anchor memory. Of
            each layer the statistics `classes` (that have an anchor), `errors` (wrong pixels),
            `negatives` (selected wrong pixels), `errors_at_boundary` (the share of wrong pixels
            that touch another region by a side, from which selection is by chance alone), and
            `positive_similarity` and `negative_similarity` of anchors and pixels.

        Raises:
            ValueError: no class scores, or not of K classes.
        """
        if logits is None or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"Contextrast needs (B, {self.num_classes}, h', w') class scores, got "
                f"{None if logits is None else tuple(logits.shape)}."
            )
        factor = self.warmup()
        if self.inspection is not None:
            self.inspection.begin(labels, logits)
            if self.memory is not None:
                self.inspection.add_bank_fill("anchors", self.memory.fill_by_class())
        with torch.autocast(labels.device.type, enabled=False):
            if factor == 0:
                return self._without_contrast(maps, labels)
            layers = self._pixels(maps, labels)
            own = self._class_means(layers)
            anchors_IKD = self._mix(own)
            losses, statistics = self._pixel_anchor(layers, own, anchors_IKD, logits, generator)
            if self.memory is not None:
                losses["anchors"] = self._anchor_anchor(self.memory, anchors_IKD, own.exists)
        scale = self.weight * factor
        return ContrastOutput(
            {f"loss_contrast_{name}": scale * loss for name, loss in losses.items()},
            {f"contrast/{name}": value for name, value in statistics.items()},
        )

    def _without_contrast(self, maps: Mapping[str, Tensor], labels: Tensor) -> ContrastOutput:
        """Zeros, on the graph of all that a contrast would use. The memory is filled."""
        if self.memory is not None:
            with torch.no_grad():
                own = self._class_means(self._pixels(maps, labels))
                self._remember(self.memory, *prioritised_anchors(self._mix(own), own.exists))
        used = [*(maps[name] for name in self.layers), *self._fusion_parameters()]
        zero = connected_zero(used)
        names = [*self.layers, *([] if self.memory is None else ["anchors"])]
        return ContrastOutput({f"loss_contrast_{name}": zero for name in names}, {})

    def _fusion_parameters(self) -> list[Tensor]:
        return [] if self.fusion is None else list(self.fusion.parameters())

    def _pixels(self, maps: Mapping[str, Tensor], labels: Tensor) -> list[LayerPixels]:
        return [layer_pixels(maps[name], labels, self.num_classes) for name in self.layers]

    def _class_means(self, layers: list[LayerPixels]) -> ClassMeans:
        return class_means(
            layers, min_pixels=self.min_pixels, across_processes=self.across_processes
        )

    def _classes(self, like: Tensor) -> Tensor:
        """(K, 1) class numbers."""
        return torch.arange(self.num_classes, device=like.device)[:, None]

    def _mix(self, own: ClassMeans) -> Tensor:
        """The anchors of all layers, (I, K, D)."""
        shallow, deepest = own.means[:-1], own.means[-1]
        if self.detach_deepest:
            deepest = deepest.detach()
        if self.fusion is None:
            mixed = shallow.lerp(deepest, self.deepest_weight)
        else:
            mixed = self.fusion(shallow, deepest, own.exists[:-1], own.exists[-1])
        # A class that has vanished at the deepest layer keeps its own mean.
        mixed = torch.where(own.exists[-1][:, None], mixed, shallow)
        anchors_IKD = torch.cat([mixed, own.means[-1:]])
        return F.normalize(anchors_IKD, dim=-1) if self.normalize_anchors else anchors_IKD

    def _pixel_anchor(
        self,
        layers: list[LayerPixels],
        own: ClassMeans,
        anchors_IKD: Tensor,
        logits: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by layer, with their lambda, and statistics."""
        statistics: dict[str, Tensor] = {}
        similarities, log_negatives_K = [], []
        for i, (name, pixels) in enumerate(zip(self.layers, layers, strict=True)):
            errors = boundary_negatives(
                pixels.label_map,
                predicted_labels(logits, pixels.label_map.shape[-2:]),
                self.num_classes,
                fraction=self.boundary_fraction,
                error_map=(
                    "false_positives" if self.negatives == "false_positives" else "false_negatives"
                ),
                generator=generator,
            )
            negative_BKP = self._negatives(pixels, errors, generator)
            similarity_BKP = self._similarities(anchors_IKD[i], pixels)
            if self.inspection is not None:
                self.inspection.add_anchor_pixels(name, own.counts[i])
                self._inspect(
                    self.inspection,
                    name,
                    pixels,
                    errors,
                    own.exists[i],
                    similarity_BKP,
                    negative_BKP,
                )
            similarities.append(similarity_BKP)
            # Finite, so that a log-sum-exp over no negatives has a gradient of 0 and not one that
            # depends on how -inf - -inf is treated.
            least = torch.finfo(similarity_BKP.dtype).min
            log_negatives_K.append(
                torch.where(negative_BKP, similarity_BKP, least).logsumexp(dim=(0, 2))
            )
            quantities = _error_statistics(errors)
            quantities["classes"] = own.exists[i].sum().float()
            for sign, pairs in (("positive", pixels.of_class), ("negative", negative_BKP)):
                mean = _masked_mean(similarity_BKP.detach(), pairs & own.exists[i][:, None])
                quantities[f"{sign}_similarity"] = mean * self.temperature
            statistics.update({f"{name}/{q}": value for q, value in quantities.items()})

        log_negatives_IK = torch.stack(log_negatives_K)
        processes = 1
        if self.across_processes and world_size() > 1:
            log_negatives_IK = of_all_processes(log_negatives_IK).logsumexp(dim=0)
            # This process adds the share of its own pixels; DistributedDataParallel divides.
            processes = world_size()
        num_classes_I = own.exists.sum(dim=1, keepdim=True).clamp(min=1)
        weights_IK = own.exists / own.counts.clamp(min=1) / num_classes_I
        losses: dict[str, Tensor] = {}
        for i, (name, weight) in enumerate(self.layers.items()):
            loss = pixel_anchor_loss(
                similarities[i], layers[i].of_class, log_negatives_IK[i], weights_IK[i]
            )
            losses[name] = processes * weight * loss
        return losses, statistics

    def _inspect(
        self,
        inspection: Inspection,
        layer: str,
        pixels: LayerPixels,
        errors: BoundaryPixels,
        exists_K: Tensor,
        similarity_BKP: Tensor,
        negative_BKP: Tensor,
    ) -> None:
        """Notes the negatives of a layer, and how similar pixels are to the anchors."""
        label_map = pixels.label_map.flatten(1).long()
        image, pixel = errors.selected.flatten(1).nonzero(as_tuple=True)
        draw = PixelDraw(image, pixel, label_map[image, pixel], None)
        inspection.add_draw(layer, "boundary negatives", tuple(pixels.label_map.shape[-2:]), draw)
        classes = exists_K.nonzero()[:, 0]
        labels = label_map.flatten()
        used = evenly_spread(pixels.of_class.any(dim=1).flatten(), MOST_PAIRS // self.num_classes)
        cosines, positive, negative = (
            x.transpose(0, 1).flatten(1)[classes][:, used]
            for x in (similarity_BKP.detach() * self.temperature, pixels.of_class, negative_BKP)
        )
        inspection.add_similarities(layer, cosines, positive, negative, classes, labels[used])

    def _similarities(self, anchors_KD: Tensor, pixels: LayerPixels) -> Tensor:
        """Products of anchors and unit vectors, over the temperature, (B, K, P)."""
        # Two factors of three dimensions: with one of two, matmul would copy the map.
        anchors_BKD = (anchors_KD / self.temperature).expand(len(pixels.vectors), -1, -1)
        return anchors_BKD @ pixels.vectors * pixels.inverse_lengths[:, None]

    def _negatives(
        self, pixels: LayerPixels, errors: BoundaryPixels, generator: torch.Generator | None
    ) -> Tensor:
        """Whether a pixel is a negative of a class, (B, K, P) bool."""
        of_region_BKP = errors.region.flatten(1)[:, None] == self._classes(errors.region)
        if self.negatives == "other_classes":
            of_region_BKP = ~of_region_BKP
        negative_BKP = errors.selected.flatten(1)[:, None] & of_region_BKP
        if self.extra_negatives > 0:
            labelled_BP = pixels.of_class.any(dim=1)
            drawn_BP = _random_pixels(labelled_BP, self.extra_negatives, generator)
            negative_BKP = negative_BKP | (drawn_BP[:, None] & ~pixels.of_class)
        return negative_BKP

    def _anchor_anchor(
        self, memory: AnchorMemory, anchors_IKD: Tensor, exists_IK: Tensor
    ) -> Tensor:
        """InfoNCE of the current anchors against those of past steps, which it then joins."""
        anchors_KD, exists_K = prioritised_anchors(anchors_IKD, exists_IK)
        contrast, contrast_labels = memory.contrast_set()
        loss = info_nce(
            anchors_KD,
            torch.where(exists_K, self._classes(exists_K)[:, 0], -1),
            contrast.to(anchors_KD.dtype),
            contrast_labels,
            temperature=self.temperature,
            host_reads=False,
        )
        self._remember(memory, anchors_KD, exists_K)
        return loss

    @torch.no_grad()
    def _remember(self, memory: AnchorMemory, anchors_KD: Tensor, exists_K: Tensor) -> None:
        anchors_WKD, exists_WK = anchors_KD[None], exists_K[None]
        # With anchors of the global batch all processes have the same.
        if world_size() > 1 and not self.across_processes:
            both = torch.cat([anchors_KD, exists_K[:, None].to(anchors_KD.dtype)], dim=1)
            both = of_all_processes(both)
            anchors_WKD, exists_WK = both[..., :-1], both[..., -1] > 0
        memory.push(anchors_WKD, exists_WK)


def _random_pixels(candidates_BP: Tensor, number: int, generator: torch.Generator | None) -> Tensor:
    """Marks so many of the candidates, or all where there are fewer."""
    candidates = candidates_BP.flatten()
    random = torch.randint(
        2**62, candidates.shape, generator=generator, device=candidates_BP.device
    )
    places = torch.where(candidates, random, -1).topk(min(number, len(candidates))).indices
    drawn = torch.zeros_like(candidates).scatter_(0, places, candidates[places])
    return drawn.view_as(candidates_BP)


def _error_statistics(errors: BoundaryPixels) -> dict[str, Tensor]:
    wrong = errors.region >= 0
    return {
        "errors": wrong.sum().float(),
        "negatives": errors.selected.sum().float(),
        "errors_at_boundary": _masked_mean((errors.squared_distance == 1).float(), wrong),
    }


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where the mask is set; nan where it is nowhere."""
    return torch.where(mask, values, 0).sum() / mask.sum()


def _check_numbers(
    layers: Mapping[str, float], *, weight: float, temperature: float, deepest_weight: float
) -> None:
    if not layers:
        raise ValueError("layers={}: name at least one feature map, with its weight.")
    for name, layer_weight in layers.items():
        if not layer_weight > 0:
            raise ValueError(
                f"layers[{name!r}]={layer_weight}: must be above 0; to do without a layer, leave "
                "it out."
            )
    for name, value in (("weight", weight), ("temperature", temperature)):
        if not value > 0:
            raise ValueError(f"{name}={value}: must be above 0.")
    if not 0 <= deepest_weight <= 1:
        raise ValueError(f"deepest_weight={deepest_weight}: must be from 0 to 1.")

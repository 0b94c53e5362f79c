"""The equations of Contextrast, written as loops in float64.

A pixel is (embedding, true class, predicted class, selected): a unit vector, two integers, and
whether it is one of the wrongly predicted pixels near the boundary of their region.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import downsample_labels, predicted_labels
from contrast_d2.contrast.boundary import boundary_negatives

from . import references

Pixel = tuple[Tensor, int, int, bool]


def read_pixels(
    maps: dict[str, Tensor],
    logits: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    fraction: float,
    error_map: str,
    seed: int,
) -> dict[str, list[Pixel]]:
    """All pixels of each layer, with the boundary selection that a call with this seed makes."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, x in maps.items():
        truth = downsample_labels(labels, x.shape[-2:])
        predicted = predicted_labels(logits, x.shape[-2:])
        selected = boundary_negatives(
            truth,
            predicted,
            num_classes,
            fraction=fraction,
            error_map=error_map,
            generator=generator,
        ).selected
        units = F.normalize(x, dim=1).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
        layers[name] = list(
            zip(
                units,
                truth.flatten().tolist(),
                predicted.flatten().tolist(),
                selected.flatten().tolist(),
                strict=True,
            )
        )
    return layers


def class_means(pixels: list[Pixel], num_classes: int, min_pixels: int = 1) -> dict[int, Tensor]:
    """a_i^n of the classes that a layer has."""
    means = {}
    for n in range(num_classes):
        members = [z for z, truth, _, _ in pixels if truth == n]
        if len(members) >= min_pixels:
            means[n] = sum(members) / len(members)
    return means


def mixed_anchors(
    layers: dict[str, list[Pixel]],
    num_classes: int,
    *,
    deepest_weight: float = 0.5,
    detach_deepest: bool = False,
    normalize_anchors: bool = True,
    min_pixels: int = 1,
) -> dict[str, dict[int, Tensor]]:
    means = {name: class_means(pixels, num_classes, min_pixels) for name, pixels in layers.items()}
    last = list(layers)[-1]
    anchors: dict[str, dict[int, Tensor]] = {name: {} for name in layers}
    for name, own in means.items():
        for n, mean in own.items():
            anchor = mean
            if name != last and n in means[last]:
                deepest = means[last][n].detach() if detach_deepest else means[last][n]
                anchor = (1 - deepest_weight) * mean + deepest_weight * deepest
            if normalize_anchors:
                anchor = anchor / anchor.norm()
            anchors[name][n] = anchor
    return anchors


def is_negative(reading: str, n: int, truth: int, predicted: int, selected: bool) -> bool:
    """Whether a pixel is in Z-(n)."""
    return (
        selected
        and {
            "other_classes": truth != n,
            "false_positives": truth != n and predicted == n,
            "own_class": truth == n,
        }[reading]
    )


def pixel_anchor_loss(
    anchors: dict[int, Tensor], pixels: list[Pixel], reading: str, temperature: float
) -> Tensor:
    """Equations (5), without lambda, and (6) at one layer."""
    losses = []
    for n, anchor in anchors.items():
        positives = [z for z, truth, _, _ in pixels if truth == n]
        negatives = [z for z, *pixel in pixels if is_negative(reading, n, *pixel)]
        pairs = [references.pair_loss(anchor, z, negatives, temperature) for z in positives]
        losses.append(sum(pairs) / len(pairs))
    return sum(losses) / len(losses)

"""The equations of Contextrast, written as loops in float64.

A pixel is (embedding, true class, predicted class, selected): a unit vector, two integers, and
whether it is one of the wrongly predicted pixels near the boundary of their region.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import boundary_negatives, downsample_labels

from . import references

Pixel = tuple[Tensor, int, int, bool]


def read_pixels(
    maps: dict[str, Tensor],
    labels: Tensor,
    logits: Tensor,
    *,
    fraction: float = 0.5,
    error_map: str = "false_negatives",
    seed: int = 1,
) -> dict[str, list[Pixel]]:
    """All pixels of each layer, with the boundary selection that a call with this seed makes."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, x in maps.items():
        truth = downsample_labels(labels, x.shape[-2:])
        predicted = F.interpolate(logits, size=x.shape[-2:], mode="bilinear").argmax(dim=1)
        selected = boundary_negatives(
            truth,
            predicted,
            logits.shape[1],
            fraction=fraction,
            error_map=error_map,
            generator=generator,
        ).selected
        units = F.normalize(x, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
        integers = (values.flatten().tolist() for values in (truth, predicted, selected))
        layers[name] = list(zip(units, *integers, strict=True))
    return layers


def class_means(pixels: list[Pixel], num_classes: int) -> dict[int, Tensor]:
    """a_i^n of the classes that a layer has."""
    means = {}
    for n in range(num_classes):
        members = [z for z, truth, _, _ in pixels if truth == n]
        if members:
            means[n] = sum(members) / len(members)
    return means


def mixed_anchors(
    layers: dict[str, list[Pixel]], num_classes: int, deepest_weight: float = 0.5
) -> dict[str, dict[int, Tensor]]:
    means = {name: class_means(pixels, num_classes) for name, pixels in layers.items()}
    last = list(layers)[-1]
    anchors: dict[str, dict[int, Tensor]] = {name: {} for name in layers}
    for name, own in means.items():
        for n, mean in own.items():
            anchor = mean
            if name != last and n in means[last]:
                anchor = (1 - deepest_weight) * mean + deepest_weight * means[last][n]
            anchors[name][n] = anchor / anchor.norm()
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

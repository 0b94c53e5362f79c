"""Online hard example mining. Shape letters: B images, K classes, H W labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contrast_d2.losses import OhemCrossEntropyLoss, cross_entropy, ohem_cross_entropy

from .rows import IGNORED, NUM_CLASSES, WEIGHTS, mixed_labels


def by_loops(
    logits: Tensor, labels: Tensor, threshold: float, min_kept: int, weights: list[float]
) -> float:
    """The definition, a pixel at a time, in fp64."""
    pixels = []
    for image, y, x in torch.cartesian_prod(*(torch.arange(n) for n in labels.shape)).tolist():
        label = int(labels[image, y, x])
        if label != IGNORED:
            scores = logits[image, :, y, x].double().tolist()
            probability = math.exp(scores[label]) / sum(math.exp(s) for s in scores)
            pixels.append((probability, weights[label]))
    pixels.sort()
    kept = [p for i, p in enumerate(pixels) if p[0] < threshold or i < min_kept]
    total = sum(-weight * math.log(probability) for probability, weight in kept)
    return total / sum(weight for _, weight in kept)


def test_equals_the_definition(subtests: pytest.Subtests) -> None:
    for weights in [None, WEIGHTS]:
        for threshold, min_kept in [(0.2, 0), (0.2, 50), (0.7, 3), (0.01, 1000)]:
            with subtests.test(weights=weights, threshold=threshold, min_kept=min_kept):
                logits, labels = 2 * torch.randn(2, NUM_CLASSES, 6, 9), mixed_labels(2, 6, 9)
                found = ohem_cross_entropy(
                    logits.double(),
                    labels,
                    threshold=threshold,
                    min_kept=min_kept,
                    weight=None if weights is None else torch.tensor(weights),
                )
                expected = by_loops(
                    logits, labels, threshold, min_kept, weights or [1.0] * NUM_CLASSES
                )
                assert found.item() == pytest.approx(expected, rel=1e-9)


def test_ignored_pixels_are_not_among_those_kept() -> None:
    # Nine of ten pixels are ignored, with scores that would make them the hardest.
    logits, labels = torch.zeros(1, 2, 1, 100), torch.zeros(1, 1, 100, dtype=torch.int64)
    labels[..., 10:] = IGNORED
    logits[:, 0, :, 10:] = -50
    logits[:, 0, :, :10] = torch.arange(10.0)
    found = ohem_cross_entropy(logits, labels, threshold=0.3, min_kept=4)
    expected = cross_entropy(logits[..., :4], labels[..., :4])
    torch.testing.assert_close(found, expected)


def test_pixels_are_kept_from_the_whole_batch() -> None:
    logits = torch.randn(2, NUM_CLASSES, 4, 4)
    labels = torch.randint(0, NUM_CLASSES, (2, 4, 4))
    logits[0].scatter_(0, labels[0][None], 20.0)  # the first image is easy
    loss = OhemCrossEntropyLoss(threshold=1e-9, min_kept_per_image=8)
    torch.testing.assert_close(loss(logits, labels), cross_entropy(logits[1:], labels[1:]))


def test_no_pixel_below_the_threshold_gives_zero() -> None:
    logits = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = OhemCrossEntropyLoss(threshold=0.4, min_kept_per_image=0)
    value = loss(logits, torch.ones(1, 3, 3, dtype=torch.int64))
    value.backward()
    assert value.item() == 0 and not logits.grad.any()


def test_arguments_out_of_range(subtests: pytest.Subtests) -> None:
    for options, message in [
        ({"threshold": 0.0}, "threshold=0.0"),
        ({"threshold": 1.1}, "threshold=1.1"),
        ({"min_kept_per_image": -1}, "min_kept_per_image=-1"),
    ]:
        with subtests.test(options=options):
            with pytest.raises(ValueError, match=message):
                OhemCrossEntropyLoss(**options)


def test_class_weights_of_the_wrong_number() -> None:
    with pytest.raises(ValueError, match="2 entries for 4 classes"):
        OhemCrossEntropyLoss(class_weights=[1, 2])(
            torch.randn(1, NUM_CLASSES, 4, 4), mixed_labels(1, 4, 4)
        )

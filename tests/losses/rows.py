"""Every loss, for the tests that all must pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from contrast_d2.losses import (
    AdaptiveAffinityLoss,
    CrossEntropyLoss,
    LossSum,
    LovaszSoftmaxLoss,
    OhemCrossEntropyLoss,
    RMILoss,
    dice_loss,
    focal_loss,
)

NUM_CLASSES = 4
WEIGHTS = [0.5, 2.0, 1.0, 3.0]
IGNORED = 255


def mixed_labels(*size: int) -> Tensor:
    """Labels of all classes, and about a fifth of the pixels ignored."""
    labels = torch.randint(0, NUM_CLASSES, size)
    labels[torch.rand(size) < 0.2] = IGNORED
    return labels


def from_library(build: Callable[..., nn.Module], **options: float) -> nn.Module:
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra `losses`")
    return build(**options)


def cross_entropy_with_affinity(stride: int = 1) -> nn.Module:
    affinity = AdaptiveAffinityLoss(NUM_CLASSES, kernel_sizes=(3, 5), stride=stride)
    return LossSum({"cross_entropy": CrossEntropyLoss(), "affinity": affinity}, {"affinity": 0.5})


# Strides of 1, for small maps.
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross_entropy": CrossEntropyLoss,
    "cross_entropy_weighted": partial(CrossEntropyLoss, class_weights=WEIGHTS),
    "ohem": partial(OhemCrossEntropyLoss, threshold=0.2, min_kept_per_image=10),
    "ohem_weighted": partial(
        OhemCrossEntropyLoss, threshold=0.2, min_kept_per_image=0, class_weights=WEIGHTS
    ),
    "lovasz": LovaszSoftmaxLoss,
    "lovasz_all": partial(LovaszSoftmaxLoss, classes="all"),
    "lovasz_per_image": partial(LovaszSoftmaxLoss, per_image=True),
    "rmi": partial(RMILoss, stride=1),
    "affinity": partial(AdaptiveAffinityLoss, NUM_CLASSES, stride=1),
    "sum": cross_entropy_with_affinity,
    "dice": partial(from_library, dice_loss),
    "focal": partial(from_library, focal_loss, alpha=0.25),
}
OF_THE_LIBRARY = ("dice", "focal")

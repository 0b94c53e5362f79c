"""Segmentation losses: (logits, labels) -> scalar, safe where a crop has no valid pixel."""

from .affinity import AdaptiveAffinityLoss, affinity_sums
from .cross_entropy import CrossEntropyLoss, cross_entropy
from .library import LibraryLoss, dice_loss, focal_loss
from .lovasz import LovaszSoftmaxLoss, lovasz_softmax
from .ohem import OhemCrossEntropyLoss, ohem_cross_entropy
from .region import RMILoss, region_mutual_information
from .segmentation import LossSum, SegLoss, upsample

__all__ = [
    "AdaptiveAffinityLoss",
    "CrossEntropyLoss",
    "LibraryLoss",
    "LossSum",
    "LovaszSoftmaxLoss",
    "OhemCrossEntropyLoss",
    "RMILoss",
    "SegLoss",
    "affinity_sums",
    "cross_entropy",
    "dice_loss",
    "focal_loss",
    "lovasz_softmax",
    "ohem_cross_entropy",
    "region_mutual_information",
    "upsample",
]

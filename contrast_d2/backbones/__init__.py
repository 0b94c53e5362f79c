"""Backbones: images in, named feature maps out."""

from .timm import TimmBackbone, feature_channels, feature_shapes, joined_channels
from .weights import without_starting_weights

__all__ = [
    "TimmBackbone",
    "feature_channels",
    "feature_shapes",
    "joined_channels",
    "without_starting_weights",
]

"""Backbones: images in, named feature maps out."""

from .timm import TimmBackbone, feature_channels, feature_shapes, joined_channels

__all__ = ["TimmBackbone", "feature_channels", "feature_shapes", "joined_channels"]

"""Backbones: images in, named feature maps out."""

from .timm import TimmBackbone, feature_channels, feature_shapes

__all__ = ["TimmBackbone", "feature_channels", "feature_shapes"]

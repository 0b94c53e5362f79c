"""Supervised contrastive learning for semantic segmentation, on detectron2."""

from .resources import get_config

__all__ = ["get_config"]
__version__ = "0.1.0"

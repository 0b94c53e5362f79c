"""Supervised contrastive learning for semantic segmentation, on detectron2."""

__version__ = "0.1.0"

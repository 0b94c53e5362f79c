"""Contrast methods as plain PyTorch modules: feature maps and labels in, named losses out."""

from .gather import gather_embeddings, gather_pixels
from .info_nce import SimilarityStatistics, info_nce, similarity_statistics
from .multiscale import MultiScaleContrast
from .output import ContrastOutput
from .projector import MultiScaleProjector, Projector
from .sampling import BalancedSampler, PixelDraw, downsample_labels

__all__ = [
    "BalancedSampler",
    "ContrastOutput",
    "MultiScaleContrast",
    "MultiScaleProjector",
    "PixelDraw",
    "Projector",
    "SimilarityStatistics",
    "downsample_labels",
    "gather_embeddings",
    "gather_pixels",
    "info_nce",
    "similarity_statistics",
]

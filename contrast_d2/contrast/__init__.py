"""Contrast methods as plain PyTorch modules: feature maps and labels in, named losses out."""

from .gather import gather_embeddings, gather_pixels
from .info_nce import info_nce
from .method import ContrastMethod, Warmup
from .multiscale import MultiScaleContrast
from .output import ContrastOutput
from .projector import MultiScaleProjector, Projector
from .sampling import BalancedSampler, PixelDraw, downsample_labels, predicted_labels
from .statistics import ClassSums, SimilarityStatistics, class_sums, similarity_statistics

__all__ = [
    "BalancedSampler",
    "ClassSums",
    "ContrastMethod",
    "ContrastOutput",
    "MultiScaleContrast",
    "MultiScaleProjector",
    "PixelDraw",
    "Projector",
    "SimilarityStatistics",
    "Warmup",
    "class_sums",
    "downsample_labels",
    "gather_embeddings",
    "gather_pixels",
    "info_nce",
    "predicted_labels",
    "similarity_statistics",
]

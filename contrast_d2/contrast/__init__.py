"""Contrast methods as plain PyTorch modules: feature maps and labels in, named losses out."""

from .boundary import BoundaryNegatives, boundary_negatives, squared_distance_to_other
from .composition import ContrastSum
from .contextual import Contextrast
from .gather import gather_embeddings, gather_pixels
from .hard_sampling import HardAnchorSampler
from .info_nce import info_nce
from .inspection import DrawnPixels, Inspection, Similarities
from .memory import MemoryBank
from .method import ContrastMethod, Warmup
from .multiscale import MultiScaleContrast
from .output import ContrastOutput
from .pairs import RolePairs, SemiHardPairs
from .pixel import PixelContrast
from .pne import PNE
from .projector import MultiScaleProjector, Projector
from .sampling import BalancedSampler, PixelDraw, downsample_labels, predicted_labels
from .statistics import ClassSums, SimilarityStatistics, class_sums, similarity_statistics

__all__ = [
    "PNE",
    "BalancedSampler",
    "BoundaryNegatives",
    "ClassSums",
    "Contextrast",
    "ContrastMethod",
    "ContrastOutput",
    "ContrastSum",
    "DrawnPixels",
    "HardAnchorSampler",
    "Inspection",
    "MemoryBank",
    "MultiScaleContrast",
    "MultiScaleProjector",
    "PixelContrast",
    "PixelDraw",
    "Projector",
    "RolePairs",
    "SemiHardPairs",
    "Similarities",
    "SimilarityStatistics",
    "Warmup",
    "boundary_negatives",
    "class_sums",
    "downsample_labels",
    "gather_embeddings",
    "gather_pixels",
    "info_nce",
    "predicted_labels",
    "similarity_statistics",
    "squared_distance_to_other",
]

"""Contrast methods as plain PyTorch modules: feature maps and labels in, named losses out."""

from .boundary import BoundaryNegatives, boundary_negatives, squared_distance_to_other
from .composition import ContrastSum
from .contextual import Contextrast
from .contextual_plus import ContextrastPlus
from .hard_sampling import HardAnchorSampler
from .inspection import DrawnPixels, Inspection, Similarities
from .kernels.gather import gather_embeddings, gather_pixels
from .memory import AnchorMemory, MemoryBank
from .method import ContrastMethod
from .multiscale import MultiScaleContrast
from .pairs import SemiHardPairs
from .pixel import PixelContrast
from .pne import PNE
from .presets import (
    contextrast,
    ms_cs,
    ms_cs_paper,
    ms_cs_release,
    pixel_contrast,
    pixel_contrast_release,
    pne,
    pne_release,
)
from .projector import MultiScaleProjector, Projector
from .sampling import BalancedSampler, Batch, Sampler, downsample_labels
from .sets import (
    ClassSums,
    PixelDraw,
    PixelSet,
    class_sums,
    mean_similarities,
)
from .terms import ContrastOutput, OwnTerm, Side, Term, evaluate, info_nce

__all__ = [
    "PNE",
    "AnchorMemory",
    "BalancedSampler",
    "Batch",
    "BoundaryNegatives",
    "ClassSums",
    "Contextrast",
    "ContextrastPlus",
    "ContrastMethod",
    "ContrastOutput",
    "ContrastSum",
    "DrawnPixels",
    "HardAnchorSampler",
    "Inspection",
    "MemoryBank",
    "MultiScaleContrast",
    "MultiScaleProjector",
    "OwnTerm",
    "PixelContrast",
    "PixelDraw",
    "PixelSet",
    "Projector",
    "Sampler",
    "SemiHardPairs",
    "Side",
    "Similarities",
    "Term",
    "boundary_negatives",
    "class_sums",
    "contextrast",
    "downsample_labels",
    "evaluate",
    "gather_embeddings",
    "gather_pixels",
    "info_nce",
    "mean_similarities",
    "ms_cs",
    "ms_cs_paper",
    "ms_cs_release",
    "pixel_contrast",
    "pixel_contrast_release",
    "pne",
    "pne_release",
    "squared_distance_to_other",
]

"""Contrast methods as plain PyTorch modules: feature maps and labels in, named losses out."""

from .boundary import BoundaryNegatives, boundary_negatives, squared_distance_to_other
from .centres import CentreRegulariser
from .clusters import ClusteredPrototypes
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
    centre_regulariser,
    clustered_prototypes,
    contextrast,
    fixed_prototypes,
    ms_cs,
    ms_cs_paper,
    ms_cs_release,
    pixel_contrast,
    pixel_contrast_release,
    pne,
    pne_release,
    region_contrast,
    tree_triplets,
)
from .projector import MultiScaleProjector, Projector
from .prototypes import FixedPrototypes
from .region import RegionContrast
from .sampling import BalancedSampler, Batch, Sampler, downsample_labels
from .sets import (
    ClassSums,
    PixelDraw,
    PixelSet,
    class_sums,
    mean_similarities,
)
from .terms import ContrastOutput, OwnTerm, Side, Term, evaluate, info_nce
from .tree import TreeTriplets

__all__ = [
    "PNE",
    "AnchorMemory",
    "BalancedSampler",
    "Batch",
    "BoundaryNegatives",
    "CentreRegulariser",
    "ClassSums",
    "ClusteredPrototypes",
    "Contextrast",
    "ContextrastPlus",
    "ContrastMethod",
    "ContrastOutput",
    "ContrastSum",
    "DrawnPixels",
    "FixedPrototypes",
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
    "RegionContrast",
    "Sampler",
    "SemiHardPairs",
    "Side",
    "Similarities",
    "Term",
    "TreeTriplets",
    "boundary_negatives",
    "centre_regulariser",
    "class_sums",
    "clustered_prototypes",
    "contextrast",
    "downsample_labels",
    "evaluate",
    "fixed_prototypes",
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
    "region_contrast",
    "squared_distance_to_other",
    "tree_triplets",
]

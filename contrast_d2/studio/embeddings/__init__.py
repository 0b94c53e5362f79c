"""What a network has learned of the classes: its pixel embeddings, measured and drawn."""

from .figures import plot_class_similarity, plot_planes
from .layers import LayerTap, is_projection, projection_heads
from .metrics import (
    alignment,
    class_similarity,
    find_neighbours,
    knn_predictions,
    neighbour_votes,
    prototype_predictions,
    silhouette,
    uniformity,
    unit_rows,
)
from .page import short_names, write_page
from .pixels import PixelSet, collect_pixels
from .planes import PLANE_TITLES, PLANES, pca_plane, tsne_plane, umap_plane
from .study import ModelStudy, check_libraries, study_model
from .suspects import Suspect, label_suspects

__all__ = [
    "PLANES",
    "PLANE_TITLES",
    "LayerTap",
    "ModelStudy",
    "PixelSet",
    "Suspect",
    "alignment",
    "check_libraries",
    "class_similarity",
    "collect_pixels",
    "find_neighbours",
    "is_projection",
    "knn_predictions",
    "label_suspects",
    "neighbour_votes",
    "pca_plane",
    "plot_class_similarity",
    "plot_planes",
    "projection_heads",
    "prototype_predictions",
    "short_names",
    "silhouette",
    "study_model",
    "tsne_plane",
    "umap_plane",
    "uniformity",
    "unit_rows",
    "write_page",
]

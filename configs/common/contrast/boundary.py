"""Boundary-aware negatives of Contextrast (CVPR 2024), for `negatives` of other methods."""

from detectron2.config import LazyCall as L

from contrast_d2.contrast import BoundaryNegatives

boundary_negatives = L(BoundaryNegatives)(
    num_classes="${dataset.num_classes}",
    fraction=0.5,
    # The paper sets no bound.
    max_negatives=4096,
)

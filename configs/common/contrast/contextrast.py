"""Contextrast, as the CVPR 2024 paper states it, on the four stages of the backbone. Class means
are those of one process."""

from detectron2.config import LazyCall as L

from contrast_d2.contrast import Contextrast, MultiScaleProjector

from .taps import stages

contextrast = L(Contextrast)(
    projector=L(MultiScaleProjector)(
        in_channels=stages,
        embed_dim=256,
        num_hidden=1,
        norm="batch",
    ),
    num_classes="${dataset.num_classes}",
    # From shallow to deep; the last is the one that the anchors of all others are mixed with.
    layers={"res2": 0.1, "res3": 0.4, "res4": 0.7, "res5": 1.0},
    weight=0.1,
    # The paper states neither temperature nor mixture.
    temperature=0.1,
    deepest_weight=0.5,
    boundary_fraction=0.5,
    negatives="other_classes",
    across_processes=False,
)

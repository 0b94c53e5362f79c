"""Contextrast, as the CVPR 2024 paper states it, on the four stages of the backbone. Class means
are those of one process."""

from detectron2.config import LazyCall as L

from contrast_d2 import contrast

from .taps import stages

contextrast = L(contrast.contextrast)(
    channels=stages,
    num_classes="${dataset.num_classes}",
    # From shallow to deep; the last is the one that the anchors of all others are mixed with.
    layers={"res2": 0.1, "res3": 0.4, "res4": 0.7, "res5": 1.0},
)

"""Positive-negative equal contrast, with the settings of its release, on the map that the decoder
classifies."""

from detectron2.config import LazyCall as L

from contrast_d2.contrast import PNE, MultiScaleProjector

pne = L(PNE)(
    projector=L(MultiScaleProjector)(
        in_channels={"pre_logits": "${model.sem_seg_head.conv_dims}"},
        embed_dim=256,
        num_hidden=1,
        norm="batch",
        order="norm_relu",
    ),
    num_classes="${dataset.num_classes}",
    feature="pre_logits",
    weight=1.3,
    temperature=1.0,
    samples_per_group=100,
    # Of the map's pixels: 199 of 64x128 in the release.
    max_hard=199 / 8192,
    empty_negatives="anchors",
    across_processes=False,
)

"""Positive-negative equal contrast, with the settings of its official code, on the map that the
decoder classifies."""

from detectron2.config import LazyCall as L

from contrast_d2 import contrast

pne = L(contrast.pne)(
    channels={"pre_logits": "${model.sem_seg_head.conv_dims}"},
    num_classes="${dataset.num_classes}",
    feature="pre_logits",
)

"""Positive-negative equal contrast (Wang et al., Neurocomputing 2023), on the map that the decoder
classifies: `pne` with the values of its official code, random draws and a gate for maps of any
size, `pne_release` as that code does it."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2 import contrast

pne = L(contrast.pne)(
    channels={"pre_logits": "${model.sem_seg_head.conv_dims}"},
    num_classes="${dataset.num_classes}",
    feature="pre_logits",
)

pne_release = deepcopy(pne)
pne_release._target_ = contrast.pne_release

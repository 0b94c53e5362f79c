"""Multi- and cross-scale contrast (Pissas et al., ECCV 2022) under the name of who states it:

* `ms_cs_paper`: the paper to the letter;
* `ms_cs`: ours, the paper with at least 32 anchors of each class that has so many pixels;
* `ms_cs_release`: the official code.

Less of `ms_cs` are `ms`, `ms_cs_one_pair` and `one_scale`; on other maps it is `ms_cs_dilated` and
`ms_cs_pyramid`. `released` gives the official code's form of any of them. `max_anchors` is for the
whole batch; the official code's 10,000 is for the images of one of four GPUs.

Experiment files import them with an underscore: any other name in such a file is a key of its
config, and would take overrides there that change nothing."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2 import contrast

from .taps import decoded, joined, stages

ms_cs = L(contrast.ms_cs)(
    channels=stages,
    num_classes="${dataset.num_classes}",
    scale_weights={"res2": 1.0, "res3": 0.7, "res4": 0.4, "res5": 0.1},
    cross_scale=[("res2", "res5", 1.0), ("res2", "res4", 1.0)],
)


def released(node):
    """The same maps, weights and pairs with the official code's anchors, projector and mean."""
    node = deepcopy(node)
    node._target_ = contrast.ms_cs_release
    return node


ms_cs_release = released(ms_cs)
ms_cs_paper = deepcopy(ms_cs)
ms_cs_paper._target_ = contrast.ms_cs_paper

# Without cross-scale terms, and with the first of the two.
ms = deepcopy(ms_cs)
ms.cross_scale = []
ms_cs_one_pair = deepcopy(ms_cs)
ms_cs_one_pair.cross_scale = [("res2", "res5", 1.0)]

# The paper does not say which map one scale is. The official code's is the one that joins all.
one_scale = deepcopy(ms)
one_scale.channels = joined("concat")
one_scale.scale_weights = {"concat": 1.0}

# On a ResNet with output stride 8: C2, C3 and C5, of strides 4, 8 and 8, which the weights follow.
ms_cs_dilated = deepcopy(ms_cs)
ms_cs_dilated.scale_weights = {"res2": 1.0, "res3": 0.7, "res5": 0.7}
ms_cs_dilated.cross_scale = [("res2", "res5", 1.0), ("res2", "res3", 1.0)]

# The official code has C4 for C3 in DeepLabV3, and in OCR, on CaDIS, neither.
ms_cs_dilated_release = released(ms_cs)
ms_cs_dilated_release.scale_weights = {"res2": 1.0, "res4": 0.7, "res5": 0.7}
ms_cs_two_maps_release = released(ms_cs)
ms_cs_two_maps_release.scale_weights = {"res2": 1.0, "res5": 0.7}
ms_cs_two_maps_release.cross_scale = [("res2", "res5", 1.0)]

# On the pyramid of UPerNet.
ms_cs_pyramid = deepcopy(ms_cs)
ms_cs_pyramid.channels = decoded("p2", "p3", "p4", "p5")
ms_cs_pyramid.scale_weights = {"p2": 1.0, "p3": 0.7, "p4": 0.4, "p5": 0.1}
ms_cs_pyramid.cross_scale = [("p2", "p5", 1.0), ("p2", "p4", 1.0)]

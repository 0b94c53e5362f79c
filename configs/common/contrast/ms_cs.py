"""Multi- and cross-scale contrast, as the ECCV 2022 paper states it (`ms_cs`), with less of it
(`ms`, `ms_cs_one_pair`), on other maps (`ms_cs_dilated`, `ms_cs_pyramid`), and as its official code
does it (`ms_cs_release`). `max_anchors` is for the whole batch; the paper's 10,000 is for the
images of one of its four GPUs.

Experiment files import them with an underscore: any other name in such a file is a key of its
config, and would take overrides there that change nothing."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2 import contrast

from .taps import decoded, stages

ms_cs = L(contrast.ms_cs)(
    channels=stages,
    num_classes="${dataset.num_classes}",
    scale_weights={"res2": 1.0, "res3": 0.7, "res4": 0.4, "res5": 0.1},
    cross_scale=[("res2", "res5", 1.0), ("res2", "res4", 1.0)],
)

# Without cross-scale terms, and with the first of the two.
ms = deepcopy(ms_cs)
ms.cross_scale = []
ms_cs_one_pair = deepcopy(ms_cs)
ms_cs_one_pair.cross_scale = [("res2", "res5", 1.0)]

# On a ResNet with output stride 8: C2, C3 and C5, of strides 4, 8 and 8. The weights are those of
# the official code, in the order of the maps.
ms_cs_dilated = deepcopy(ms_cs)
ms_cs_dilated.scale_weights = {"res2": 1.0, "res3": 0.7, "res5": 0.4}
ms_cs_dilated.cross_scale = [("res2", "res5", 1.0), ("res2", "res3", 1.0)]

# On C2 and C5 of such a ResNet, with a single pair, as on CaDIS.
ms_cs_two_maps = deepcopy(ms_cs)
ms_cs_two_maps.scale_weights = {"res2": 1.0, "res5": 0.7}
ms_cs_two_maps.cross_scale = [("res2", "res5", 1.0)]

# On the pyramid of UPerNet.
ms_cs_pyramid = deepcopy(ms_cs)
ms_cs_pyramid.channels = decoded("p2", "p3", "p4", "p5")
ms_cs_pyramid.scale_weights = {"p2": 1.0, "p3": 0.7, "p4": 0.4, "p5": 0.1}
ms_cs_pyramid.cross_scale = [("p2", "p5", 1.0), ("p2", "p4", 1.0)]

ms_cs_release = deepcopy(ms_cs)
ms_cs_release._target_ = contrast.ms_cs_release

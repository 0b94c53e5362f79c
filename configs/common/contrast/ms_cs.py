"""Multi- and cross-scale contrast, as the ECCV 2022 paper states it (`ms_cs`) and as its release
does it (`ms_cs_release`). `max_anchors` is for the whole batch; the
paper's 10,000 is for the images of one of its four GPUs.

Experiment files import them with an underscore: any other name in such a file is a key of its
config, and would take overrides there that change nothing."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2.backbones import feature_channels
from contrast_d2.contrast import BalancedSampler, MultiScaleContrast, MultiScaleProjector

ms_cs = L(MultiScaleContrast)(
    projector=L(MultiScaleProjector)(
        in_channels=L(feature_channels)(
            name="${model.backbone.name}", output_stride="${model.backbone.output_stride}"
        ),
        embed_dim=256,
        num_hidden=2,
        norm="batch",
    ),
    sampler=L(BalancedSampler)(
        num_classes="${dataset.num_classes}",
        balance="class",
        max_anchors=10_000,
        min_pixels=1,
        # Not in the paper, for which one tiny object cuts every class to its size; 0 is literal.
        floor=32,
        across_processes="${..across_processes}",
    ),
    scale_weights={"res2": 1.0, "res3": 0.7, "res4": 0.4, "res5": 0.1},
    cross_scale=[("res2", "res5", 1.0), ("res2", "res4", 1.0)],
    weight=0.1,
    cross_weight=0.1,
    temperature=0.1,
    # True contrasts the anchors of all processes.
    across_processes=False,
    # "sampled" projects the drawn pixels alone; batch norms then take norm_statistics="map" (of the
    # whole map, as in dense projection) or "draw".
    projection="dense",
    norm_statistics=None,
)

ms_cs_release = deepcopy(ms_cs)
ms_cs_release.projector.num_hidden = 1
ms_cs_release.projector.bn_momentum = 3e-4
ms_cs_release.sampler.balance = "image_class"
ms_cs_release.sampler.min_pixels = 5
ms_cs_release.sampler.max_per_group = 2500
ms_cs_release.sampler.floor = 0
ms_cs_release.count_empty_anchors = True

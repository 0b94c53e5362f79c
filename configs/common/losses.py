"""Segmentation losses: an experiment file takes one with `model.seg_loss = _lovasz`.

Auxiliary heads weigh 0.4. They have the same loss where it is one of single pixels or of the
Jaccard index, and cross entropy under losses of regions and pairs."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2.losses import (
    AdaptiveAffinityLoss,
    CrossEntropyLoss,
    LossSum,
    LovaszSoftmaxLoss,
    OhemCrossEntropyLoss,
    RMILoss,
    SegLoss,
    dice_loss,
    focal_loss,
)

_pixels = L(CrossEntropyLoss)(ignore_label="${dataset.ignore_label}")

cross_entropy = L(SegLoss)(main=deepcopy(_pixels))

# 32,768 pixels an image are 131,072 of four.
ohem = L(SegLoss)(
    main=L(OhemCrossEntropyLoss)(
        threshold=0.9, min_kept_per_image=32_768, ignore_label="${dataset.ignore_label}"
    )
)

# Berman et al., CVPR 2018.
lovasz = L(SegLoss)(
    main=L(LovaszSoftmaxLoss)(
        classes="present", per_image=False, ignore_label="${dataset.ignore_label}"
    )
)

# With a cross entropy of the same weight, as in the official code of Wang et al., ICCV 2021.
cross_entropy_lovasz = L(SegLoss)(
    main=L(LossSum)(
        losses=L("builtins.dict")(cross_entropy=deepcopy(_pixels), lovasz=deepcopy(lovasz.main)),
        weights=dict(cross_entropy=1.0, lovasz=1.0),
    )
)

# Zhao et al., NeurIPS 2019. It has a cross entropy of its own.
rmi = L(SegLoss)(
    main=L(RMILoss)(weight=0.5, radius=3, stride=4, ignore_label="${dataset.ignore_label}"),
    aux=deepcopy(_pixels),
)

# The same in the official code of Wang et al., ICCV 2021.
rmi_max = deepcopy(rmi)
rmi_max.main.pool = "max"
rmi_max.main.stride = 3

# Ke et al., ECCV 2018. The stride is that of a decoder's output; files of coarser ones set it.
aaf = L(SegLoss)(
    main=L(LossSum)(
        # By name, since a plain dict would not be built.
        losses=L("builtins.dict")(
            cross_entropy=deepcopy(_pixels),
            affinity=L(AdaptiveAffinityLoss)(
                num_classes="${dataset.num_classes}",
                kernel_sizes=(3, 5, 7),
                margin=3.0,
                decay=10.0,
                max_iter="${train.max_iter}",
                stride=4,
                ignore_label="${dataset.ignore_label}",
            ),
        ),
        weights=dict(cross_entropy=1.0, affinity=1.0),
    ),
    aux=deepcopy(_pixels),
)

# These two need the extra `losses`.
dice = L(SegLoss)(
    main=L(LossSum)(
        losses=L("builtins.dict")(
            cross_entropy=deepcopy(_pixels),
            dice=L(dice_loss)(ignore_label="${dataset.ignore_label}"),
        ),
        weights=dict(cross_entropy=1.0, dice=1.0),
    )
)

focal = L(SegLoss)(
    main=L(focal_loss)(gamma=2.0, alpha=0.25, ignore_label="${dataset.ignore_label}")
)

"""Which feature map of which model a contrast method stands on, and how wide the map is.

    model.contrast = _tap(_pixel, "concat", _joined)

gives the method of a preset that stands on one map another one."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2.backbones import feature_channels, joined_channels

# All stages of a timm backbone.
stages = L(feature_channels)(
    name="${model.backbone.name}", output_stride="${model.backbone.output_stride}"
)


def tap(contrast, feature, channels):
    """The method of a preset on the map `feature`, with the widths `channels` by name."""
    contrast = deepcopy(contrast)
    contrast.feature = feature
    contrast.channels = channels
    return contrast


def joined(feature):
    """The width of a map that joins all stages, as `concat` of HRNet's decoders does."""
    return L(joined_channels)(
        name="${model.backbone.name}",
        feature=feature,
        output_stride="${model.backbone.output_stride}",
    )


def decoded(*features):
    """The widths of maps that are as wide as the decoder's `channels`: UPerNet's pyramid `p2` to
    `p5`, and `pre_logits` of DeepLabV3, OCR and UPerNet."""
    return {feature: "${model.sem_seg_head.channels}" for feature in features}

"""Semantic FPN on a timm backbone; the baseline, without contrast."""

from detectron2.config import LazyCall as L

from contrast_d2.backbones import TimmBackbone, feature_shapes
from contrast_d2.decoders import SemSegFPNDecoder
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor

model = L(ContrastiveSegmentor)(
    backbone=L(TimmBackbone)(name="resnet18", output_stride=None, pretrained=True),
    sem_seg_head=L(SemSegFPNDecoder)(
        input_shape=L(feature_shapes)(
            name="${model.backbone.name}", output_stride="${model.backbone.output_stride}"
        ),
        num_classes="${dataset.num_classes}",
        fpn_channels=256,
        conv_dims=128,
    ),
    # ImageNet's, in RGB and 0..255, as timm's weights were trained with
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    seg_loss=L(SegLoss)(main=L(CrossEntropyLoss)(ignore_label="${dataset.ignore_label}")),
    contrast=None,
    ignore_label="${dataset.ignore_label}",
)

"""HRNetV2: timm's HRNet and the fully convolutional head; the baseline, without contrast."""

from detectron2.config import LazyCall as L

from contrast_d2.decoders import FCNDecoder

from .semfpn import model

model.backbone.name = "hrnet_w48"
model.sem_seg_head = L(FCNDecoder)(
    input_shape=model.sem_seg_head.input_shape, num_classes="${dataset.num_classes}"
)

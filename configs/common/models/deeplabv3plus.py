"""DeepLabV3+ on a dilated ResNet-101 with output stride 16; the baseline, without contrast."""

from detectron2.config import LazyCall as L

from contrast_d2.decoders import DeepLabV3PlusDecoder

from .semfpn import model

model.backbone.name = "resnet101.tv_in1k"  # torchvision's weights
model.backbone.output_stride = 16
model.sem_seg_head = L(DeepLabV3PlusDecoder)(
    input_shape=model.sem_seg_head.input_shape,
    num_classes="${dataset.num_classes}",
    channels=256,
    dropout=0.1,
    aux_feature=None,
)

"""UPerNet on Swin-T, with the auxiliary head of Swin's own trainings; the baseline, without
contrast.

On a ResNet: `model.backbone.name=resnet101.tv_in1k model.backbone.norm_outputs=False
model.backbone.drop_path_rate=null`."""

from detectron2.config import LazyCall as L

from contrast_d2.decoders import UPerNetDecoder

from .semfpn import model

model.backbone.name = "swin_tiny_patch4_window7_224"
model.backbone.norm_outputs = True
model.backbone.drop_path_rate = 0.3
model.sem_seg_head = L(UPerNetDecoder)(
    input_shape=model.sem_seg_head.input_shape,
    num_classes="${dataset.num_classes}",
    channels=512,
    dropout=0.1,
    aux_feature="res4",
)

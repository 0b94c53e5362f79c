"""DeepLabV3 on a dilated ResNet-101, as segmentation papers train it: output stride 8 and an
auxiliary head on the last stage but one; `model` of torchvision's ResNet and width, `deep_stem`
with three convolutions in the stem and a pyramid of twice the width, as in mmsegmentation. The
baselines, without contrast.

With `model.backbone.output_stride=16` the dilations halve. Without the auxiliary head, as the
release of multi- and cross-scale contrast has it: `model.sem_seg_head.aux_feature=null`."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2.decoders import DeepLabV3Decoder

from .semfpn import model

model.backbone.name = "resnet101.tv_in1k"  # torchvision's weights
model.backbone.output_stride = 8
model.sem_seg_head = L(DeepLabV3Decoder)(
    input_shape=model.sem_seg_head.input_shape,
    num_classes="${dataset.num_classes}",
    channels=256,
    dropout=0.1,
    aux_feature="res4",
)

deep_stem = deepcopy(model)
deep_stem.backbone.name = "resnet101c.gluon_in1k"
deep_stem.sem_seg_head.channels = 512

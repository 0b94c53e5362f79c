"""OCR on HRNetV2-W48 (`model`) and on a ResNet-50 with output stride 8 (`ocr_resnet`); the
baselines, without contrast.

Experiment files take the second as `from ..common.models.ocr import ocr_resnet as model`."""

from copy import deepcopy

from detectron2.config import LazyCall as L

from contrast_d2.decoders import OCRDecoder

from .semfpn import model

model.backbone.name = "hrnet_w48"
model.sem_seg_head = L(OCRDecoder)(
    input_shape=model.sem_seg_head.input_shape,
    num_classes="${dataset.num_classes}",
    channels=512,
    key_channels=256,
    dropout=0.05,
)

ocr_resnet = deepcopy(model)
ocr_resnet.backbone.name = "resnet50.tv_in1k"  # torchvision's weights
ocr_resnet.backbone.output_stride = 8
ocr_resnet.sem_seg_head.in_features = ["res5"]
ocr_resnet.sem_seg_head.region_feature = "res4"
ocr_resnet.sem_seg_head.region_channels = 512
ocr_resnet.sem_seg_head.region_kernel_size = 3

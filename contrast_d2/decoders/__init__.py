"""Decoders: named feature maps in, `SegOutput` out, by the contract of detectron2's heads."""

from .deeplab import DeepLabV3Decoder, DeepLabV3HeadWithLayers, DeepLabV3PlusDecoder
from .fcn import FCNDecoder
from .head import Decoder
from .ocr import OCRDecoder
from .semfpn import SemSegFPNDecoder
from .upernet import UPerNetDecoder

__all__ = [
    "Decoder",
    "DeepLabV3Decoder",
    "DeepLabV3HeadWithLayers",
    "DeepLabV3PlusDecoder",
    "FCNDecoder",
    "OCRDecoder",
    "SemSegFPNDecoder",
    "UPerNetDecoder",
]

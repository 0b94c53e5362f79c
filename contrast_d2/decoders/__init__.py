"""Decoders: named feature maps in, `SegOutput` out; they see no labels and compute no loss."""

from .deeplab import DeepLabV3Decoder, DeepLabV3PlusDecoder
from .fcn import FCNDecoder
from .ocr import OCRDecoder
from .semfpn import SemSegFPNDecoder
from .upernet import UPerNetDecoder

__all__ = [
    "DeepLabV3Decoder",
    "DeepLabV3PlusDecoder",
    "FCNDecoder",
    "OCRDecoder",
    "SemSegFPNDecoder",
    "UPerNetDecoder",
]

"""Decoders: named feature maps in, `SegOutput` out; they see no labels and compute no loss."""

from .fcn import FCNDecoder
from .semfpn import SemSegFPNDecoder

__all__ = ["FCNDecoder", "SemSegFPNDecoder"]

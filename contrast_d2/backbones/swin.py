"""Shifted windows on feature maps of any size.

Shape letters: B images, C channels, h w a feature map.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn import functional as F


def pad_before_shift(model: nn.Module) -> None:
    """Lets Swin's blocks attend to neighbours only, on maps that are no whole number of windows.

    timm's blocks shift a map and then pad it, but their masks are for a map that was padded before:
    the rows that the shift brought from the top then attend to the bottom row, and columns
    likewise. At 512x512 that is so at every scale. Padding first lets shift and mask agree.
    Other models than Swin are left as they are.

    Args:
        model: has the blocks; changed in place.

    Reference: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted
        Windows", ICCV 2021, section 3.2 (masks keep attention within parts that are adjacent).
    """
    block: Any  # timm's class attributes and ours
    for block in model.modules():
        if isinstance(block, (SwinTransformerBlock, SwinTransformerV2Block)):
            # A partial, and no closure: a deep copy of the model calls its own block.
            block._attn = partial(_attend_in_whole_windows, block)


def _attend_in_whole_windows(block: Any, x: Tensor) -> Tensor:
    """The block's attention, (B, h, w, C) -> (B, h, w, C)."""
    height, width = x.shape[1:3]
    window_height, window_width = block.window_size
    x = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
    return type(block)._attn(block, x)[:, :height, :width]

"""The backbones of the shared battery: a new one is one more row."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from detectron2.modeling import Backbone, ResNet
from detectron2.modeling.backbone import BasicStem
from torch import nn

from contrast_d2.backbones import TimmBackbone

NAMES = ("res2", "res3", "res4", "res5")


class Row(NamedTuple):
    """A backbone, and what is known of it from its paper."""

    name: str
    build: Callable[..., Backbone]
    channels: tuple[int, ...]
    strides: tuple[int, ...] = (4, 8, 16, 32)


def timm_row(
    name: str, channels: tuple[int, ...], strides: tuple[int, ...] = (4, 8, 16, 32), **arguments
) -> Row:
    label = "-".join([name, *(f"{key}={value}" for key, value in arguments.items())])
    return Row(label, lambda **more: TimmBackbone(name, **{**arguments, **more}), channels, strides)


def detectron2_resnet18(out_features: tuple[str, ...] = NAMES) -> ResNet:
    """detectron2's own, as its configs build it; it asks for no padding of images."""
    return ResNet(
        BasicStem(norm="BN"),
        ResNet.make_default_stages(18, norm="BN"),
        out_features=list(out_features),
    )


TIMM_ROWS = [
    timm_row("resnet18", (64, 128, 256, 512)),
    timm_row("resnet18", (64, 128, 256, 512), (4, 8, 8, 8), output_stride=8),
    timm_row("hrnet_w18_small", (16, 32, 64, 128)),
    timm_row("hrnet_w18", (18, 36, 72, 144)),
    timm_row("swin_tiny_patch4_window7_224", (96, 192, 384, 768), norm_outputs=True),
    timm_row("convnext_atto", (40, 80, 160, 320)),
    timm_row("pvt_v2_b0", (32, 64, 160, 256)),
    # Five maps, and six levels of which the first is none.
    timm_row("mobilenetv3_small_100", (16, 24, 48, 576)),
    timm_row("dla46x_c", (64, 64, 128, 256)),
]
# Channels of the maps of larger models, by timm's names.
TIMM_SHAPES = {
    "hrnet_w32": (32, 64, 128, 256),
    "hrnet_w48": (48, 96, 192, 384),
    "swin_tiny_patch4_window7_224": (96, 192, 384, 768),
    "swin_small_patch4_window7_224": (96, 192, 384, 768),
    "swin_base_patch4_window12_384.ms_in22k": (128, 256, 512, 1024),
    "swin_large_patch4_window12_384.ms_in22k": (192, 384, 768, 1536),
    "swinv2_tiny_window8_256": (96, 192, 384, 768),
    "convnext_tiny": (96, 192, 384, 768),
    "pvt_v2_b2": (64, 128, 320, 512),
    "twins_svt_small": (64, 128, 256, 512),
    "poolformer_s12": (64, 128, 320, 512),
    "efficientnet_b0": (24, 40, 112, 320),
}
ROWS = [*TIMM_ROWS, Row("detectron2-resnet18", detectron2_resnet18, (64, 128, 256, 512))]


def wake_residuals(module: nn.Module) -> None:
    """Gives the last norm of residual blocks a weight.

    It starts at 0, for which no gradient passes through the block's convolutions at first.
    """
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)

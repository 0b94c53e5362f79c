"""DeepLabV3 and DeepLabV3+. Shape letters: B images, C channels, h w a feature map."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3_resnet101

from contrast_d2.backbones import TimmBackbone
from contrast_d2.decoders import DeepLabV3Decoder, DeepLabV3PlusDecoder


def shapes(stride: int, channels: int = 4) -> dict[str, ShapeSpec]:
    return {
        "res2": ShapeSpec(channels=3, stride=4),
        "res5": ShapeSpec(channels=channels, stride=stride),
    }


def test_what_a_pixel_depends_on(subtests: pytest.Subtests) -> None:
    for stride, dilations, expected in [
        (8, None, (12, 24, 36)),
        (16, None, (6, 12, 18)),
        (32, (1, 2, 4), (1, 2, 4)),
    ]:
        with subtests.test(stride=stride):
            decoder = DeepLabV3Decoder(
                shapes(stride), num_classes=2, dilations=dilations, channels=3, norm=""
            ).eval()
            for parameter in decoder.parameters():
                nn.init.ones_(parameter)  # nothing cancels, and ReLU passes all
            nn.init.zeros_(decoder.aspp.convs[-1][1].weight)  # the branch that sees everything
            x = torch.ones(1, 4, 81, 79, requires_grad=True)
            decoder.decode({"res5": x}).logits[0, 0, 40, 39].backward()
            seen = {(y - 40, x - 39) for y, x in x.grad[0, 0].nonzero().tolist()}
            assert seen == {
                (d * i, d * j) for d in expected for i in (-1, 0, 1) for j in (-1, 0, 1)
            }


def test_the_image_is_pooled_whole(subtests: pytest.Subtests) -> None:
    for size in [(5, 7), (1, 3), (33, 20)]:
        with subtests.test(size=size):
            decoder = DeepLabV3Decoder(shapes(8), num_classes=2, channels=3)
            branches = []
            decoder.aspp.project.register_forward_pre_hook(
                lambda _, x, seen=branches: seen.extend(x)
            )
            x = torch.randn(1, 4, *size)
            assert decoder.decode({"res5": x}).logits.shape[-2:] == size
            conv = decoder.aspp.convs[-1][1]
            mean = F.conv2d(x.mean(dim=(2, 3), keepdim=True), conv.weight, conv.bias).relu()
            torch.testing.assert_close(branches[0][:, -3:], mean.expand(-1, -1, *size))


def test_parameters_against_torchvision() -> None:
    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    with torch.device("meta"):
        backbone = TimmBackbone("resnet101", output_stride=8)
        decoder = DeepLabV3Decoder(backbone.output_shape(), num_classes=21, aux_feature="res4")
        other = deeplabv3_resnet101(weights=None, weights_backbone=None, aux_loss=True)
    aspp, extra, _, _, predictor = other.classifier
    assert extra.weight.shape == (256, 256, 3, 3)  # theirs alone
    assert count(backbone) == count(other.backbone)
    # Their branch of the pooled image has a batch norm, ours a bias.
    assert count(decoder.aspp, decoder.predictor) == count(aspp, predictor) - 256
    assert count(decoder.aux_head) == count(other.aux_classifier)


@pytest.mark.parametrize("separable", [False, True])
def test_the_plus_decoder_joins_the_shallow_map(separable: bool) -> None:
    decoder = DeepLabV3PlusDecoder(
        shapes(16), num_classes=2, channels=6, low_level_channels=5, separable=separable
    ).eval()
    joined = []
    decoder.fuse.register_forward_pre_hook(lambda _, x: joined.extend(x))
    shallow, deep = torch.randn(2, 3, 14, 18), torch.randn(2, 4, 4, 5)
    output = decoder.decode({"res2": shallow, "res5": deep})
    assert output.logits.shape[-2:] == (14, 18)
    pooled = F.interpolate(decoder.aspp(deep), (14, 18), mode="bilinear", align_corners=False)
    assert torch.equal(joined[0], torch.cat([decoder.project(shallow), pooled], dim=1))

    # Depth-wise 3x3 convolutions: three of the pooling's branches, two after it.
    grouped = [m for m in decoder.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.groups for m in grouped] == ([4, 4, 4, 11, 6] if separable else [])
    # Two 3x3 convolutions in a row see 5x5 pixels of the shallow map.
    shallow.requires_grad_()
    decoder.decode({"res2": shallow, "res5": deep}).logits[0, :, 7, 9].sum().backward()
    seen = shallow.grad[0].abs().sum(dim=0).nonzero()
    assert (seen.amax(dim=0) - seen.amin(dim=0)).tolist() == [4, 4]


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="stride 32.*model.backbone.output_stride"):
        DeepLabV3Decoder(shapes(32), num_classes=2)
    with pytest.raises(ValueError, match=r"dilations=\[6, 12\]"):
        DeepLabV3Decoder(shapes(8), num_classes=2, dilations=(6, 12))
    with pytest.raises(ValueError, match="in_feature='res9'.*'res2', 'res5'"):
        DeepLabV3Decoder(shapes(8), num_classes=2, in_feature="res9")
    with pytest.raises(ValueError, match="aux_feature='res9'.*'res2', 'res5'"):
        DeepLabV3Decoder(shapes(8), num_classes=2, aux_feature="res9")
    with pytest.raises(ValueError, match="low_level_feature='res1'.*'res2', 'res5'"):
        DeepLabV3PlusDecoder(shapes(8), num_classes=2, low_level_feature="res1")
    with pytest.raises(ValueError, match='norm=.bn.*"BN"'):
        DeepLabV3Decoder(shapes(8), num_classes=2, norm="bn")
    with pytest.raises(ValueError, match="dropout=1.5"):
        DeepLabV3PlusDecoder(shapes(8), num_classes=2, dropout=1.5)

"""Semantic FPN against detectron2's own parts."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from contrast_d2.decoders import SemSegFPNDecoder
from tests.backbones.rows import NAMES, detectron2_resnet18


def test_logits_are_those_of_detectron2() -> None:
    resnet = detectron2_resnet18()
    fpn = FPN(resnet, list(NAMES), 32, norm="GN")
    head = SemSegFPNHead(
        fpn.output_shape(), num_classes=7, conv_dims=64, common_stride=4, norm="GN"
    )
    decoder = SemSegFPNDecoder(
        resnet.output_shape(), num_classes=7, fpn_channels=32, fpn_norm="GN", conv_dims=64
    )
    pyramid = {f"fpn.{n}": w for n, w in fpn.state_dict().items() if "bottom_up" not in n}
    decoder.load_state_dict({**pyramid, **head.state_dict()})  # all of them, and no other

    images = torch.randn(2, 3, 64, 96)
    for module in (fpn, head, decoder):
        module.eval()
    with torch.no_grad():
        expected = fpn(images)
        maps = resnet(images)
        output = decoder.decode(maps)
        assert torch.equal(decoder(maps)[0], head(expected)[0])
        targets = torch.randint(0, 7, (2, 64, 96))
        assert decoder.train()(maps, targets) == head.train()(expected, targets)
        assert torch.equal(output.logits, head.layers(expected))
        assert torch.equal(output.logits, head.predictor(output.features.pop("pre_logits")))
    assert output.features.keys() == expected.keys() == {"p2", "p3", "p4", "p5"}
    assert all(torch.equal(output.features[name], expected[name]) for name in expected)


def test_a_pyramid_without_stride_4_still_gives_stride_4() -> None:
    shapes = {f"res{i}": ShapeSpec(channels=8, stride=2**i) for i in (3, 4, 5)}
    features = {n: torch.randn(1, 8, 64 // s.stride, 64 // s.stride) for n, s in shapes.items()}
    output = SemSegFPNDecoder(shapes, num_classes=3, fpn_channels=16, conv_dims=32).decode(features)
    assert output.logits.shape == (1, 3, 16, 16)
    assert list(output.features) == ["p3", "p4", "p5", "pre_logits"]


def test_strides_that_do_not_double(subtests: pytest.Subtests) -> None:
    for strides in [(4, 8, 8, 8), (4, 16), ()]:
        with subtests.test(strides=strides):
            shapes = {
                f"res{i}": ShapeSpec(channels=8, stride=s) for i, s in enumerate(strides, start=2)
            }
            with pytest.raises(ValueError, match="strides double"):
                SemSegFPNDecoder(shapes, num_classes=3)

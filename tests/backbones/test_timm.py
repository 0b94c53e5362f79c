"""What only the backbones from timm have. Shape letters: B images, C channels, h w a map."""

from __future__ import annotations

from unittest import mock

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

from contrast_d2.backbones import TimmBackbone, feature_channels, feature_shapes

from .rows import NAMES, TIMM_ROWS, TIMM_SHAPES, wake_residuals

SWIN = "swin_tiny_patch4_window7_224"


def test_shapes_are_known_without_building(subtests: pytest.Subtests) -> None:
    for row in TIMM_ROWS:
        with subtests.test(row=row):
            name, stride = row.name.split("-")[0], 8 if row.strides[-1] == 8 else None
            shapes = feature_shapes(name, output_stride=stride)
            assert shapes == row.build().output_shape()
            assert feature_channels(name, output_stride=stride) == dict(
                zip(shapes, row.channels, strict=True)
            )


def test_shapes_of_a_subset_are_in_order_from_fine_to_coarse() -> None:
    assert list(feature_channels("resnet18", out_features=["res5", "res1"]).items()) == [
        ("res1", 64),
        ("res5", 512),
    ]


@pytest.mark.slow
def test_maps_of_a_wide_image(subtests: pytest.Subtests) -> None:
    for name, channels in TIMM_SHAPES.items():
        with subtests.test(name=name, channels=channels):
            with torch.device("meta"):
                backbone = TimmBackbone(name)
                found = backbone(torch.empty(1, 3, 512, 1024))
            assert {n: tuple(x.shape[1:]) for n, x in found.items()} == {
                n: (c, 512 // s, 1024 // s)
                for n, c, s in zip(NAMES, channels, (4, 8, 16, 32), strict=True)
            }
            assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
                n: (c, s) for n, c, s in zip(NAMES, channels, (4, 8, 16, 32), strict=True)
            }


def test_output_stride_is_traded_for_dilation(subtests: pytest.Subtests) -> None:
    for output_stride, strides, dilations in [
        (8, (4, 8, 8, 8), (1, 1, 2, 4)),
        (16, (4, 8, 16, 16), (1, 1, 1, 2)),
        (32, (4, 8, 16, 32), (1, 1, 1, 1)),
    ]:
        for name in ["resnet18", "resnet50", "resnet101"]:
            with subtests.test(output_stride=output_stride, name=name):
                with torch.device("meta"):
                    backbone = TimmBackbone(name, output_stride=output_stride)
                    found = backbone(torch.empty(1, 3, 128, 192))
                assert [tuple(x.shape[2:]) for x in found.values()] == [
                    (128 // s, 192 // s) for s in strides
                ]
                assert [s.stride for s in backbone.output_shape().values()] == list(strides)
                assert backbone.size_divisibility == output_stride
                for stage, dilation in enumerate(dilations, start=1):
                    blocks = list(getattr(backbone.model, f"layer{stage}"))
                    spatial = [
                        m
                        for block in blocks[1:]
                        for m in block.modules()
                        if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
                    ]
                    assert spatial and {conv.dilation for conv in spatial} == {(dilation, dilation)}


def by_timm(name: str, backbone: TimmBackbone, images: Tensor, **options) -> list[Tensor]:
    """The maps of the plain timm model with the backbone's weights."""
    model = timm.create_model(name, features_only=True, **options)
    model.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        return model.eval()(images)


def test_resnet_maps_are_timms_own() -> None:
    backbone = TimmBackbone("resnet18", output_stride=8)
    wake_residuals(backbone)
    images = torch.randn(1, 3, 64, 96)
    expected = by_timm("resnet18", backbone, images, output_stride=8)[1:]
    with torch.no_grad():
        found = backbone.eval()(images)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


def test_hrnet_maps_are_the_branches_and_not_the_classifiers() -> None:
    backbone = TimmBackbone("hrnet_w18_small")
    images = torch.randn(1, 3, 64, 96)
    expected = by_timm("hrnet_w18_small", backbone, images, feature_location="")[1:]
    with torch.no_grad():
        found = backbone.eval()(images)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


def test_swin_maps_are_timms_own_channels_first_and_normalised() -> None:
    backbone = TimmBackbone(SWIN, norm_outputs=True)
    for norm in backbone.norms.values():
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.uniform_(norm.bias)
    images = torch.randn(1, 3, 224, 224)  # whole windows at all scales
    expected = by_timm(SWIN, backbone, images, strict_img_size=False, always_partition=True)
    with torch.no_grad():
        found = backbone.eval()(images)
    for (name, ours), theirs in zip(found.items(), expected, strict=True):
        norm = backbone.norms[name]
        deviation = theirs.var(dim=-1, keepdim=True, unbiased=False).add(norm.eps).sqrt()
        unit = (theirs - theirs.mean(dim=-1, keepdim=True)) / deviation
        torch.testing.assert_close(
            ours, (unit * norm.weight + norm.bias).permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4
        )
        assert ours.is_contiguous()


def test_swin_maps_come_channels_first_without_norms_too() -> None:
    backbone = TimmBackbone(SWIN)
    images = torch.randn(1, 3, 224, 224)  # whole windows at all scales
    expected = by_timm(SWIN, backbone, images, strict_img_size=False, always_partition=True)
    with torch.no_grad():
        found = backbone.eval()(images)
    assert not backbone.norms
    for ours, theirs in zip(found.values(), expected, strict=True):
        assert torch.equal(ours, theirs.permute(0, 3, 1, 2))


def test_norm_outputs_works_on_maps_that_come_channels_first() -> None:
    plain = TimmBackbone("convnext_atto")
    normed = TimmBackbone("convnext_atto", norm_outputs=True)
    normed.model.load_state_dict(plain.model.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        raw, found = plain.eval()(images), normed.eval()(images)
    for name, x in found.items():
        expected = torch.nn.functional.layer_norm(raw[name].permute(0, 2, 3, 1), x.shape[1:2])
        torch.testing.assert_close(x, expected.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", SWIN])
def test_stochastic_depth_acts_in_training_only(name: str) -> None:
    backbone = TimmBackbone(name, drop_path_rate=0.5, out_features=["res5"])
    wake_residuals(backbone)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        training = [backbone.train()(images)["res5"] for _ in range(3)]
        evaluation = [backbone.eval()(images)["res5"] for _ in range(2)]
    assert not all(torch.equal(training[0], x) for x in training[1:])
    assert torch.equal(*evaluation)


def test_mistakes_are_told_in_one_line(subtests: pytest.Subtests) -> None:
    for arguments, message in [
        ({"name": "resnt18"}, "no model 'resnt18'. Did you mean 'resnet18'"),
        ({"name": "resnet18.a1_in1kk"}, "Did you mean 'resnet18.a1_in1k'"),
        ({"name": "resnet18", "out_features": ["res2", "p3"]}, r"\['res2', 'p3'\].*'res5'\]"),
        ({"name": "resnet18", "out_features": []}, r"out_features=\[\].*'res2'"),
        ({"name": SWIN, "output_stride": 8}, f"{SWIN} cannot have output_stride=8"),
        ({"name": "hrnet_w18_small", "output_stride": 8}, "cannot have output_stride=8"),
        ({"name": "resnet18", "output_stride": 7}, "cannot have output_stride=7"),
        ({"name": "hrnet_w18_small", "drop_path_rate": 0.1}, "cannot have drop_path_rate=0.1"),
        ({"name": "coatnet_0_224", "pretrained": True}, "no pretrained weights of coatnet_0_224"),
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(ValueError, match=message) as error:
                TimmBackbone(**arguments)
            assert "\n" not in str(error.value)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="resnet18 cannot .* model.backbone.pretrained=False"):
        TimmBackbone("resnet18", pretrained=True)


class ProxyError(Exception):
    """As HTTP libraries have it: of no class that this project knows."""


def test_whatever_a_download_fails_with_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for error in [
        LocalEntryNotFoundError("nothing in the cache\nand no connection"),
        ConnectionError("refused"),
        TimeoutError("the read timed out"),
        ProxyError("407"),
    ]:
        with subtests.test(error=error):
            fail = mock.Mock(side_effect=error)
            monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
            with pytest.raises(ValueError, match="model.backbone.weights_file=FILE") as caught:
                TimmBackbone("resnet18", pretrained=True)
            assert str(error).splitlines()[0] in str(caught.value)
            assert "\n" not in str(caught.value)

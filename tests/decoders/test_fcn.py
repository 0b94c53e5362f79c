"""HRNetV2's head. Shape letters: B images, C channels, h w a feature map."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from contrast_d2.backbones import TimmBackbone
from contrast_d2.decoders import FCNDecoder

SHAPES = {"res2": ShapeSpec(channels=3, stride=4), "res4": ShapeSpec(channels=5, stride=16)}


def test_equals_the_papers_head_written_out() -> None:
    decoder = FCNDecoder(SHAPES, num_classes=4).eval()
    norm = decoder.fuse.norm
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    # Sizes that do not divide, as those of an unpadded image.
    fine, coarse = torch.randn(2, 3, 16, 21), torch.randn(2, 5, 4, 6)
    output = decoder({"res2": fine, "res4": coarse})
    joined = torch.cat(
        [fine, F.interpolate(coarse, size=(16, 21), mode="bilinear", align_corners=False)], dim=1
    )
    assert torch.equal(output.features["concat"], joined)
    assert torch.equal(output.logits, decoder.predictor(output.features["pre_logits"]))
    hidden = torch.einsum("oc,bchw->bohw", decoder.fuse.weight[:, :, 0, 0], joined)
    hidden = (hidden - norm.running_mean[:, None, None]) / torch.sqrt(
        norm.running_var[:, None, None] + norm.eps
    )
    hidden = (hidden * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()
    predictor = decoder.predictor
    logits = torch.einsum("oc,bchw->bohw", predictor.weight[:, :, 0, 0], hidden)
    torch.testing.assert_close(output.logits, logits + predictor.bias[:, None, None])


def test_parameters_of_hrnetv2_w48_on_cityscapes() -> None:
    # 65.9 million, as Wang et al., TPAMI 2020, give for Cityscapes.
    with torch.device("meta"):
        backbone = TimmBackbone("hrnet_w48")
        decoder = FCNDecoder(backbone.output_shape(), num_classes=19)
    count = sum(p.numel() for module in (backbone, decoder) for p in module.parameters())
    assert count == pytest.approx(65.9e6, rel=0.002)


def test_width_and_bias() -> None:
    decoder = FCNDecoder(SHAPES, num_classes=4, hidden_channels=6, norm="")
    assert decoder.fuse.weight.shape == (6, 8, 1, 1)
    assert decoder.fuse.bias is not None  # no norm to shift in its place
    assert FCNDecoder(SHAPES, num_classes=4).fuse.bias is None


def test_dropout_drops_whole_channels_in_training_only() -> None:
    decoder = FCNDecoder(SHAPES, num_classes=4, dropout=0.5)
    dropped = decoder.dropout(torch.ones(4, 8, 5, 5))
    assert set(dropped.amax(dim=(2, 3)).flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped.amax(dim=(2, 3)), dropped.amin(dim=(2, 3)))
    features = {"res2": torch.randn(2, 3, 16, 16), "res4": torch.randn(2, 5, 4, 4)}
    assert not torch.equal(decoder(features).logits, decoder(features).logits)
    decoder.eval()
    assert torch.equal(decoder(features).logits, decoder(features).logits)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one feature map"):
        FCNDecoder({}, num_classes=4)
    with pytest.raises(ValueError, match="dropout=1"):
        FCNDecoder(SHAPES, num_classes=4, dropout=1)

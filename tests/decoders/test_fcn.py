"""HRNetV2's head. Shape letters: B images, C channels, h w a feature map."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from torch.nn import functional as F

from contrast_d2.decoders import FCNDecoder

SHAPES = {"res2": ShapeSpec(channels=3, stride=4), "res4": ShapeSpec(channels=5, stride=16)}


@pytest.mark.parametrize("align_corners", [False, True])
def test_equals_the_papers_head_written_out(align_corners: bool) -> None:
    decoder = FCNDecoder(SHAPES, num_classes=4, align_corners=align_corners).eval()
    norm = decoder.fuse.norm
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    # Sizes that do not divide, as those of an unpadded image.
    fine, coarse = torch.randn(2, 3, 16, 21), torch.randn(2, 5, 4, 6)
    output = decoder.decode({"res2": fine, "res4": coarse})
    joined = torch.cat(
        [
            fine,
            F.interpolate(coarse, size=(16, 21), mode="bilinear", align_corners=align_corners),
        ],
        dim=1,
    )
    assert output.align_corners == align_corners
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


def test_width_and_bias() -> None:
    decoder = FCNDecoder(SHAPES, num_classes=4, hidden_channels=6, norm="")
    assert decoder.fuse.weight.shape == (6, 8, 1, 1)
    assert decoder.fuse.bias is not None  # no norm to shift in its place
    assert FCNDecoder(SHAPES, num_classes=4).fuse.bias is None


def test_a_wider_kernel_sees_its_neighbours_and_keeps_the_size() -> None:
    x = torch.zeros(1, 3, 9, 9, requires_grad=True)
    decoder = FCNDecoder({"res2": SHAPES["res2"]}, num_classes=4, kernel_size=3).eval()
    torch.nn.init.ones_(decoder.fuse.norm.bias)  # ReLU passes everywhere
    logits = decoder.decode({"res2": x}).logits
    assert logits.shape[-2:] == (9, 9)
    logits[..., 4, 6].sum().backward()
    seen = x.grad[0].abs().sum(dim=0).nonzero()
    assert seen.amin(dim=0).tolist() == [3, 5] and seen.amax(dim=0).tolist() == [5, 7]


@pytest.mark.parametrize("names", [["res4"], ["res2", "res3", "res4", "res5", "res6"]])
def test_any_number_of_maps(names: list[str]) -> None:
    shapes = {name: ShapeSpec(channels=int(name[-1]), stride=2 ** int(name[-1])) for name in names}
    features = {
        n: torch.randn(2, s.channels, 64 // s.stride, 128 // s.stride) for n, s in shapes.items()
    }
    output = FCNDecoder(shapes, num_classes=4).decode(features)
    finest = shapes[names[0]].stride
    assert output.logits.shape == (2, 4, 64 // finest, 128 // finest)
    assert output.features["concat"].shape[1] == sum(s.channels for s in shapes.values())


def test_first_class_scores_are_about_equal() -> None:
    # And so the first loss is about log(number of classes), whatever the width.
    shapes = {"res2": ShapeSpec(channels=720, stride=4)}
    logits = FCNDecoder(shapes, num_classes=19).layers({"res2": torch.randn(2, 720, 16, 16)})
    assert 0.1 < logits.std() < 0.3 and logits.mean().abs() < 0.1


def test_dropout_drops_whole_channels_in_training_only() -> None:
    decoder = FCNDecoder(SHAPES, num_classes=4, dropout=0.5)
    dropped = decoder.dropout(torch.ones(4, 8, 5, 5))
    assert set(dropped.amax(dim=(2, 3)).flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped.amax(dim=(2, 3)), dropped.amin(dim=(2, 3)))
    features = {"res2": torch.randn(2, 3, 16, 16), "res4": torch.randn(2, 5, 4, 4)}
    assert not torch.equal(decoder.decode(features).logits, decoder.decode(features).logits)
    decoder.eval()
    assert torch.equal(decoder.decode(features).logits, decoder.decode(features).logits)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="at least one feature map"):
        FCNDecoder({}, num_classes=4)
    with pytest.raises(ValueError, match="dropout=1"):
        FCNDecoder(SHAPES, num_classes=4, dropout=1)
    with pytest.raises(ValueError, match="kernel_size=2"):
        FCNDecoder(SHAPES, num_classes=4, kernel_size=2)
    with pytest.raises(ValueError, match='norm=.BM.*"BN"'):
        FCNDecoder(SHAPES, num_classes=4, norm="BM")
    with pytest.raises(ValueError, match="norm='GN' does not fit 8 channels"):
        FCNDecoder(SHAPES, num_classes=4, norm="GN")

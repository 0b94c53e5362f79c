"""The losses of a decoder's output, and sums of losses.

Shape letters: B images, K classes, H W labels, h w logits.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.losses import CrossEntropyLoss, LossSum, LovaszSoftmaxLoss, SegLoss, upsample
from contrast_d2.structures import SegOutput

from .rows import IGNORED, NUM_CLASSES, mixed_labels


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_lose_nothing_more(dtype: torch.dtype) -> None:
    # 5000 overflows fp16 when the pixels of a crop are summed.
    logits = (20 * torch.randn(2, NUM_CLASSES, 16, 24)).to(dtype)
    logits[0] = 5000.0 * logits[0].sign()
    labels = mixed_labels(2, 64, 96)
    loss = SegLoss(CrossEntropyLoss())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(SegOutput(logits, None, {}), labels)["loss_sem_seg"]
    expected = loss(SegOutput(logits.float(), None, {}), labels)["loss_sem_seg"]
    assert found.dtype == torch.float32
    assert found.isfinite() and torch.equal(found, expected)


def test_logits_are_resized_to_the_labels_by_pixel_areas() -> None:
    logits = torch.arange(4.0).view(1, 1, 1, 4)
    # The centres of twice as many pixels lie a quarter beside the old ones; the border is held.
    expected = torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]).view(1, 1, 1, 8)
    torch.testing.assert_close(upsample(logits, (1, 8)), expected)

    logits, labels = torch.randn(2, NUM_CLASSES, 16, 21), mixed_labels(2, 61, 83)
    found = SegLoss(CrossEntropyLoss())(SegOutput(logits, None, {}), labels)["loss_sem_seg"]
    resized = F.interpolate(logits, size=(61, 83), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, F.cross_entropy(resized, labels, ignore_index=IGNORED))


def test_logits_are_resized_from_corner_to_corner_where_the_decoder_says_so() -> None:
    # Every second pixel of 7 lies on one of 4.
    logits = torch.randn(1, NUM_CLASSES, 4, 4)
    corners = upsample(logits, (7, 7), align_corners=True)
    torch.testing.assert_close(corners[..., ::2, ::2], logits)
    output, labels = SegOutput(logits, logits, {}, align_corners=True), mixed_labels(1, 7, 7)
    found = SegLoss(CrossEntropyLoss(), aux_weight=2.0)(output, labels)
    expected = F.cross_entropy(corners, labels, ignore_index=IGNORED)
    torch.testing.assert_close(found["loss_sem_seg"], expected)
    torch.testing.assert_close(found["loss_aux"], 2 * expected)


class _Constant(nn.Module):
    """A loss that is not the main one."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.new_tensor(7.0)


def test_auxiliary_loss() -> None:
    labels = mixed_labels(2, 16, 16)
    output = SegOutput(
        torch.randn(2, NUM_CLASSES, 4, 4), torch.randn(2, NUM_CLASSES, 2, 2), features={}
    )
    main = CrossEntropyLoss()
    losses = SegLoss(main, aux_weight=0.3)(output, labels)
    assert losses.keys() == {"loss_sem_seg", "loss_aux"}
    torch.testing.assert_close(losses["loss_sem_seg"], main(upsample(output[0], (16, 16)), labels))
    aux = main(upsample(output.aux_logits, (16, 16)), labels)
    torch.testing.assert_close(losses["loss_aux"], 0.3 * aux)
    assert SegLoss(main, _Constant())(output, labels)["loss_aux"].item() == pytest.approx(0.4 * 7)
    assert SegLoss(main)(output._replace(aux_logits=None), labels).keys() == {"loss_sem_seg"}


@pytest.mark.parametrize("weight", [-0.1, math.nan])
def test_auxiliary_weight_out_of_range(weight: float) -> None:
    with pytest.raises(ValueError, match="aux_weight"):
        SegLoss(CrossEntropyLoss(), aux_weight=weight)


def test_sum_of_losses() -> None:
    logits, labels = torch.randn(2, NUM_CLASSES, 8, 8), mixed_labels(2, 8, 8)
    parts = {"entropy": CrossEntropyLoss(), "jaccard": LovaszSoftmaxLoss()}
    entropy, jaccard = (loss(logits, labels) for loss in parts.values())
    torch.testing.assert_close(LossSum(parts)(logits, labels), entropy + jaccard)
    weighted = LossSum(parts, {"jaccard": 0.3})(logits, labels)
    torch.testing.assert_close(weighted, entropy + 0.3 * jaccard)


def test_sums_that_make_no_sense(subtests: pytest.Subtests) -> None:
    for losses, weights, message in [
        ({}, None, "losses is empty"),
        ({"a": _Constant()}, {"b": 1.0}, "'b'.*none of \\['a'\\]"),
        ({"a": _Constant()}, {"a": -1.0}, "weights\\['a'\\]=-1.0"),
        ({"a": _Constant()}, {"a": math.nan}, "weights\\['a'\\]=nan"),
    ]:
        with subtests.test(losses=losses, weights=weights):
            with pytest.raises(ValueError, match=message):
                LossSum(losses, weights)

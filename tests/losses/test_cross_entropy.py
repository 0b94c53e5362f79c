"""Segmentation losses. Shape letters: B images, K classes, H W labels, h w logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.losses import CrossEntropyLoss, SegLoss, cross_entropy, upsample
from contrast_d2.structures import SegOutput

NUM_CLASSES = 4
WEIGHTS = [0.5, 2.0, 1.0, 3.0]
IGNORED = 255


def mixed_labels(*size: int) -> Tensor:
    """Labels of all classes, and about a fifth of the pixels ignored."""
    labels = torch.randint(0, NUM_CLASSES, size)
    labels[torch.rand(size) < 0.2] = IGNORED
    return labels


def by_loops(logits: Tensor, labels: Tensor, weights: list[float]) -> float:
    """The definition, a pixel at a time, in fp64."""
    total = norm = 0.0
    for image in range(len(labels)):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                label = int(labels[image, y, x])
                if label == IGNORED:
                    continue
                scores = logits[image, :, y, x].double().tolist()
                log_sum = math.log(sum(math.exp(s) for s in scores))
                total += weights[label] * (log_sum - scores[label])
                norm += weights[label]
    return total / norm


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_equals_the_definition(weights: list[float] | None) -> None:
    logits, labels = 3 * torch.randn(2, NUM_CLASSES, 5, 7), mixed_labels(2, 5, 7)
    expected = by_loops(logits, labels, weights or [1.0] * NUM_CLASSES)
    found = CrossEntropyLoss(class_weights=weights)(logits, labels)
    assert found.shape == () and found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_equals_torch_in_value_and_gradient(weights: list[float] | None) -> None:
    weight = None if weights is None else torch.tensor(weights)
    logits = (3 * torch.randn(2, NUM_CLASSES, 16, 16)).requires_grad_()
    labels = mixed_labels(2, 16, 16)
    found = cross_entropy(logits, labels, weight=weight)
    expected = F.cross_entropy(logits, labels, weight=weight, ignore_index=IGNORED)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits)
    )


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_gradcheck(weights: list[float] | None) -> None:
    weight = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    logits = torch.randn(2, NUM_CLASSES, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = mixed_labels(2, 3, 4)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, weight=weight), logits)


@pytest.mark.parametrize("weights", [None, WEIGHTS, [0.0] * NUM_CLASSES])
def test_no_valid_pixel_gives_zero(weights: list[float] | None) -> None:
    logits = torch.randn(2, NUM_CLASSES, 6, 6, requires_grad=True)
    # With weights of 0 even valid pixels leave nothing to average over.
    label = 1 if weights is not None and not any(weights) else IGNORED
    loss = CrossEntropyLoss(class_weights=weights)(logits, torch.full((2, 6, 6), label))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_another_ignore_label() -> None:
    logits, labels = torch.randn(1, NUM_CLASSES, 4, 4), torch.randint(0, NUM_CLASSES, (1, 4, 4))
    found = CrossEntropyLoss(ignore_label=2, class_weights=WEIGHTS)(logits, labels)
    expected = F.cross_entropy(logits, labels, weight=torch.tensor(WEIGHTS), ignore_index=2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_class_weights_may_be_integers_and_are_not_saved() -> None:
    logits, labels = torch.randn(1, NUM_CLASSES, 4, 4), mixed_labels(1, 4, 4)
    whole = CrossEntropyLoss(class_weights=[1, 2, 3, 4])
    assert torch.equal(
        whole(logits, labels), CrossEntropyLoss(class_weights=[1.0, 2.0, 3.0, 4.0])(logits, labels)
    )
    assert not whole.state_dict()


@pytest.mark.parametrize("count", [NUM_CLASSES - 1, NUM_CLASSES + 1])
def test_class_weights_of_the_wrong_number(count: int) -> None:
    loss = CrossEntropyLoss(class_weights=[1.0] * count)
    with pytest.raises(ValueError, match=f"{count} entries for {NUM_CLASSES} classes"):
        loss(torch.randn(1, NUM_CLASSES, 4, 4), mixed_labels(1, 4, 4))


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

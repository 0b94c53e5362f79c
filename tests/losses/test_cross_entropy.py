"""Cross entropy. Shape letters: B images, K classes, H W labels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.losses import CrossEntropyLoss, cross_entropy

from .rows import IGNORED, NUM_CLASSES, WEIGHTS, mixed_labels


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


def test_no_valid_pixel_gives_zero(subtests: pytest.Subtests) -> None:
    for weights in [None, WEIGHTS, [0.0] * NUM_CLASSES]:
        with subtests.test(weights=weights):
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

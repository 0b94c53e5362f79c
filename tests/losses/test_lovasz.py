"""Lovasz-softmax. Shape letters: B images, K classes, H W labels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contrast_d2.losses import LovaszSoftmaxLoss, lovasz_softmax

from .rows import IGNORED, NUM_CLASSES, mixed_labels


def jaccard_loss(wrong: set[int], foreground: set[int]) -> float:
    """Of a class whose pixels are `foreground`, if the pixels `wrong` are predicted wrongly."""
    union = foreground | wrong
    return 1 - len(foreground - wrong) / len(union) if union else 0.0


def by_sets(logits: Tensor, labels: Tensor, classes: str) -> float:
    """The Lovasz extension by its definition: sets of pixels that grow by one, in fp64."""
    probabilities = logits.double().softmax(dim=1).transpose(0, 1).flatten(1).tolist()
    flat = labels.flatten().tolist()
    valid = [i for i, label in enumerate(flat) if label != IGNORED]
    losses = []
    for c in range(logits.shape[1]):
        foreground = {i for i in valid if flat[i] == c}
        if not foreground and classes == "present":
            continue
        error = {
            i: 1 - probabilities[c][i] if i in foreground else probabilities[c][i] for i in valid
        }
        loss, wrong = 0.0, set()
        for i in sorted(valid, key=error.__getitem__, reverse=True):
            grown = wrong | {i}
            step = jaccard_loss(grown, foreground) - jaccard_loss(wrong, foreground)
            loss, wrong = loss + error[i] * step, grown
        losses.append(loss)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("classes", ["present", "all"])
def test_equals_the_definition(classes: str) -> None:
    logits, labels = 2 * torch.randn(2, NUM_CLASSES, 5, 7), mixed_labels(2, 5, 7)
    labels[labels == 1] = 0  # a class that is absent
    found = lovasz_softmax(logits.double(), labels, classes=classes)
    assert found.item() == pytest.approx(by_sets(logits, labels, classes), rel=1e-9)


def test_per_image_is_the_mean_over_images_with_a_valid_pixel() -> None:
    logits, labels = 2 * torch.randn(3, NUM_CLASSES, 5, 7), mixed_labels(3, 5, 7)
    labels[0, labels[0] == 1] = 0
    labels[2] = IGNORED
    for classes in ("present", "all"):
        found = lovasz_softmax(logits.double(), labels, classes=classes, per_image=True)
        expected = [by_sets(logits[i : i + 1], labels[i : i + 1], classes) for i in (0, 1)]
        assert found.item() == pytest.approx(sum(expected) / 2, rel=1e-9)


def test_hard_predictions_give_the_jaccard_loss() -> None:
    """The extension agrees with the set function where all errors are 0 or 1."""
    labels = torch.tensor([[[0, 0, 0, 1, 1, IGNORED]]])
    predicted = torch.tensor([[[0, 0, 1, 1, 0, 1]]])
    logits = 200.0 * torch.nn.functional.one_hot(predicted, 2).permute(0, 3, 1, 2)
    # Intersection over union: 2 of 4 pixels, and 1 of 3.
    assert lovasz_softmax(logits, labels).item() == pytest.approx(1 - (2 / 4 + 1 / 3) / 2)


def test_fp32_keeps_its_digits_on_large_crops() -> None:
    """A step of the Jaccard loss is of the order of 1 / (H W)."""
    logits, labels = 3 * torch.randn(1, 3, 512, 512), torch.randint(0, 3, (1, 512, 512))
    grads = []
    for exact in (logits.double(), logits):
        leaf = exact.requires_grad_()
        (grad,) = torch.autograd.grad(lovasz_softmax(leaf, labels), leaf)
        grads.append(grad.double())
    assert (grads[1] - grads[0]).norm() <= 1e-4 * grads[0].norm()


def test_unknown_choice_of_classes() -> None:
    with pytest.raises(ValueError, match="classes='some'.*'present' or 'all'"):
        LovaszSoftmaxLoss(classes="some")

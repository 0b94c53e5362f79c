"""Dice and focal loss. Shape letters: B images, K classes, H W labels."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contrast_d2.losses import LibraryLoss, dice_loss, focal_loss

from .rows import IGNORED, NUM_CLASSES, mixed_labels


@pytest.fixture
def library() -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="needs the extra `losses`")


def valid_pixels(ignore_label: int = IGNORED) -> tuple[Tensor, Tensor]:
    """Logits and labels as the losses take them, in fp64; class 1 is absent."""
    logits = torch.randn(2, NUM_CLASSES, 5, 7, dtype=torch.float64)
    labels = mixed_labels(2, 5, 7)
    labels[labels == 1] = 0
    return logits, labels.where(labels != IGNORED, ignore_label)


@pytest.mark.parametrize("log_loss", [False, True])
@pytest.mark.parametrize("ignore_label", [IGNORED, 3])
def test_dice_equals_its_definition(library: None, ignore_label: int, log_loss: bool) -> None:
    logits, labels = valid_pixels(ignore_label)
    probabilities = logits.softmax(dim=1)
    expected = 0.0
    for c in range(NUM_CLASSES):
        p, y = probabilities[:, c][labels != ignore_label], (labels == c)[labels != ignore_label]
        if y.any():
            coefficient = 2 * (p * y).sum() / (p.sum() + y.sum())
            expected += -coefficient.log() if log_loss else 1 - coefficient
    found = dice_loss(log_loss=log_loss, ignore_label=ignore_label)(logits, labels)
    torch.testing.assert_close(found, expected / NUM_CLASSES)


def test_focal_loss_equals_its_definition(library: None) -> None:
    logits, labels = valid_pixels()
    p = logits.sigmoid().movedim(1, -1)[labels != IGNORED]
    y = F.one_hot(labels[labels != IGNORED], NUM_CLASSES)
    right = torch.where(y == 1, p, 1 - p)
    alpha = torch.where(y == 1, 0.3, 0.7)
    expected = (-alpha * (1 - right) ** 1.5 * right.log()).mean()
    found = focal_loss(gamma=1.5, alpha=0.3)(logits, labels)
    torch.testing.assert_close(found, expected)


class _Products(nn.Module):
    """A loss of matrix products, which autocast would round."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.flatten(1) @ logits.flatten(1).T).mean()


def test_another_loss_runs_without_autocast() -> None:
    logits, labels = torch.randn(2, NUM_CLASSES, 9, 9), mixed_labels(2, 9, 9)
    loss = LibraryLoss(_Products())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(logits, labels)
    assert torch.equal(found, loss(logits, labels))


@pytest.mark.parametrize("build", [dice_loss, focal_loss])
def test_without_the_library_the_extra_is_named(build, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'contrast_d2\[losses\]'"):
        build()

"""What every loss must do. Shape letters: B images, K classes, H W labels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ..helpers import HostWaits
from .rows import IGNORED, LOSSES, NUM_CLASSES, OF_THE_LIBRARY, mixed_labels


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> nn.Module:
    return LOSSES[request.param]()


def gradient(loss: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of the logits."""
    logits = logits.detach().requires_grad_()
    value = loss(logits, labels)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def test_gradcheck(loss: nn.Module) -> None:
    logits = 2 * torch.randn(2, NUM_CLASSES, 4, 5, dtype=torch.float64)
    labels = mixed_labels(2, 4, 5)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels), logits.requires_grad_())
    assert torch.autograd.grad(loss(logits, labels), logits)[0].any()


def test_no_valid_pixel_gives_zero(loss: nn.Module) -> None:
    logits = torch.randn(2, NUM_CLASSES, 6, 6, requires_grad=True)
    value = loss(logits, torch.full((2, 6, 6), IGNORED))
    value.backward()
    assert value.shape == () and value.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    # All parameters are touched, or DistributedDataParallel would wait for them.
    assert all(p.grad is not None and not p.grad.any() for p in loss.parameters())


def test_a_batch_of_one_class(loss: nn.Module) -> None:
    logits = torch.randn(2, NUM_CLASSES, 6, 6)
    value, grad = gradient(loss, logits, torch.full((2, 6, 6), 2))
    assert value.isfinite() and grad.isfinite().all() and grad.any()


def test_a_perfect_prediction(loss: nn.Module) -> None:
    labels = mixed_labels(2, 8, 8)
    targets = nn.functional.one_hot(labels.where(labels != IGNORED, 0), NUM_CLASSES)
    logits = 200 * targets.permute(0, 3, 1, 2) - 100.0
    value, grad = gradient(loss, logits, labels)
    assert value.isfinite() and grad.isfinite().all()
    assert value < gradient(loss, -logits, labels)[0]


def test_ignored_pixels_do_not_count(loss: nn.Module) -> None:
    labels = mixed_labels(2, 8, 8)
    labels[1] = IGNORED
    logits = torch.randn(2, NUM_CLASSES, 8, 8)
    ignored = (labels == IGNORED)[:, None].expand_as(logits)
    value, grad = gradient(loss, logits, labels)
    assert not grad[ignored].any() and grad.any()
    other_value, other_grad = gradient(loss, logits.where(~ignored, 9 * torch.randn(())), labels)
    torch.testing.assert_close(other_value, value)
    torch.testing.assert_close(other_grad, grad)


def test_the_order_of_images_and_classes_does_not_matter() -> None:
    logits, labels = torch.randn(3, NUM_CLASSES, 8, 8), mixed_labels(3, 8, 8)
    images, classes = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    renamed = torch.cat([classes.argsort(), torch.full((IGNORED,), IGNORED)])[labels]
    for name, build in LOSSES.items():
        if "weighted" in name or name in OF_THE_LIBRARY:
            continue
        loss = build()
        expected, expected_grad = gradient(loss, logits, labels)
        value, grad = gradient(loss, logits[images], labels[images])
        torch.testing.assert_close(value, expected, msg=name)
        torch.testing.assert_close(grad, expected_grad[images], msg=name)
        value, grad = gradient(loss, logits[:, classes], renamed)
        torch.testing.assert_close(value, expected, msg=name)
        torch.testing.assert_close(grad, expected_grad[:, classes], msg=name)


def test_low_precision_and_autocast_lose_nothing_more(
    loss: nn.Module, subtests: pytest.Subtests
) -> None:
    for dtype in [torch.float16, torch.bfloat16]:
        with subtests.test(dtype=dtype):
            logits, labels = (
                (5 * torch.randn(2, NUM_CLASSES, 24, 24)).to(dtype),
                mixed_labels(2, 24, 24),
            )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found, grad = gradient(loss, logits, labels)
            exact, exact_grad = gradient(loss, logits.float(), labels)
            assert found.dtype == torch.float32 and torch.equal(found, exact)
            torch.testing.assert_close(grad, exact_grad.to(dtype))


def test_fp32_is_close_to_fp64(loss: nn.Module) -> None:
    logits, labels = 3 * torch.randn(2, NUM_CLASSES, 64, 64), mixed_labels(2, 64, 64)
    value, grad = gradient(loss, logits, labels)
    exact, exact_grad = gradient(copy.deepcopy(loss).double(), logits.double(), labels)
    assert value.dtype == torch.float32 and exact.dtype == torch.float64
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)
    assert (grad - exact_grad).norm() <= 1e-4 * exact_grad.norm()


def test_the_host_never_waits() -> None:
    logits = torch.randn(2, NUM_CLASSES, 12, 12, requires_grad=True)
    labels = mixed_labels(2, 12, 12)
    for name, build in LOSSES.items():
        if name in OF_THE_LIBRARY:  # which selects the valid pixels
            continue
        loss = build()
        with HostWaits() as waits:
            loss(logits, labels).backward()
        assert not waits.calls, name


def test_state_stays_out_of_the_checkpoint_but_for_parameters(loss: nn.Module) -> None:
    assert set(loss.state_dict()) == {name for name, _ in loss.named_parameters()}

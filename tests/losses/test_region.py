"""Region mutual information. Shape letters: B images, K classes, H W labels, d N of patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from contrast_d2.losses import RMILoss, region_mutual_information

from .rows import IGNORED, NUM_CLASSES, mixed_labels

RIDGE = 5e-4


def patches(pixels: np.ndarray, radius: int, stride: int, pool: str) -> np.ndarray:
    """All patches of a map (H, W) after pooling, one per row."""
    of_square = np.max if pool == "max" else np.mean
    rows, columns = pixels.shape[0] // stride, pixels.shape[1] // stride
    pooled = np.array(
        [
            [of_square(pixels[y * stride : (y + 1) * stride, x * stride : (x + 1) * stride])
             for x in range(columns)]
            for y in range(rows)
        ]
    )  # fmt: skip
    return np.array(
        [
            pooled[y : y + radius, x : x + radius].ravel()
            for y in range(rows - radius + 1)
            for x in range(columns - radius + 1)
        ]
    )


def information(
    target: np.ndarray, probability: np.ndarray, radius: int, stride: int, pool: str
) -> float:
    """I / d of one image and class, by the formula."""
    y, p = (patches(pixels, radius, stride, pool) for pixels in (target, probability))
    d, n = radius**2, len(y)
    joint = np.cov(np.hstack([y, p]).T, bias=True) * n
    s_y, s_p, cross = joint[:d, :d], joint[d:, d:], joint[:d, d:]
    remainder = s_y - cross @ np.linalg.inv(s_p + RIDGE * np.eye(d)) @ cross.T
    return -0.5 * np.linalg.slogdet(remainder + RIDGE * np.eye(d))[1] / d


@pytest.mark.parametrize(
    ("radius", "stride", "pool"),
    [(3, 1, "average"), (2, 2, "average"), (3, 3, "average"), (3, 3, "max")],
)
def test_equals_the_definition(radius: int, stride: int, pool: str) -> None:
    logits = 2 * torch.randn(2, NUM_CLASSES, 19, 23, dtype=torch.float64)
    labels = mixed_labels(2, 19, 23)
    loss = RMILoss(weight=0.3, radius=radius, stride=stride, pool=pool)
    entropy, informations = 0.0, []
    for image, label in zip(logits, labels, strict=True):
        valid = (label != IGNORED).numpy()
        for c in range(NUM_CLASSES):
            target = (label == c).numpy().astype(float)
            p = image[c].sigmoid().numpy()
            entropy -= np.log(np.where(target == 1, p, 1 - p))[valid].sum()
            informations.append(information(target, p * valid, radius, stride, pool))
    expected = 0.3 * entropy / (labels != IGNORED).sum().item() - 0.7 * sum(informations) / 2
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-8)


def test_a_prediction_that_tells_more_has_more_information() -> None:
    labels = torch.randint(0, 2, (1, 1, 8, 8)).double()
    labels = labels.repeat_interleave(6, 2).repeat_interleave(6, 3)
    found = [
        region_mutual_information(labels, (1 - noise) * labels + noise * torch.rand_like(labels))
        for noise in (1.0, 0.5, 0.1, 0.0)
    ]
    assert all(a + 0.1 < b for a, b in zip(found, found[1:], strict=False))
    # No mutual information tells a label from its opposite; the cross entropy does.
    torch.testing.assert_close(region_mutual_information(labels, 1 - labels), found[-1])


def test_of_a_prediction_that_is_nearly_right_fp32_maps_keep_their_digits() -> None:
    """The covariance that is left is a thousandth of the ones that are subtracted, or less."""
    targets = torch.randint(0, 2, (1, 2, 8, 8)).double()
    targets = targets.repeat_interleave(24, 2).repeat_interleave(24, 3)
    probabilities = 0.99 * targets + 0.01 * torch.rand_like(targets)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = probabilities.to(dtype).requires_grad_()
        found = region_mutual_information(targets.to(dtype), leaf)
        (grad,) = torch.autograd.grad(found.sum(), leaf)
        results.append((found, grad.double()))
    (exact, exact_grad), (found, grad) = results
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    assert (grad - exact_grad).norm() <= 1e-3 * exact_grad.norm()


def test_of_an_absent_class_it_is_a_constant() -> None:
    probabilities = torch.rand(1, 1, 24, 24, requires_grad=True)
    found = region_mutual_information(torch.zeros(1, 1, 24, 24), probabilities)
    assert found.item() == pytest.approx(-0.5 * math.log(RIDGE))
    assert not torch.autograd.grad(found.sum(), probabilities)[0].any()


def test_images_without_a_valid_pixel_are_left_out() -> None:
    logits, labels = torch.randn(3, NUM_CLASSES, 24, 24), mixed_labels(3, 24, 24)
    labels[1] = IGNORED
    loss = RMILoss()
    torch.testing.assert_close(loss(logits, labels), loss(logits[[0, 2]], labels[[0, 2]]))


def test_gradients_are_finite_for_flat_and_for_saturated_scores(subtests: pytest.Subtests) -> None:
    """Covariances that are singular but for the ridge, of constant maps and of perfect ones."""
    for scale in [1e-6, 1.0, 1e6]:
        with subtests.test(scale=scale):
            labels = torch.zeros(2, 64, 64, dtype=torch.int64)
            labels[:, 20:, 30:] = 1
            logits = (scale * torch.stack([0.5 - labels, labels - 0.5], dim=1)).requires_grad_()
            value = RMILoss()(logits, labels)
            value.backward()
            assert value.isfinite() and logits.grad.isfinite().all()


def test_maps_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="12 pixels a side, these have 11x40"):
        RMILoss()(torch.randn(1, NUM_CLASSES, 11, 40), mixed_labels(1, 11, 40))


def test_arguments_out_of_range(subtests: pytest.Subtests) -> None:
    for options, message in [
        ({"weight": 1.5}, "weight=1.5"),
        ({"radius": 0}, "radius=0"),
        ({"stride": 0}, "stride=0"),
        ({"pool": "min"}, "pool='min'"),
    ]:
        with subtests.test(options=options):
            with pytest.raises(ValueError, match=message):
                RMILoss(**options)

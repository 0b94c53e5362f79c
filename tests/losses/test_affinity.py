"""Adaptive affinity fields. Shape letters: B images, K classes, H W labels, S kernel sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from contrast_d2.losses import AdaptiveAffinityLoss

from .rows import IGNORED, NUM_CLASSES, mixed_labels

CLIP = 1e-4


def divergence(p: float, q: float) -> float:
    """Of two coins, KL(p || q)."""
    p, q = (min(max(x, CLIP), 1 - CLIP) for x in (p, q))
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def by_loops(
    logits: Tensor, labels: Tensor, sizes: tuple[int, ...], margin: float, weights: Tensor
) -> tuple[float, float]:
    """Grouping and separating loss by the equations, a pair and a class at a time.

    `weights` are (2, S, K), for grouping and for separating.
    """
    probabilities = logits.double().softmax(dim=1).tolist()
    height, width = labels.shape[1:]
    result = [0.0, 0.0]
    for s, size in enumerate(sizes):
        terms: list[list[float]] = [[], []]
        for b, y, x in itertools.product(range(len(labels)), range(height), range(width)):
            for dy, dx in itertools.product((-(size // 2), 0, size // 2), repeat=2):
                y2, x2 = y + dy, x + dx
                if dy == dx == 0 or not (0 <= y2 < height and 0 <= x2 < width):
                    continue
                here, there = int(labels[b, y, x]), int(labels[b, y2, x2])
                if IGNORED in (here, there):
                    continue
                for c in range(NUM_CLASSES):
                    p = probabilities[b][c]
                    value = divergence(p[y2][x2], p[y][x])
                    separate = (here == c) != (there == c)
                    value = max(0.0, margin - value) if separate else value
                    terms[separate].append(float(weights[int(separate), s, c]) * value)
        for kind in (0, 1):
            result[kind] += sum(terms[kind]) / len(terms[kind])
    return result[0], result[1]


def with_weights(**options) -> AdaptiveAffinityLoss:
    """A loss whose weights over kernel sizes are not equal any more."""
    loss = AdaptiveAffinityLoss(NUM_CLASSES, stride=1, **options).double()
    with torch.no_grad():
        for scores in loss.parameters():
            scores.copy_(torch.randn_like(scores))
    return loss


@pytest.mark.parametrize("sizes", [(3, 5, 7), (5,)])
def test_equals_the_definition(sizes: tuple[int, ...]) -> None:
    # Large scores, so that some pairs are beyond the margin and some probabilities clipped.
    logits = 4 * torch.randn(2, NUM_CLASSES, 6, 8, dtype=torch.float64)
    labels = mixed_labels(2, 6, 8)
    loss = with_weights(kernel_sizes=sizes, margin=2.0, grouping_weight=0.7, separating_weight=1.3)
    scores = torch.stack([loss.grouping_scores, loss.separating_scores]).detach()
    weights = scores.softmax(dim=1)
    grouping, separating = by_loops(logits, labels, sizes, 2.0, weights)
    assert grouping > 0.1 and separating > 0.1
    expected = 0.7 * grouping + 1.3 * separating
    assert loss(logits, labels).item() == pytest.approx(expected, rel=1e-9)


def test_weights_are_trained_to_make_the_loss_larger() -> None:
    logits = 3 * torch.randn(1, NUM_CLASSES, 9, 9, dtype=torch.float64, requires_grad=True)
    labels = mixed_labels(1, 9, 9)
    loss = with_weights()
    value = loss(logits, labels)
    value.backward()
    for parameter in loss.parameters():
        assert parameter.grad.any()
        # The opposite of the true gradient, which finite differences give.
        index, step = (0, 2), 1e-6
        with torch.no_grad():
            parameter[index] += step
            slope = (loss(logits, labels) - value) / step
            parameter[index] -= step
        assert parameter.grad[index].item() == pytest.approx(-slope.item(), rel=1e-4)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    optimizer.step()
    assert loss(logits, labels) > value


def test_the_factor_falls_to_a_share_of_the_decay() -> None:
    logits, labels = torch.randn(1, NUM_CLASSES, 9, 9), mixed_labels(1, 9, 9)
    loss = AdaptiveAffinityLoss(NUM_CLASSES, stride=1, decay=10.0, max_iter=4)
    constant = AdaptiveAffinityLoss(NUM_CLASSES, stride=1)(logits, labels)
    found = [loss(logits, labels) / constant for _ in range(6)]
    expected = [10 ** (-min(step, 4) / 4) for step in range(6)]
    torch.testing.assert_close(torch.stack(found), torch.tensor(expected))
    # A resumed run goes on, and evaluation does not count.
    other = AdaptiveAffinityLoss(NUM_CLASSES, stride=1, decay=10.0, max_iter=12).eval()
    other.load_state_dict(loss.state_dict())
    for _ in range(2):
        torch.testing.assert_close(other(logits, labels) / constant, torch.tensor(10**-0.5))


def test_pairs_are_taken_on_a_grid_of_the_stride() -> None:
    logits, labels = torch.randn(2, NUM_CLASSES, 22, 27), mixed_labels(2, 22, 27)
    found = AdaptiveAffinityLoss(NUM_CLASSES, stride=4)(logits, labels)
    grid = AdaptiveAffinityLoss(NUM_CLASSES, stride=1)(
        logits[..., 2::4, 2::4], labels[..., 2::4, 2::4]
    )
    torch.testing.assert_close(found, grid)


def test_kernels_larger_than_the_map_have_no_pairs() -> None:
    logits, labels = torch.randn(1, NUM_CLASSES, 2, 3), torch.tensor([[[0, 0, 1], [2, 0, 1]]])
    found = AdaptiveAffinityLoss(NUM_CLASSES, kernel_sizes=(3, 9), stride=1)(logits, labels)
    small = AdaptiveAffinityLoss(NUM_CLASSES, kernel_sizes=(3,), stride=1)(logits, labels)
    # Of two sizes with equal weights, one gives nothing.
    torch.testing.assert_close(found, small / 2)


def test_arguments_out_of_range(subtests: pytest.Subtests) -> None:
    for options, message in [
        ({"kernel_sizes": (3, 4)}, r"kernel_sizes=\[3, 4\]"),
        ({"kernel_sizes": ()}, r"kernel_sizes=\[\]"),
        ({"margin": 0.0}, "margin=0.0"),
        ({"separating_weight": -1.0}, "separating_weight=-1.0"),
        ({"stride": 0}, "stride=0"),
        ({"decay": 0.5}, "decay=0.5"),
        ({"decay": 10.0}, "decay=10.0 with max_iter=None"),
    ]:
        with subtests.test(options=options):
            with pytest.raises(ValueError, match=message):
                AdaptiveAffinityLoss(NUM_CLASSES, **options)


def test_another_number_of_classes() -> None:
    with pytest.raises(ValueError, match="num_classes=5.* 4 classes"):
        AdaptiveAffinityLoss(5)(torch.randn(1, NUM_CLASSES, 8, 8), mixed_labels(1, 8, 8))

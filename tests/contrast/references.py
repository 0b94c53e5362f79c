"""The equations, written as loops in float64: slow, and plain enough to be checked by eye.

Shape letters: A anchors, C contrast samples, D embedding width, K classes, B images.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F


def pair_loss(anchor: Tensor, positive: Tensor, negatives: list[Tensor], temperature: float):
    """-log( e^(a.p/t) / ( e^(a.p/t) + sum_n e^(a.n/t) ) ) of one anchor with one positive."""
    numerator = torch.exp(torch.dot(anchor, positive) / temperature)
    denominator = numerator
    for negative in negatives:
        denominator = denominator + torch.exp(torch.dot(anchor, negative) / temperature)
    return -torch.log(numerator / denominator)


def within_loss(
    anchors: Tensor, labels: list[int], temperature: float, count_empty: bool = False
) -> Tensor:
    """Equations (1) and (2): anchors among themselves."""
    means = []
    for i, label in enumerate(labels):
        positives = [j for j, other in enumerate(labels) if other == label and j != i]
        negatives = [anchors[n] for n, other in enumerate(labels) if other != label]
        means.append(_anchor_mean(anchors, i, anchors, positives, negatives, temperature))
    return _mean(means, anchors, count_empty)


def cross_loss(
    anchors: Tensor,
    labels: list[int],
    contrast: Tensor,
    contrast_labels: list[int],
    temperature: float,
    count_empty: bool = False,
    lead: bool = False,
) -> Tensor:
    """Equation (4): anchors of one set against another; negative contrast labels are no samples.

    With `lead`, the contrast set begins with the anchors, and no anchor is its own positive.
    """
    means = []
    for i, label in enumerate(labels):
        positives = [
            j
            for j, other in enumerate(contrast_labels)
            if 0 <= other == label and (j, lead) != (i, True)
        ]
        negatives = [contrast[n] for n, other in enumerate(contrast_labels) if 0 <= other != label]
        means.append(_anchor_mean(anchors, i, contrast, positives, negatives, temperature))
    return _mean(means, anchors, count_empty)


def two_role_loss(
    anchors: Tensor,
    labels: list[int],
    positives: Tensor,
    negatives: Tensor,
    positive_labels: list[int],
    negative_labels: list[int],
    temperature: float,
    count_empty: bool = False,
    *,
    among_themselves: bool,
) -> Tensor:
    """Anchors against positives and negatives of two sets.

    With `among_themselves` the positives are the anchors, and no anchor is its own.
    """
    samples = torch.cat([positives, negatives])
    means = []
    for i, label in enumerate(labels):
        same = [
            j
            for j, other in enumerate(positive_labels)
            if other == label and not (among_themselves and j == i)
        ]
        others = [negatives[n] for n, other in enumerate(negative_labels) if other != label]
        means.append(_anchor_mean(anchors, i, samples, same, others, temperature))
    return _mean(means, anchors, count_empty)


def _anchor_mean(anchors, i, contrast, positives, negatives, temperature) -> Tensor | None:
    if not positives:
        return None
    total = sum(pair_loss(anchors[i], contrast[j], negatives, temperature) for j in positives)
    return total / len(positives)


def _mean(means: list[Tensor | None], anchors: Tensor, count_empty: bool) -> Tensor:
    valid = [mean for mean in means if mean is not None]
    number = len(means) if count_empty else len(valid)
    return sum(valid) / number if valid else anchors.sum() * 0


def dense_loss(anchors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Equations (1) and (2) as one would write them with whole matrices, in the inputs' dtype."""
    logits = anchors @ anchors.T / temperature
    same = labels[:, None] == labels
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    negatives = logits.masked_fill(same, -torch.inf).logsumexp(dim=1, keepdim=True)
    pairs = F.softplus(negatives - logits) * positive
    return (pairs.sum(dim=1) / positive.sum(dim=1)).mean()


def count_groups(label_map: Tensor, num_classes: int) -> Counter:
    """Pixels of each (class, image) of a (B, h, w) map."""
    return Counter(
        (label, image)
        for image, one in enumerate(label_map.tolist())
        for row in one
        for label in row
        if 0 <= label < num_classes
    )


def release_quotas(
    counts: Counter, *, max_anchors, min_pixels, max_per_group, min_per_class
) -> dict:
    """V pixels from each (class, image) with at least `min_pixels`."""
    sizes = {group: n for group, n in counts.items() if n >= min_pixels}
    target = _common_target(sizes, max_anchors, max_per_group, min_per_class)
    return {group: min(n, target) for group, n in sizes.items()}


def paper_quotas(counts: Counter, *, max_anchors, min_pixels, max_per_group, min_per_class) -> dict:
    """K pixels from each class, as {class: sorted shares of its images}."""
    sizes: Counter = Counter()
    for (label, _), n in counts.items():
        sizes[label] += n
    sizes = Counter({label: n for label, n in sizes.items() if n >= min_pixels})
    target = _common_target(sizes, max_anchors, max_per_group, min_per_class)
    return {
        label: sorted(
            deal([n for (other, _), n in counts.items() if other == label], min(size, target))
        )
        for label, size in sizes.items()
    }


def _common_target(sizes: dict, max_anchors, max_per_group, min_per_class) -> int:
    if not sizes:
        return 0
    target = max(min(sizes.values()), min_per_class)
    if max_per_group is not None:
        target = min(target, max_per_group)
    return min(target, max_anchors // len(sizes))


def deal(sizes: list[int], number: int) -> list[int]:
    """Deals `number` cards one by one, always to the least served of those that can take more."""
    shares = [0] * len(sizes)
    for _ in range(number):
        open_seats = [i for i, size in enumerate(sizes) if shares[i] < size]
        shares[min(open_seats, key=lambda i: shares[i])] += 1
    return shares

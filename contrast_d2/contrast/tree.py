"""Triplets along a class tree (after Li et al., CVPR 2022). Shape letters: A anchors, K classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .method import ContrastMethod, check_above_zero
from .projector import MultiScaleProjector
from .sampling import BalancedSampler, Batch
from .sets import at_least_fp32, on_device
from .terms import OwnTerm, PairSample


class TreeTriplets(ContrastMethod):
    """Keeps pixels nearer to those of a sibling class than to those of other branches of a tree.

    For each drawn pixel a, a pixel s of another class of its group, and a pixel o of another group,
    both at random of the pixels drawn from the images of this process,

        L = weight * mean_a max(0, margin - z_a.z_s + z_a.z_o)

    over the pixels that have both. It is the contrastive half of the method; the other half is a
    loss on scores of groups, which the segmentation head here does not have.

    Of the paper we have an account and another's code, which takes the first pixels of the batch
    and pairs them by rank, and the mean over classes of a mean. Ours: random draws of equal numbers
    from all classes, and one mean.

    Args:
        projector, warmup_iters, across_processes: as in `ContrastMethod`.
        sampler: draws the pixels.
        groups: the tree: classes by group, such as the categories of Cityscapes. Where groups
            overlap, a class is of the first that names it.
        feature: name of the feature map.
        margin: of cosines; 0.6 in the code, 0.1 and half the difference of distances in the tree.
        weight: of the term; the code's is 0 at the first iteration, rises, and stays at 0.5.

    Attributes:
        parents: number of the group of each class.

    Raises:
        ValueError: an argument out of its range, a map without projector, or groups that leave a
            class out, name one that does not exist, or in which no class has a sibling.

    Reference: Li, Zhou, Wang, Li, Yang, "Deep Hierarchical Semantic Segmentation", CVPR 2022.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        sampler: BalancedSampler,
        groups: Mapping[str, Sequence[int]],
        *,
        feature: str,
        margin: float = 0.6,
        weight: float = 0.5,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        check_above_zero(margin=margin, weight=weight)
        super().__init__(
            projector,
            sampler.num_classes,
            features=[feature],
            names=[feature],
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.sampler = sampler
        self.parents = _parents(groups, sampler.num_classes)
        self.feature = feature
        self.margin = margin
        self.weight = weight

    def terms(self, batch: Batch) -> list[OwnTerm]:
        """One term, of the feature map's name."""
        (drawn,) = self.sample(batch, [self.feature], self.sampler)
        pixels = drawn[self.feature]
        draw, counts = pixels.draw, pixels.class_counts
        assert draw is not None and counts is not None
        chosen = draw_triplets(counts, self.parents, batch.generator)
        anchors, siblings, others = on_device(chosen, batch.device)
        with torch.autocast(batch.device.type, enabled=False):
            rows = at_least_fp32(pixels.embeddings)
            near, far = (
                (rows[anchors] * rows[partners]).sum(dim=1) for partners in (siblings, others)
            )
            losses = F.relu(self.margin - near + far)
        count = torch.full((), float(len(near)), device=batch.device)
        share = losses.sum() / batch.of_all_processes(count).sum().clamp(min=1)
        statistics = {
            "anchors": count,
            "sibling_similarity": near.mean(),  # nan without any
            "other_similarity": far.mean(),
            "violations": (losses > 0).float().mean(),
        }
        columns = torch.cat([siblings, others])
        term = OwnTerm(
            self.feature,
            share,
            self.weight,
            statistics,
            lambda: {"anchors": draw},
            partial(_pairs, rows.detach(), draw.labels, anchors, columns),
        )
        return [term]


def draw_triplets(
    class_counts: Sequence[int], parents: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    """Draws a sibling and an outsider for each row of a set that is grouped by class.

    Args:
        class_counts: rows of each class.
        parents: group of each class.
        generator: source of the draw, on the host.

    Returns:
        (3, A) int64 on the host: rows that have both, rows of another class of their group, and
        rows of another group.
    """
    counts, groups = torch.tensor(class_counts), torch.tensor(parents)
    # Rows in the order of their groups: those of a group are neighbours, and of a class too.
    by_group = groups.argsort(stable=True)
    first = counts.cumsum(dim=0) - counts
    ordered = counts[by_group]
    place = torch.empty_like(counts)
    place[by_group] = ordered.cumsum(dim=0) - ordered
    of_group = torch.zeros_like(counts).index_add_(0, groups, counts)
    start = of_group.cumsum(dim=0) - of_group

    labels = torch.arange(len(counts)).repeat_interleave(counts)
    rows = place[labels] + torch.arange(len(labels)) - first[labels]  # in the order of groups
    group = groups[labels]
    num_siblings = (of_group[groups] - counts)[labels]
    num_others = len(labels) - of_group[group]
    random = torch.randint(2**62, (2, len(labels)), generator=generator)
    sibling = start[group] + random[0] % num_siblings.clamp(min=1)
    sibling += (sibling >= place[labels]) * counts[labels]
    other = random[1] % num_others.clamp(min=1)
    other += (other >= start[group]) * of_group[group]
    has_both = (num_siblings > 0) & (num_others > 0)
    row_at = rows.argsort()
    anchors = has_both.nonzero()[:, 0]
    return torch.stack([anchors, row_at[sibling[has_both]], row_at[other[has_both]]])


def _parents(groups: Mapping[str, Sequence[int]], num_classes: int) -> list[int]:
    parents: dict[int, int] = {}
    for number, classes in enumerate(groups.values()):
        for name in classes:
            parents.setdefault(name, number)
    missing = sorted(set(range(num_classes)) - parents.keys())
    unknown = sorted(parents.keys() - set(range(num_classes)))
    if missing or unknown:
        raise ValueError(
            f"groups={ {k: list(v) for k, v in groups.items()} }: class {(missing + unknown)[0]} "
            f"{'is in none' if missing else 'does not exist'}, with num_classes={num_classes}. "
            "Give each class a group."
        )
    found = [parents[number] for number in range(num_classes)]
    if len(set(found)) in (1, num_classes):
        raise ValueError(
            f"groups={ {k: list(v) for k, v in groups.items()} }: there is no class with both a "
            "sibling and others. Give a tree of several groups, one of them of several classes."
        )
    return found


def _pairs(rows: Tensor, labels: Tensor, anchors: Tensor, columns: Tensor, most: int) -> PairSample:
    """The first anchors, evenly many, with what was drawn for each."""
    number = min(len(anchors), int(most**0.5) // 2)
    step = max(len(anchors) // max(number, 1), 1)
    kept = torch.arange(0, number * step, step, device=rows.device)[:number]
    chosen = torch.cat([columns[kept], columns[len(anchors) + kept]])
    own = torch.eye(number, dtype=torch.bool, device=rows.device)
    none = torch.zeros_like(own)
    return PairSample(
        rows[anchors[kept]] @ rows[chosen].T,
        torch.cat([own, none], dim=1),
        torch.cat([none, own], dim=1),
        labels[anchors[kept]],
        labels[chosen],
    )

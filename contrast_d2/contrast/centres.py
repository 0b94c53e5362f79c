"""The centre regulariser of CeCo (Zhong et al., CVPR 2023). Shape letters: K classes, D width."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .class_anchors import class_means, layer_pixels
from .method import ContrastMethod, check_above_zero
from .projector import MultiScaleProjector
from .prototypes import simplex
from .sampling import Batch, count_pixels
from .sets import on_device, stack_processes, world_size
from .terms import OwnTerm, PairSample


class CentreRegulariser(ContrastMethod):
    """Pulls the mean of each class in the batch to a corner of a fixed simplex.

    For the mean m_c of the unit embeddings of class c in the batch, at length 1, corners t_c, and
    the share pi_c of class c among the classes that training images show,

        L = weight * mean_c -log softmax_c( scale * T m_c + log pi )

    over the classes in the batch. Each counts once, whatever its area, and rare classes need a
    larger margin to win against the prior.

    In the official code, which has been released in part, a frozen random layer comes before the
    mean and another after it. Ours: a projector that is trained, and unit embeddings, as
    everywhere here. Ours as well: the images of a class are counted as they come, from one each,
    where the code reads a file of counts.

    Args:
        projector, num_classes, warmup_iters, across_processes: as in `ContrastMethod`.
        feature: name of the feature map.
        weight: of the term; the official code has 0.8 and, on a large backbone, 0.2, for ADE20K.
        scale: of the cosines; 5 in the official code.

    Attributes:
        corners: (K, D).
        images: (K,) fp32, images so far that show the class, and 1.

    Raises:
        ValueError: an argument out of its range, a map without projector, or too many classes for
            the width of the embeddings.

    Reference: Zhong, Cui, Yang, Wu, Qi, Zhang, Jia, "Understanding Imbalanced Semantic Segmentation
        Through Neural Collapse", CVPR 2023.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        num_classes: int,
        *,
        feature: str,
        weight: float = 0.8,
        scale: float = 5.0,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        check_above_zero(weight=weight, scale=scale)
        super().__init__(
            projector,
            num_classes,
            features=[feature],
            names=[feature],
            needs_dense_embeddings=True,
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.feature = feature
        self.weight = weight
        self.scale = scale
        self.corners: Tensor
        self.images: Tensor
        self.register_buffer("corners", simplex(num_classes, projector.embed_dim))
        self.register_buffer("images", torch.ones(num_classes))

    def terms(self, batch: Batch) -> list[OwnTerm]:
        """One term, of the feature map's name."""
        name = self.feature
        with torch.autocast(batch.device.type, enabled=False):
            pixels = layer_pixels(batch.maps[name], batch.label_map(name), self.num_classes)
            means, counts, exists = (x[0] for x in class_means([pixels], self.num_classes, batch))
            cosines_KK = F.normalize(means, dim=1) @ self.corners.to(means.dtype).T
            prior = (self.images / self.images.sum()).log()
            losses = -(self.scale * cosines_KK + prior).log_softmax(dim=1).diagonal()
            loss = torch.where(exists, losses, 0).sum() / exists.sum().clamp(min=1)
        # All processes that share a batch have the same means.
        share = loss / (world_size() if batch.across_processes else 1)
        with torch.no_grad():
            own = torch.eye(self.num_classes, dtype=torch.bool, device=batch.device)
            positive = own & exists
            negative = ~own & exists[:, None]
            statistics = {"classes": exists.sum().float()}
            for sign, chosen in (("positive", positive), ("negative", negative)):
                mean = torch.where(chosen, cosines_KK, 0).sum() / chosen.sum()
                statistics[f"{sign}_similarity"] = mean
        pairs = partial(_pairs, cosines_KK.detach(), positive, negative)
        return [OwnTerm(name, share, self.weight, statistics, dict, pairs, counts)]

    @torch.no_grad()
    def remember(self, batch: Batch) -> None:
        """Counts the images of all processes in which a class is."""
        shown = count_pixels(batch.host_labels(self.feature), self.num_classes) > 0
        own = on_device(shown.sum(dim=1).to(self.images.dtype), batch.device)
        self.images += stack_processes(own).sum(dim=0)


def _pairs(cosines: Tensor, positive: Tensor, negative: Tensor, most: int) -> PairSample:
    """All means against all corners, which are few."""
    classes = torch.arange(len(cosines), device=cosines.device)
    return PairSample(cosines, positive, negative, classes, classes)

"""Fixed class prototypes as anchors (Ren et al., TCSVT 2024).

Shape letters: K classes, D embedding width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .method import ContrastMethod, check_above_zero
from .projector import MultiScaleProjector
from .sampling import BalancedSampler, Batch
from .sets import PixelSet
from .terms import Side, Term


class FixedPrototypes(ContrastMethod):
    """Contrasts fixed directions, one for each class, with pixels.

    The prototypes t_c are the corners of a regular simplex, as far from each other as K directions
    can be. They are set before training, and stay. For pixels z drawn from the batch,

        L = weight * mean_c mean_{z of class c} l(t_c, z)

    over the classes that are drawn, with l the supervised InfoNCE of `terms`, whose negatives are
    the drawn pixels of all other classes.

    We know the idea and the roles of prototypes and pixels from the paper's abstract. Ours, for
    want of a source: the simplex in closed form, one prototype for each class in the order of
    classes, the form of the loss, the sampler, and all values.

    Args:
        projector, warmup_iters, across_processes: as in `ContrastMethod`. Prototypes are as wide.
        sampler: draws the pixels.
        feature: name of the feature map.
        weight: of the term.
        temperature: divides the similarities.

    Attributes:
        prototypes: (K, D).

    Raises:
        ValueError: an argument out of its range, a map without projector, or too many classes for
            the width of the embeddings, see `simplex`.

    Reference: Ren, Lu, Mao, Dong, "Exploring Prototype-Anchor Contrast for Semantic Segmentation",
        IEEE Transactions on Circuits and Systems for Video Technology, 2024.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        sampler: BalancedSampler,
        *,
        feature: str,
        weight: float = 0.1,
        temperature: float = 0.1,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        check_above_zero(weight=weight, temperature=temperature)
        super().__init__(
            projector,
            sampler.num_classes,
            features=[feature],
            names=[feature],
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.sampler = sampler
        self.feature = feature
        self.weight = weight
        self.temperature = temperature
        self.prototypes: Tensor
        self.register_buffer("prototypes", simplex(sampler.num_classes, projector.embed_dim))

    def terms(self, batch: Batch) -> list[Term]:
        """One term, of the feature map's name."""
        (pixels,) = self.sample(batch, [self.feature], self.sampler)
        # A class that is not drawn has no positive, and does not count.
        classes = torch.arange(self.num_classes, device=batch.device)
        anchors = PixelSet(self.prototypes, classes)
        contrast = [Side(pixels[self.feature])]
        return [Term(self.feature, anchors, contrast, self.temperature, self.weight)]


def simplex(num_classes: int, width: int) -> Tensor:
    """Unit vectors with a cosine of -1 / (K - 1) between any two: (K, D).

    They span the first K - 1 dimensions; a projector can turn its embeddings to any others.

    Raises:
        ValueError: less than 2 classes, or more than D + 1.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes}: directions of classes need at least 2.")
    if num_classes > width + 1:
        raise ValueError(
            f"{num_classes} classes cannot be equally far from each other in {width} dimensions: "
            f"set embed_dim to {num_classes - 1} or more."
        )
    # A basis of what is perpendicular to (1, ..., 1).
    columns = torch.eye(num_classes, dtype=torch.float64)
    columns[:, 0] = 1
    basis = torch.linalg.qr(columns).Q[:, 1:]
    rows = torch.zeros(num_classes, width, dtype=torch.float64)
    rows[:, : num_classes - 1] = basis * (num_classes / (num_classes - 1)) ** 0.5
    return rows.float()

"""Region contrast (Hu et al., ICCV 2021)."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from .memory import MemoryBank, region_centres
from .method import ContrastMethod, check_above_zero
from .projector import MultiScaleProjector
from .sampling import Batch
from .sets import PixelSet, at_least_fp32
from .terms import Side, Term

Centres = Literal["dynamic", "labels"]
# A softmax of fp32 can be exactly 1, and a class whose pixels are all sure and right would have no
# centre.
_LEAST_WEIGHT = 1e-4


class RegionContrast(ContrastMethod):
    """Contrasts the centre of each class in an image with centres of earlier batches.

    For the centre q of class i in an image, and the memory M of centres,

        R_i = sum_p w_p F_p [y_p = i],   q = R_i at length 1
        L   = weight * mean_q mean_{k in M_i} l(q, k)

    with l the supervised InfoNCE of `terms`, whose negatives are the memory's centres of other
    classes. Before any are stored, the loss is 0. After the loss the centres of the batch go into
    the memory, without gradient, during warm-up as well.

    * `centres="dynamic"` (the paper): w_p = 1 - confidence where pixel p is rightly predicted, and
      1 where it is not, so that hard pixels weigh more.
    * `centres="labels"`: w_p = 1.

    Not stated by the paper as we have it, and so ours: that centres have length 1 (as in the
    official code), that the mean runs over the centres of all images (the official code sums over
    the classes of a GPU, with a weight of 0.1, which for ten classes is a weight of 1 here), and
    that features go through a projector. Its official code takes element-wise products for
    similarities, and centres of the predicted class; the equations here are the paper's.

    Args:
        projector, num_classes, warmup_iters, across_processes: as in `ContrastMethod`.
        memory: of regions alone; the paper has as many slots as there are training images.
        feature: name of the feature map.
        centres: "dynamic" or "labels".
        weight: of the term.
        temperature: divides the similarities; 0.2 in the official code.

    Raises:
        ValueError: an argument out of its range, an unknown choice, a map without projector, or a
            memory of another size, with slots for pixels, or that does not admit all.

    Reference: Hu, Cui, Wang, "Region-aware Contrastive Learning for Semantic Segmentation", ICCV
        2021.
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        num_classes: int,
        memory: MemoryBank,
        *,
        feature: str,
        centres: Centres = "dynamic",
        weight: float = 1.0,
        temperature: float = 0.2,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        check_above_zero(weight=weight, temperature=temperature)
        if centres not in get_args(Centres):
            raise ValueError(f"centres={centres!r}: choose one of {list(get_args(Centres))}.")
        super().__init__(
            projector,
            num_classes,
            features=[feature],
            names=[feature],
            needs_dense_embeddings=True,
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        memory.check_sizes(num_classes, projector.embed_dim)
        if memory.slots["pixels"] or memory.admission != "all":
            raise ValueError(
                f"memory: pixels_per_class={memory.slots['pixels']}, admission="
                f"{memory.admission!r}: only regions are contrasted, and of all pixels, so set "
                "them to 0 and 'all'."
            )
        self.memory = memory
        self.feature = feature
        self.centres = centres
        self.weight = weight
        self.temperature = temperature

    def terms(self, batch: Batch) -> list[Term]:
        """One term, of the feature map's name."""
        keys = self.memory.contrast_set(batch.device_generator())
        centres = self._centres(batch)
        return [Term(self.feature, centres, [Side(keys)], self.temperature, self.weight)]

    @torch.no_grad()
    def remember(self, batch: Batch) -> None:
        """Stores the centres of the batch."""
        self.memory.push_of_all_processes(self._centres(batch))

    def _centres(self, batch: Batch) -> PixelSet:
        """(B * K, D) centres, image by image; -1 labels what an image does not show."""
        labels = batch.label_map(self.feature)
        with torch.no_grad():
            weights = torch.ones_like(labels, dtype=torch.float32)
            if self.centres == "dynamic":
                right = batch.predictions(self.feature) == labels
                scores = at_least_fp32(batch.scores(self.feature))
                doubt = 1 - scores.softmax(dim=1).amax(dim=1)
                weights = torch.where(right, doubt.clamp(min=_LEAST_WEIGHT), 1)
        centres = region_centres(
            batch.maps[self.feature], labels, self.num_classes, weights.flatten(1)
        )
        # A sum of 0 has no direction.
        exists = (centres.embeddings.detach() != 0).any(dim=1)
        return centres._replace(labels=centres.labels.masked_fill(~exists, -1))

"""Contextrast++ (Sung et al., 2026): Contextrast with a learned fusion and a memory of anchors.

Shape letters: I layers, K classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .class_anchors import ClassMeans, prioritised_anchors
from .contextual import Contextrast
from .memory import AnchorMemory
from .projector import MultiScaleProjector
from .sampling import Batch
from .sets import PixelSet, gather_parts
from .terms import OwnTerm, Side, Term


class AnchorAttention(nn.Module):
    """Self-attention of the anchors of one layer, with the classes as its tokens.

    The paper states neither heads, nor an output projection, nor a residual path; ours: one head
    and no output projection, which gives the reported number of parameters, and a residual path.

    Args:
        embed_dim: D.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(embed_dim, embed_dim)
        self.key = nn.Linear(embed_dim, embed_dim)
        self.value = nn.Linear(embed_dim, embed_dim)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, anchors: Tensor, exists: Tensor) -> Tensor:
        """Refines anchors by those of the other classes.

        Args:
            anchors: (K, D).
            exists: (K,) bool; the others are attended by none.

        Returns:
            (K, D), finite for every class; at initialisation equal to `anchors`.
        """
        scores_KK = self.query(anchors) @ self.key(anchors).T / anchors.shape[1] ** 0.5
        # Not -inf, which would give nan where no class exists.
        scores_KK = scores_KK.masked_fill(~exists, torch.finfo(scores_KK.dtype).min)
        return anchors + scores_KK.softmax(dim=1) @ self.value(anchors)


class AdaptiveFusion(nn.Module):
    """Mixes the anchors of each layer with the deepest ones by what it has learned.

    For every layer but the deepest, one self-attention refines the anchors of the layer and another
    those of the deepest layer; a linear layer maps the two, side by side, to the mixed anchors. It
    begins as the static mixture (the paper does not state how; ours): the attentions' values are
    zero, and the linear layer weighs its two halves like the static mixture.

    Args:
        embed_dim: D.
        num_layers: I - 1, layers that are mixed with the deepest.
        deepest_weight: weight of the deepest anchors at initialisation.

    Reference: Sung et al., "Contextrast++", arXiv 2608.22679, section III-B (adaptive fusion).
    """

    def __init__(self, embed_dim: int, num_layers: int, deepest_weight: float = 0.5) -> None:
        super().__init__()
        self.own = nn.ModuleList([AnchorAttention(embed_dim) for _ in range(num_layers)])
        self.deepest = nn.ModuleList([AnchorAttention(embed_dim) for _ in range(num_layers)])
        self.mix = nn.ModuleList([nn.Linear(2 * embed_dim, embed_dim) for _ in range(num_layers)])
        for linear in self.mix:
            with torch.no_grad():
                own, deepest = linear.weight.split(embed_dim, dim=1)  # pyright: ignore[reportCallIssue]
                nn.init.eye_(own).mul_(1 - deepest_weight)
                nn.init.eye_(deepest).mul_(deepest_weight)
            nn.init.zeros_(linear.bias)  # pyright: ignore[reportArgumentType]

    def forward(
        self, anchors: Tensor, deepest: Tensor, exists: Tensor, exists_deepest: Tensor
    ) -> Tensor:
        """Mixed anchors of all layers but the deepest.

        Args:
            anchors: (I - 1, K, D).
            deepest: (K, D).
            exists: (I - 1, K) bool, whether a layer has the class.
            exists_deepest: (K,) bool.

        Returns:
            (I - 1, K, D), of meaning where a class exists at both layers.
        """
        mixed = []
        for number, mix in enumerate(self.mix):
            own_KD = self.own[number](anchors[number], exists[number])
            deepest_KD = self.deepest[number](deepest, exists_deepest)
            mixed.append(mix(torch.cat([own_KD, deepest_KD], dim=1)))
        return torch.stack(mixed) if mixed else anchors


class ContextrastPlus(Contextrast):
    """Contextrast++: learned mixtures of anchors, and a memory of past ones.

    `AdaptiveFusion` mixes the anchors, and one more term, `loss_contrast_anchors`, contrasts the
    current anchor of each class, from the deepest layer where it exists, with those of past steps.
    The paper does not state the form of this InfoNCE; ours is that of `terms`, and its weight that
    of the others. The memory receives the anchors of all processes.

    Args:
        projector, num_classes, layers, weight, temperature, warmup_iters, across_processes: as in
            `Contextrast`; the paper has 0.3 at the second of four layers.
        deepest_weight: weight of the deepest anchors at initialisation.
        anchor_memory: anchors kept per class.

    Reference: Sung et al., "Contextrast++", arXiv 2608.22679, section III, equations (1) to (6) and
        (12) to (14).
    """

    def __init__(
        self,
        projector: MultiScaleProjector,
        num_classes: int,
        *,
        layers: Mapping[str, float],
        weight: float = 0.1,
        temperature: float = 0.1,
        deepest_weight: float = 0.5,
        anchor_memory: int = 100,
        warmup_iters: int = 0,
        across_processes: bool = False,
    ) -> None:
        if len(layers) == 1:
            raise ValueError(f"layers={list(layers)}: a mixture needs another layer.")
        super().__init__(
            projector,
            num_classes,
            layers=layers,
            weight=weight,
            temperature=temperature,
            deepest_weight=deepest_weight,
            warmup_iters=warmup_iters,
            across_processes=across_processes,
        )
        self.names = (*self.names, "anchors")
        self.fusion = AdaptiveFusion(projector.embed_dim, len(layers) - 1, deepest_weight)
        self.memory = AnchorMemory(num_classes, projector.embed_dim, anchor_memory)

    def mix(self, means: ClassMeans) -> Tensor:
        return self.fusion(means.means[:-1], means.means[-1], means.exists[:-1], means.exists[-1])

    def terms(self, batch: Batch) -> list[Term | OwnTerm]:
        """One term for each layer, and one for the anchors."""
        with torch.autocast(batch.device.type, enabled=False):
            layers, means, anchors_IKD = self.class_anchors(batch)
            terms = self.pixel_anchor_terms(batch, layers, means, anchors_IKD)
            anchors = self._current(means, anchors_IKD)
        past = Side(self.memory.contrast_set())
        return [*terms, Term("anchors", anchors, [past], self.temperature, self.weight)]

    @torch.no_grad()
    def remember(self, batch: Batch) -> None:
        """Stores the current anchors in the memory."""
        with torch.autocast(batch.device.type, enabled=False):
            _, means, anchors_IKD = self.class_anchors(batch)
            anchors = self._current(means, anchors_IKD)
        parts = [[anchors.embeddings], [anchors.labels]]
        if not self.across_processes:  # where all processes have the same anchors
            parts = gather_parts(anchors.embeddings, anchors.labels)
        self.memory.push(*(torch.cat(x) for x in parts))

    def _current(self, means: ClassMeans, anchors_IKD: Tensor) -> PixelSet:
        anchors_KD, exists_K = prioritised_anchors(anchors_IKD, means.exists)
        classes = torch.arange(self.num_classes, device=exists_K.device)
        return PixelSet(anchors_KD, torch.where(exists_K, classes, -1))

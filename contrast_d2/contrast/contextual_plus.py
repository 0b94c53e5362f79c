"""What Contextrast++ adds to the anchors of Contextrast: a learned fusion and a memory of anchors.

Shape letters: I layers, K classes, D embedding width, M anchors kept per class, W processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


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


class AnchorMemory(nn.Module):
    """The last anchors of each class, first in, first out.

    Pointers and fill counts are buffers like the anchors, so a resumed run continues with the same
    memory. Slots that were never filled hold no class.

    Args:
        num_classes: K.
        embed_dim: D.
        size: M, anchors kept per class.

    Raises:
        ValueError: a size below 1.

    Reference: Sung et al., "Contextrast++", arXiv 2608.22679, section III; size 100 there.
    """

    def __init__(self, num_classes: int, embed_dim: int, size: int = 100) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"AnchorMemory(size={size}): needs at least 1 anchor per class.")
        self.size = size
        self.anchors: Tensor
        self.pointers: Tensor
        self.fills: Tensor
        self.register_buffer("anchors", torch.zeros(num_classes, size, embed_dim))
        self.register_buffer("pointers", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("fills", torch.zeros(num_classes, dtype=torch.int64))

    def contrast_set(self) -> tuple[Tensor, Tensor]:
        """As many anchors of each class as the least filled class has, the newest ones.

        Classes that have none do not count. That the numbers are equal is the paper's; it does not
        state which anchors are taken; ours: the newest, as they are nearest to the current weights.

        Returns:
            (K * M, D) anchors, to be used before others are written, and (K * M,) int64 classes, -1
            for slots that are not taken.
        """
        filled = self.fills > 0
        number = self.fills.masked_fill(~filled, self.size).amin()
        slots = torch.arange(self.size, device=self.fills.device)
        age_KM = (self.pointers[:, None] - 1 - slots) % self.size
        taken_KM = (age_KM < number) & filled[:, None]
        classes = torch.arange(len(self.fills), device=self.fills.device)
        labels_KM = torch.where(taken_KM, classes[:, None], -1)
        return self.anchors.flatten(0, 1), labels_KM.flatten()

    def fill_by_class(self) -> Tensor:
        """Share of the slots of each class that are filled, (K,)."""
        return self.fills / self.size

    @torch.no_grad()
    def push(self, anchors: Tensor, exists: Tensor) -> None:
        """Writes new anchors over the oldest ones.

        Args:
            anchors: (W, K, D), those of a later row count as newer.
            exists: (W, K) bool; other anchors are not written, nor those that are not finite.

        Raises:
            ValueError: more anchors per class than the memory keeps.
        """
        if len(anchors) > self.size:
            raise ValueError(
                f"{len(anchors)} processes push an anchor per class at once into a memory of "
                f"{self.size}: set its size to {len(anchors)} or more."
            )
        # An overflow of mixed precision costs one step; in the memory it would spoil a hundred.
        exists = exists & anchors.isfinite().all(dim=2)
        # For each class those that exist, in their order, then the rest, whose slots keep what
        # they hold. Every row has a slot of its own.
        order_WK = (~exists).to(torch.uint8).argsort(dim=0, stable=True)
        exists_WK = exists.gather(0, order_WK)
        anchors = anchors.gather(0, order_WK[:, :, None].expand_as(anchors))
        classes = torch.arange(len(self.fills), device=self.fills.device)
        offsets = torch.arange(len(anchors), device=self.fills.device)
        slots_WK = (self.pointers + offsets[:, None]) % self.size
        self.anchors[classes, slots_WK] = torch.where(
            exists_WK[:, :, None], anchors.to(self.anchors.dtype), self.anchors[classes, slots_WK]
        )
        number_K = exists.sum(dim=0)
        self.pointers.copy_((self.pointers + number_K) % self.size)
        self.fills.copy_((self.fills + number_K).clamp(max=self.size))

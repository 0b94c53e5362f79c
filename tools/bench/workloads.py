"""What is measured: the whole contrastive step, and the InfoNCE alone.

A workload has inputs drawn from a seed, a cost that no implementation can go below, and contenders:
functions that do the same job, forward and backward, on the same inputs.

Shape letters: B images, A anchors, C contrast samples, D embedding width, K classes, h w a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from contrast_d2.contrast import (
    BalancedSampler,
    MultiScaleContrast,
    MultiScaleProjector,
    downsample_labels,
    gather_embeddings,
    info_nce,
)
from contrast_d2.contrast.sets import draws_on_device

from .machine import Cost
from .peers import CrossBatchMemoryPeer, SupConPeer, textbook_info_nce
from .scenes import Scene, draw_labels

OURS = "contrast_d2"
TEXTBOOK = "textbook"
SUPCON = "pytorch-metric-learning"


_FLOAT_BYTES = 4
_LABEL_BYTES = 1
# What memory moves at least.
_LINE_BYTES = 64
_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
_SCALE_WEIGHTS = {"res2": 1.0, "res3": 0.7, "res4": 0.4, "res5": 0.1}
_CROSS_SCALE = (("res2", "res5", 1.0), ("res2", "res4", 1.0))


class Contender:
    """One way to compute a loss and its gradients.

    Args:
        compute: returns the loss, 0-dim.
        leaves: what gradients are asked of.
    """

    def __init__(self, compute: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
        self._compute = compute
        self.leaves = leaves

    def __call__(self) -> Tensor:
        """Forward and backward; returns the loss."""
        self.drop_gradients()
        loss = self._compute()
        loss.backward()
        return loss.detach()

    def drop_gradients(self) -> None:
        """Frees what the last call left."""
        for leaf in self.leaves:
            leaf.grad = None

    def settle(self) -> int:
        """Makes what stays in memory from call to call and belongs to the peak; its bytes."""
        return 0


@dataclass(frozen=True)
class Step:
    """The contrastive part of a training step, from labels and projected maps to their gradients.

    Multi- and cross-scale contrast of maps at strides 4, 8, 16 and 32 that need gradients, with the
    budgets of its release: per image and class, pairs of fewer than 5 pixels left out.

    Attributes:
        scene: the labels.
        width: D.
        max_anchors: most anchors per scale.
    """

    scene: Scene
    width: int = 256
    max_anchors: int = 10_000

    def labels(self) -> Tensor:
        """(B, H, W) int64."""
        return draw_labels(self.scene)

    def drawn(self) -> list[int]:
        """How many anchors each scale gets."""
        draws = self._sampler()(self._label_maps(self.labels()))
        return [len(draw.labels) for draw in draws]

    def cost(self) -> Cost:
        """Products of all terms, one dense gradient per map, the anchors' rows and the labels."""
        drawn = self.drawn()
        anchors = dict(zip(_STRIDES, drawn, strict=True))
        flop = sum(_within_flop(count, self.width) for count in drawn)
        for source, target, _ in _CROSS_SCALE:
            flop += _cross_flop(anchors[source], anchors[target], self.width)
        pixels = sum(self.scene.batch * h * w for h, w in self._map_sizes().values())
        return Cost(
            flop=flop,
            written=pixels * self.width * _FLOAT_BYTES,
            # The channels of a pixel lie a plane apart: each is a cache line of its own. Their
            # gradients go into lines that are still in the cache from their zero-fill.
            moved=sum(drawn) * self.width * _LINE_BYTES + pixels * _LABEL_BYTES,
        )

    def gradient_bytes(self) -> int:
        """Bytes of the dense gradients, which are outputs."""
        return int(self.cost().written)

    def contenders(self, device: torch.device, names: Sequence[str]) -> dict[str, Contender]:
        """The named contenders, on shared inputs that lie on the device."""
        generator = torch.Generator().manual_seed(0)
        maps = {
            name: torch.randn(self.scene.batch, self.width, *size, generator=generator)
            .to(device)
            .requires_grad_()
            for name, size in self._map_sizes().items()
        }
        labels = self.labels().to(torch.uint8)  # as the loader hands them over
        available: dict[str, Callable[[], Callable[[], Tensor]]] = {
            OURS: lambda: partial(_our_step, self._contrast(), maps, labels),
            TEXTBOOK: lambda: partial(
                self._peer_step, partial(textbook_info_nce, count_empty_anchors=True), maps, labels
            ),
            SUPCON: lambda: partial(self._peer_step, SupConPeer(), maps, labels),
        }
        leaves = list(maps.values())
        return {name: Contender(available[name](), leaves) for name in names}

    def _map_sizes(self) -> dict[str, tuple[int, int]]:
        return {
            name: (self.scene.height // stride, self.scene.width // stride)
            for name, stride in _STRIDES.items()
        }

    def _label_maps(self, labels: Tensor) -> list[Tensor]:
        return [downsample_labels(labels, size) for size in self._map_sizes().values()]

    def _sampler(self) -> BalancedSampler:
        return BalancedSampler(
            self.scene.num_classes,
            balance="image_class",
            max_anchors=self.max_anchors,
            min_pixels=5,
            max_per_group=2500,
        )

    def _contrast(self) -> MultiScaleContrast:
        return MultiScaleContrast(
            _Projected(dict.fromkeys(_STRIDES, 1), self.width, num_hidden=0),
            self._sampler(),
            scale_weights=_SCALE_WEIGHTS,
            cross_scale=_CROSS_SCALE,
            count_empty_anchors=True,
        )

    def _peer_step(
        self, loss: Callable[..., Tensor], maps: Mapping[str, Tensor], labels: Tensor
    ) -> Tensor:
        """Another loss on the library's own draw and gather: the strongest simple form."""
        device = next(iter(maps.values())).device
        found = draws_on_device(self._sampler()(self._label_maps(labels)), device)
        draws = dict(zip(maps, found, strict=True))
        anchors = {
            name: gather_embeddings(maps[name], draw.image, draw.pixel, distinct=True)
            for name, draw in draws.items()
        }
        total = torch.zeros((), device=device)
        for name, weight in _SCALE_WEIGHTS.items():
            total = total + 0.1 * weight * loss(anchors[name], draws[name].labels)
        for source, target, weight in _CROSS_SCALE:
            total = total + 0.1 * weight * loss(
                anchors[source], draws[source].labels, anchors[target], draws[target].labels
            )
        return total


@dataclass(frozen=True)
class InfoNCE:
    """The loss alone, value and gradient, of unit vectors around one centre per class.

    Attributes:
        anchors: A.
        memory: samples of a memory bank, without gradient, that the anchors are contrasted with
            besides themselves; 0 contrasts them among themselves only.
        classes: K, of equal frequency.
        width: D.
        sorted: the anchors come ordered by class, as samplers draw them.
    """

    anchors: int
    memory: int = 0
    classes: int = 16
    width: int = 256
    sorted: bool = True

    def cost(self) -> Cost:
        """Products, rows read and gradients written."""
        if self.memory:
            # Similarities and the gradient of one side.
            flop = 4.0 * self.anchors * (self.anchors + self.memory) * self.width
        else:
            flop = _within_flop(self.anchors, self.width)
        rows = 2 * self.anchors + self.memory
        return Cost(flop=flop, written=0.0, moved=rows * self.width * _FLOAT_BYTES)

    def gradient_bytes(self) -> int:
        """Bytes of the gradient, which is an output."""
        return self.anchors * self.width * _FLOAT_BYTES

    def inputs(self, device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Anchors, their labels, memory, its labels; fp32 values whatever the dtype."""
        generator = torch.Generator().manual_seed(0)
        total = self.anchors + self.memory
        labels = torch.arange(self.classes).repeat(-(-total // self.classes))[:total]
        labels = labels[torch.randperm(total, generator=generator)]
        anchor_labels, memory_labels = labels[: self.anchors], labels[self.anchors :]
        if self.sorted:
            anchor_labels = anchor_labels.sort().values
        centres = torch.randn(self.classes, self.width, generator=generator)
        noise = torch.randn(total, self.width, generator=generator)
        rows = centres[torch.cat([anchor_labels, memory_labels])] + noise
        rows = nn.functional.normalize(rows, dim=1).to(device, dtype)
        anchors = rows[: self.anchors].clone().requires_grad_()
        memory = rows[self.anchors :].clone()
        return [anchors, anchor_labels.to(device), memory, memory_labels.to(device)]

    def contenders(self, device: torch.device, names: Sequence[str]) -> dict[str, Contender]:
        """The named contenders, on shared inputs that lie on the device."""
        anchors, labels, memory, memory_labels = self.inputs(device)
        if self.memory:
            available = {
                OURS: lambda: partial(_with_memory, anchors, labels, memory, memory_labels),
                SUPCON: lambda: partial(
                    CrossBatchMemoryPeer(memory, memory_labels, len(anchors)), anchors, labels
                ),
            }
        else:
            available = {
                OURS: lambda: partial(info_nce, anchors, labels),
                TEXTBOOK: lambda: partial(textbook_info_nce, anchors, labels),
                SUPCON: lambda: partial(SupConPeer(), anchors, labels),
            }
        return {name: Contender(available[name](), [anchors]) for name in names}


class _Projected(MultiScaleProjector):
    """Takes maps as they leave the projectors, whose own cost is another measurement."""

    def forward(
        self, features: Mapping[str, Tensor], done: dict[nn.Module, Tensor] | None = None
    ) -> dict[str, Tensor]:
        return dict(features)


def _within_flop(anchors: int, width: int) -> float:
    """S is symmetric: A^2 D for one triangle of it, and 2 A^2 D for the gradient."""
    return 3.0 * anchors * anchors * width


def _cross_flop(anchors: int, contrast: int, width: int) -> float:
    """2 A C D for the similarities and for the gradient of either side."""
    return 6.0 * anchors * contrast * width


def _our_step(contrast: MultiScaleContrast, maps: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    return torch.stack(list(contrast(maps, labels).losses.values())).sum()


def _with_memory(anchors: Tensor, labels: Tensor, memory: Tensor, memory_labels: Tensor) -> Tensor:
    # Gradients to the anchors' side only, as CrossBatchMemory sends them.
    contrast = torch.cat([anchors.detach(), memory])
    contrast_labels = torch.cat([labels, memory_labels])
    return info_nce(anchors, labels, contrast, contrast_labels, anchors_lead_contrast=True)

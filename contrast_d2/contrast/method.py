"""What all contrast methods have in common, and what several of them need.

Shape letters: B images, C feature channels, K classes, D embedding width, H W the labels' size,
h w a feature map, h' w' the class scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from .inspection import Inspection
from .output import ContrastOutput
from .projector import MultiScaleProjector


class ContrastMethod(nn.Module):
    """A loss on embeddings: projects feature maps, then contrasts what it has projected.

    The two steps are apart so that methods which tap the same map can share its projection.

    Args:
        projector: heads for the feature maps that the method taps.

    Attributes:
        inspection: filled by each step with what it drew and how similar that is; None, as at
            first, for nothing of the kind.
    """

    def __init__(self, projector: MultiScaleProjector) -> None:
        super().__init__()
        self.inspection: Inspection | None = None
        self.projector = projector

    @property
    def contrasts_projections(self) -> bool:
        """Whether `contrast` wants embedding maps (B, D, h, w), one for each head of the projector;
        or else feature maps, of which it projects the pixels that it needs."""
        return True

    def forward(
        self,
        features: Mapping[str, Tensor],
        logits: Tensor | None,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """Computes the contrast terms of one step.

        Args:
            features: feature maps (B, C, h, w) by name; those without a head are ignored.
            logits: (B, K, h', w') class scores of the segmentation head, detached, at any
                resolution; may be None for methods that do without predictions.
            labels: (B, H, W) integer classes at full resolution; others than 0..K-1 are ignored.
            generator: source of random numbers, on the labels' device; None for the default one.

        Returns:
            Losses by name, with their weights, and statistics by name.

        Raises:
            ValueError: a feature map is missing, or logits are needed and None.
        """
        if self.contrasts_projections:
            maps = self.projector(features)
        else:
            maps = self.projector.select(features)
        return self.contrast(maps, logits, labels, generator)

    def contrast(
        self,
        maps: Mapping[str, Tensor],
        logits: Tensor | None,
        labels: Tensor,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """As `forward`, from embedding maps (B, D, h, w) that are not normalised, or feature maps,
        as `contrasts_projections` says."""
        raise NotImplementedError


class Warmup(nn.Module):
    """The factor by which a contrast term counts while training begins.

    It is 0 for the first `start` passes, grows linearly over the next `ramp`, and is 1 from then
    on. The number of passes so far is a buffer, so that a resumed run goes on where it was; the
    host keeps a copy and reads it off the device only once, after construction or loading.

    Args:
        start: passes without contrast.
        ramp: passes over which the factor grows.

    Raises:
        ValueError: a negative number of passes.
    """

    def __init__(self, start: int = 0, ramp: int = 0) -> None:
        super().__init__()
        for name, value in (("start", start), ("ramp", ramp)):
            if value < 0:
                raise ValueError(f"Warmup({name}={value}): needs 0 (none) or more passes.")
        self.start = start
        self.ramp = ramp
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self._host_passes: int | None = None
        self.register_load_state_dict_post_hook(_forget_host_copy)

    def forward(self) -> float:
        """The factor of this pass, a training step's forward on one batch; counts the pass."""
        if self.start == self.ramp == 0:
            return 1.0
        if self._host_passes is None:
            self._host_passes = int(self.passes)
        since = self._host_passes - self.start
        self._host_passes += 1
        self.passes += 1
        return 0.0 if since < 0 else min(1.0, (since + 1) / (self.ramp + 1))


def _forget_host_copy(warmup: Warmup, _incompatible: object) -> None:
    warmup._host_passes = None


def connected_zero(tensors: Iterable[Tensor]) -> Tensor:
    """A 0 on the graph of the given tensors, whatever their values: all get a gradient of zeros.

    In distributed training every process has to use every parameter in every step.
    """
    return torch.stack([x.flatten()[:0].float().sum() for x in tensors]).sum()

"""What a contrast method hands back."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ContrastOutput(NamedTuple):
    """Result of a contrast method's forward.

    Attributes:
        losses: 0-dim fp32 tensors by name, `loss_contrast_<term>`, weights included: their sum
            joins the segmentation loss.
        statistics: 0-dim detached tensors by name, `contrast/<term>/<quantity>`, for logging only.
    """

    losses: dict[str, Tensor]
    statistics: dict[str, Tensor]

"""What every kernel of the InfoNCE hands to `info_nce`, on whatever device it runs."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KernelResult(NamedTuple):
    """Value and gradient of the InfoNCE before the mean over anchors.

    Without a contrast set the anchors meet each other, and `d_anchors` holds both of their roles.

    Attributes:
        total: 0-dim, of fp32 at least, sum over anchors of the mean loss over their positives.
        num_valid: 0-dim, number of anchors that have a positive.
        d_anchors: (A, D) gradient of `total` with respect to the anchors; None where not asked for.
        d_contrast: (C, D) gradient with respect to the contrast set; None where not asked for, and
            without a contrast set.
    """

    total: Tensor
    num_valid: Tensor
    d_anchors: Tensor | None
    d_contrast: Tensor | None

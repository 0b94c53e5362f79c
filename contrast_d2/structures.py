"""What decoders hand to the losses."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SegOutput(NamedTuple):
    """Output of a decoder, before any resize to the size of the labels.

    Attributes:
        logits: (B, K, h, w) class scores.
        aux_logits: (B, K, h', w') class scores of an auxiliary head, or None.
        features: maps (B, C, h, w) of the decoder, by name, for contrast methods that tap it, next
            to those of the backbone.
    """

    logits: Tensor
    aux_logits: Tensor | None
    features: dict[str, Tensor]

"""What decoders hand to the losses, and how to get it of any head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn


class SegOutput(NamedTuple):
    """Output of a decoder, before any resize to the size of the labels.

    Attributes:
        logits: (B, K, h, w) class scores.
        aux_logits: (B, K, h', w') class scores of an auxiliary head, or None.
        features: maps (B, C, h, w) of the decoder, by name, for contrast methods that tap it, next
            to those of the backbone.
        align_corners: how scores are resized to the size of labels and images: whether the centres
            of corner pixels meet, or the corners of the maps.
    """

    logits: Tensor
    aux_logits: Tensor | None
    features: dict[str, Tensor]
    align_corners: bool = False


def decode(head: nn.Module, features: Mapping[str, Tensor]) -> SegOutput:
    """The output of a semantic head: by `decode`, which ours have, or by `layers`, which
    detectron2's have and which gives the logits alone.

    Args:
        head: has one of the two.
        features: maps (B, C, h, w) by name.
    """
    if hasattr(head, "decode"):
        return head.decode(features)  # pyright: ignore[reportCallIssue]
    return SegOutput(head.layers(features), None, {})  # pyright: ignore[reportCallIssue]

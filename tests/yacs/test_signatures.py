"""Arguments as keys, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from detectron2.config import CfgNode, instantiate
from torch import nn

from contrast_d2 import decoders, losses
from contrast_d2.yacs.keys import CONTRAST_REGISTRY, DECODERS, SEG_LOSS_REGISTRY
from contrast_d2.yacs.signatures import arguments, call_of, section_of


class Ring:
    """A part with an argument that it shares with what holds it, and one with another part."""

    def __init__(self, width: int, rate: float, size: int = 3) -> None:
        self.width, self.rate, self.size = width, rate, size


class Stem:
    def __init__(self, *, width: int = 5) -> None:
        self.width = width


class Whole:
    def __init__(
        self,
        stem: Stem,
        *,
        classes: int,
        rate: float = 2,
        share: float | int = 0.5,
        feature: str,
        limit: int | None = 7,
        sizes: Sequence[int] = (1, 2),
        weights: Mapping[str, float] | None = None,
        ring: Ring | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        names = ("stem", "classes", "rate", "share", "feature", "limit", "sizes", "weights")
        self.values = {name: value for name, value in vars().items() if name in names}
        self.ring, self.loss = ring, loss


GIVEN = {"classes": 4}


def section(**changes: object) -> CfgNode:
    node = section_of(Whole, GIVEN)
    for key, value in changes.items():
        node[key] = value
    return node


def built(node: CfgNode) -> Whole:
    named = {"l1": {"_target_": "torch.nn.L1Loss"}}
    return instantiate(call_of(Whole, node, "WHOLE", GIVEN, named.__getitem__))


def test_keys_have_the_defaults_of_the_arguments() -> None:
    assert section() == {
        "STEM": {"WIDTH": 5},
        "RATE": 2.0,
        "SHARE": None,  # yacs would hold it to one of its types
        "FEATURE": None,
        "LIMIT": 7,
        "SIZES": (1, 2),
        "WEIGHTS": {},
        # Its width is the stem's, its rate the whole's.
        "RING": {"SIZE": 3, "ENABLED": False},
        "LOSS": None,
    }
    assert isinstance(section().RATE, float)


def test_values_reach_the_arguments() -> None:
    node = section(FEATURE="p2", LIMIT=None, SHARE=3, RATE=0.25, SIZES=[4], LOSS="l1")
    node.STEM.WIDTH = 9
    node.RING.merge_from_list(["ENABLED", True, "SIZE", 8])
    node.WEIGHTS.merge_from_other_cfg(CfgNode({"res2": 1.5}))
    whole = built(node)
    stem = whole.values.pop("stem")
    assert stem.width == 9
    assert whole.values == {
        "classes": 4,
        "rate": 0.25,
        "share": 3,
        "feature": "p2",
        "limit": None,  # a value of its own, unlike SHARE's
        "sizes": [4],
        "weights": {"res2": 1.5},
    }
    assert (whole.ring.width, whole.ring.rate, whole.ring.size) == (9, 0.25, 8)
    assert isinstance(whole.loss, nn.L1Loss)


def test_what_is_left_out_is_at_its_default() -> None:
    whole = built(section(FEATURE="p2"))
    assert whole.values["share"] == 0.5 and whole.values["weights"] is None
    assert whole.ring is whole.loss is None


def test_an_argument_without_default_must_be_set() -> None:
    with pytest.raises(ValueError, match="WHOLE.FEATURE is not set"):
        built(section())


PARTS = {
    **DECODERS,
    **dict(iter(CONTRAST_REGISTRY)),
    **dict(iter(SEG_LOSS_REGISTRY)),
}


@pytest.mark.parametrize("name", PARTS)
def test_every_argument_of_every_part_has_a_key(name: str) -> None:
    shared = {"input_shape", "num_classes", "ignore_label", "in_channels"}
    keys = set(section_of(PARTS[name], shared))
    assert keys == {argument.key for argument in arguments(PARTS[name])} - {
        argument.upper() for argument in shared
    }
    # Nothing is left to Any: then None could not be told from a default.
    assert all(argument.types for argument in arguments(PARTS[name]))


def test_every_decoder_and_loss_is_registered() -> None:
    assert set(DECODERS) == {name for name in decoders.__all__ if name.endswith("Decoder")}
    names = {name for name in losses.__all__ if name.endswith(("Loss", "_loss"))}
    assert set(dict(iter(SEG_LOSS_REGISTRY))) == names - {"SegLoss", "LibraryLoss"} | {"LossSum"}

"""Several contrast methods as one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .method import IGNORE_LABEL, ContrastMethod, check_input, compute
from .sampling import Batch
from .terms import ContrastOutput


class ContrastSum(nn.Module):
    """The weighted sum of contrast methods, with one head for each feature map that they tap.

    Each method sees the same features, labels and predictions; the terms of all are computed
    together. Where several tap the same map, the head of the first is that of all: its parameters
    exist once, are trained by all, and project the map once per step. A checkpoint lists a shared
    head under the name of every method that uses it.

    Args:
        methods: by name, which enters the names of losses and statistics. Each must come with a
            projector of its own, also where heads are shared.
        weights: factor of each method's losses, on top of its own weights; 1 where none is given.

    Attributes:
        inspection: as in `ContrastMethod`, of all methods.

    Raises:
        ValueError: no methods, a name that is no identifier, a method or projector that stands
            there twice, a weight without method or not above 0, heads of one map that differ, or
            methods of different class counts or of which some contrast across processes.
    """

    def __init__(
        self, methods: Mapping[str, ContrastMethod], weights: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        _check_methods(methods)
        self.weights = _complete_weights(weights or {}, list(methods))
        self.methods = nn.ModuleDict(methods)
        self.inspection: Any = None
        shared: dict[str, tuple[str, nn.Module]] = {}
        for name, method in methods.items():
            for feature, head in method.projector.heads.items():
                owner, first = shared.setdefault(feature, (name, head))
                # Heads of the same map can be one if they are built alike, as they describe it.
                if repr(first) != repr(head):
                    raise ValueError(
                        f"methods {owner!r} and {name!r} project {feature!r} with different heads, "
                        f"{first} and {head}: give their projectors the same arguments."
                    )
                method.projector.heads[feature] = first

    def forward(
        self,
        features: Mapping[str, Tensor],
        labels: Tensor,
        logits: Tensor | None = None,
        *,
        ignore_label: int = IGNORE_LABEL,
        generator: torch.Generator | None = None,
    ) -> ContrastOutput:
        """As `ContrastMethod.forward`, with losses `loss_contrast_<method>_<term>` and statistics
        `contrast/<method>/<term>/<quantity>`."""
        methods: dict[str, ContrastMethod] = {f"{k}/": m for k, m in self.methods.items()}  # pyright: ignore[reportAssignmentType]
        first = next(iter(methods.values()))
        heads = [name for method in methods.values() for name in method.projector.heads]
        check_input(features, heads, labels, logits, first.num_classes)
        done: dict[nn.Module, Tensor] = {}
        maps = {prefix: method.projector(features, done) for prefix, method in methods.items()}
        every = {name: x for of_method in maps.values() for name, x in of_method.items()}
        logits = None if logits is None else logits.detach()
        batch = Batch(every, labels, logits, generator, first.across_processes)
        weights = {f"{name}/": weight for name, weight in self.weights.items()}
        return compute(methods, weights, maps, batch, ignore_label, self.inspection)  # pyright: ignore[reportCallIssue]


def _check_methods(methods: Mapping[str, ContrastMethod]) -> None:
    if not methods:
        raise ValueError("ContrastSum(methods={}): give a method, or set the contrast to None.")
    owners: dict[nn.Module, str] = {}
    first = next(iter(methods.values()))
    for name, method in methods.items():
        if not name.isidentifier():
            raise ValueError(
                f"ContrastSum(methods={{{name!r}: ...}}): needs a name of letters, digits and "
                "underscores, which becomes part of the names of losses."
            )
        if not isinstance(method, ContrastMethod):
            raise ValueError(
                f"ContrastSum(methods={{{name!r}: {type(method).__name__}}}): expected a "
                "ContrastMethod. In a LazyConfig write methods=L('builtins.dict')(...): what is in "
                "a plain dict stays a config."
            )
        # Every method drops the heads that it has no use for, and so may have dropped another's.
        owner = owners.setdefault(method.projector, name)
        if owner != name:
            raise ValueError(
                f"methods {owner!r} and {name!r} were built with one projector object: build each "
                "with its own. ContrastSum joins the heads that they have in common."
            )
        for option in ("num_classes", "across_processes"):
            own, other = getattr(method, option), getattr(first, option)
            if own != other:
                raise ValueError(
                    f"{option}={other} in the first method and {own} in {name!r}: set them alike."
                )


def _complete_weights(weights: Mapping[str, float], names: list[str]) -> dict[str, float]:
    """The weight of every method."""
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"weights of {unknown}, which are not among the methods {names}.")
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            raise ValueError(
                f"weights[{name!r}]={weight}: must be above 0. Leave out a method that should not "
                "count."
            )
    return {name: float(weights.get(name, 1.0)) for name in names}

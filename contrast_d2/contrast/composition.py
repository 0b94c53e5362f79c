"""Several contrast methods as one.

Shape letters: B images, C feature channels, K classes, D embedding width, H W the labels' size,
h w a feature map, h' w' the class scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .inspection import Inspection
from .method import ContrastMethod
from .output import ContrastOutput

_LOSS, _STATISTIC = "loss_contrast_", "contrast/"


class ContrastSum(nn.Module):
    """The weighted sum of contrast methods, with one head for each feature map that they tap.

    Each method sees the same features, predictions and labels, and draws from the same generator,
    one after the other in the order of the mapping. Where several tap the same map, the head of the
    first is that of all: its parameters exist once and are trained by all, and the map is projected
    once per step. (A method that projects drawn pixels only shares the parameters and projects for
    itself.) A checkpoint lists a shared head under the name of every method that uses it.

    Args:
        methods: by name, which enters the names of losses and statistics. Each must come with a
            projector of its own, also where heads are shared.
        weights: factor of each method's losses, on top of its own weights; 1 where none is given.
        share_projectors: False leaves every method its own heads.

    Raises:
        ValueError: no methods, a name that is no identifier, a method or projector that stands
            there twice, a weight without method or not above 0, or heads of one map that differ.
    """

    def __init__(
        self,
        methods: Mapping[str, ContrastMethod],
        weights: Mapping[str, float] | None = None,
        share_projectors: bool = True,
    ) -> None:
        super().__init__()
        _check_methods(methods)
        self.weights = _complete_weights(weights or {}, list(methods))
        self.methods = nn.ModuleDict(methods)
        self._inspection: Inspection | None = None
        # By method and map: the method whose head projects the map. Names, unlike modules, are the
        # same in a copy.
        self._head_of: dict[tuple[str, str], str] = {}
        for name, method in methods.items():
            for feature, head in method.projector.heads.items():
                owner = self._first_with(feature) if share_projectors else None
                self._head_of[name, feature] = owner or name
                if owner is not None:
                    shared = methods[owner].projector.heads[feature]
                    _check_alike(feature, {owner: shared, name: head})
                    method.projector.heads[feature] = shared

    def _first_with(self, feature: str) -> str | None:
        """The method that brought the head of a map, among those seen so far."""
        return next((own for (_, other), own in self._head_of.items() if other == feature), None)

    @property
    def inspection(self) -> Inspection | None:
        """What all methods fill, each under its name, as `ContrastMethod.inspection`."""
        return self._inspection

    @inspection.setter
    def inspection(self, inspection: Inspection | None) -> None:
        self._inspection = inspection
        for name, method in self.methods.items():
            method.inspection = None if inspection is None else inspection.named(name)  # pyright: ignore[reportArgumentType]

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
            logits: (B, K, h', w') class scores of the segmentation head, detached; may be None
                where no method needs predictions.
            labels: (B, H, W) integer classes at full resolution; others than 0..K-1 are ignored.
            generator: source of random numbers, on the labels' device; None for the default one.

        Returns:
            Losses `loss_contrast_<method>_<term>` and statistics
            `contrast/<method>/<term>/<quantity>`.

        Raises:
            ValueError: a feature map is missing, or logits are needed and None.
        """
        projections: dict[tuple[str, str], Tensor] = {}
        maps: dict[str, dict[str, Tensor]] = {}
        for name, method in self.methods.items():
            maps[name] = method.projector.select(features)  # pyright: ignore[reportCallIssue]
            if method.contrasts_projections:
                maps[name] = self._project(name, maps[name], projections)
        return self._contrast(maps, logits, labels, generator)  # pyright: ignore[reportCallIssue]

    def _project(
        self,
        name: str,
        maps: Mapping[str, Tensor],
        projections: dict[tuple[str, str], Tensor],
    ) -> dict[str, Tensor]:
        """Embedding maps (B, D, h, w) of a method: those there are already, and new ones."""
        heads = self.methods[name].projector.heads  # pyright: ignore[reportAttributeAccessIssue]
        for feature, x in maps.items():
            key = self._head_of[name, feature], feature
            if key not in projections:
                projections[key] = heads[feature](x)  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
        return {feature: projections[self._head_of[name, feature], feature] for feature in maps}

    # The methods' own breaks of a compiled graph would fall into a loop, where it cannot resume.
    @torch.compiler.disable
    def _contrast(
        self,
        maps: Mapping[str, Mapping[str, Tensor]],
        logits: Tensor | None,
        labels: Tensor,
        generator: torch.Generator | None,
    ) -> ContrastOutput:
        """As `forward`, from the maps of each method."""
        losses: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for name, method in self.methods.items():
            output = method.contrast(maps[name], logits, labels, generator)  # pyright: ignore[reportCallIssue]
            for key, loss in output.losses.items():
                renamed = f"{_LOSS}{name}_{key.removeprefix(_LOSS)}"
                assert renamed not in losses, f"two losses are named {renamed}"
                losses[renamed] = self.weights[name] * loss
            for key, value in output.statistics.items():
                statistics[f"{_STATISTIC}{name}/{key.removeprefix(_STATISTIC)}"] = value
        return ContrastOutput(losses, statistics)


def _check_methods(methods: Mapping[str, ContrastMethod]) -> None:
    if not methods:
        raise ValueError("ContrastSum(methods={}): give a method, or set the contrast to None.")
    owners: dict[nn.Module, str] = {}
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


def _check_alike(feature: str, heads: Mapping[str, nn.Module]) -> None:
    """Heads of the same map can be one if they are built alike, as their descriptions say."""
    first, second = heads
    if repr(heads[first]) != repr(heads[second]):
        raise ValueError(
            f"methods {first!r} and {second!r} project {feature!r} with different heads, "
            f"{heads[first]} and {heads[second]}: give their projectors the same arguments, or "
            "set share_projectors=False."
        )

"""Which parameters the feature maps of a timm model depend on, and stages that do not train.

Shape letters: H W the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from timm.models import FeatureDictNet
from timm.models.hrnet import HighResolutionNet
from torch import Tensor, nn

# HRNet's maps all come out of its last stage, so that a map says nothing of where a stage ends.
_HRNET_STAGES = (
    ("conv1", "bn1", "conv2", "bn2"),
    ("layer1",),
    ("transition1", "stage2"),
    ("transition2", "stage3"),
    ("transition3", "stage4"),
)


def parameters_of_maps(model: Any, names: Iterable[str]) -> dict[str, set[str]]:
    """Names of the parameters that each feature map depends on, by the name of the map.

    Args:
        model: made by timm with `features_only=True`, on the meta device.
        names: of its maps, in their order.
    """
    height, width = model.pretrained_cfg["input_size"][-2:]
    with torch.enable_grad():
        maps = model.eval()(torch.empty(1, 3, height, width, device="meta"))
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        name: {known[id(leaf)] for leaf in _leaves(x)} for name, x in zip(names, maps, strict=True)
    }


def _leaves(x: Tensor) -> Iterator[Tensor]:
    """The parameters that a tensor was computed from, read off the graph of its gradient."""
    nodes: list[Any] = [x.grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def parameters_of_stages(
    model: nn.Module, maps: Mapping[str, set[str]], freeze_at: int
) -> set[str]:
    """Names of the parameters of a model's first stages.

    Args:
        model: made by timm with `features_only=True`.
        maps: as `parameters_of_maps` returns it, by the names res1 .. res5.
        freeze_at: number of stages, 0 to 5, counted as in detectron2: the first is the stem, the
            next ends with res2, and so on.

    Raises:
        ValueError: `freeze_at` is out of range, or the model has no stem by itself.
    """
    if freeze_at not in range(6):
        raise ValueError(
            f"freeze_at={freeze_at}: choose 0 for none, 1 for the stem, 2 for stem and res2, "
            "... 5 for all."
        )
    if freeze_at == 0:
        return set()
    parameters = [name for name, _ in model.named_parameters()]
    if isinstance(model, HighResolutionNet):
        frozen = {module for stage in _HRNET_STAGES[:freeze_at] for module in stage}
        return {name for name in parameters if name.partition(".")[0] in frozen}
    up_to = [maps[name] for name in maps if int(name.removeprefix("res")) <= freeze_at]
    if up_to:
        return set.union(*up_to)
    # No map before the first stage's: the stem is all before the module that yields that.
    if not isinstance(model, FeatureDictNet):
        raise ValueError(
            f"freeze_at={freeze_at}: the stem and the first stage of this model can only be frozen "
            f"together, with freeze_at={next(iter(maps)).removeprefix('res')}."
        )
    first = list(model).index(next(iter(model.return_layers)))
    stem = list(model)[:first]
    return {name for name in parameters if name.partition(".")[0] in stem}


def modules_without_training(model: nn.Module) -> list[str]:
    """Names of the modules that have parameters, none of which trains."""
    return [
        name
        for name, module in model.named_modules()
        if next(module.parameters(), None) is not None
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]

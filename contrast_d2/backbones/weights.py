"""The weights that backbones start a training from: from a local file, or none."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import timm
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..weights import read_weights

State = dict[str, Tensor]

# Arguments of backbones, and how they are set where a checkpoint replaces what they name.
_STARTING_WEIGHTS = {"pretrained": False, "weights_file": None}


def load_weights_file(model: nn.Module, name: str, path: str) -> None:
    """Loads a checkpoint of a timm classifier into the model that yields its feature maps.

    The file is one that `read_weights` reads: a state dict, or a dict that has one as "state_dict"
    or "model" (as "state_dict_ema" or "model_ema" too, which are then preferred). Weights of the
    classifier are not used and may be missing; all others must be there, in the model's shapes, and
    no unknown ones beside them. Names are timm's, or those of the original authors where timm knows
    how to translate them.

    Args:
        model: made by timm with `features_only=True`; changed in place.
        name: timm's name of the model.
        path: of the file.

    Raises:
        ValueError: no such file, not a checkpoint, or one of another model.
    """
    if not os.path.isfile(path):
        raise ValueError(f"weights_file={path}: there is no such file.")
    state = _read(path)
    with torch.device("meta"):
        classifier = timm.create_model(name)
    known = set(classifier.state_dict())
    names = _names_in_classifier(model, known)
    found, misfit = _select(state, model, names, known)
    if misfit:
        # The names may be those of the authors. timm's translation is no check, so both are tried.
        found, still = _select(_translate(name, state, classifier), model, names, known)
        misfit = misfit if still else ""
    if misfit:
        raise ValueError(f"weights_file={path} does not fit {name}: {misfit}.")
    model.load_state_dict(found, strict=False)


def without_starting_weights(model: DictConfig) -> DictConfig:
    """A model's config with which it is built without downloading or reading any weights.

    Args:
        model: config of a model, or of its backbone. Its weights come from a checkpoint, or do not
            matter.

    Returns:
        A copy whose backbones start from random weights.
    """
    model = model.copy()
    for node in _nodes(model):
        for key in list(node) if isinstance(node, DictConfig) else ():
            if str(key).lower() in _STARTING_WEIGHTS:  # in yaml configs in upper case
                node[key] = _STARTING_WEIGHTS[str(key).lower()]
    return model


def _nodes(config: DictConfig | ListConfig) -> Iterator[DictConfig | ListConfig]:
    yield config
    keys: Any = config if isinstance(config, DictConfig) else range(len(config))
    for key in keys:
        if OmegaConf.is_config(config[key]):
            yield from _nodes(config[key])


def _read(path: str) -> State:
    """The state dict of a file, without the prefixes of wrappers."""
    content = read_weights(path)
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return clean_state_dict(content)


def _names_in_classifier(model: nn.Module, known: Collection[str]) -> dict[str, str]:
    """The classifier's name of each weight of the feature model, which timm has regrouped."""
    return {name: _name_in_classifier(name, known) for name in model.state_dict()}


def _name_in_classifier(name: str, known: Collection[str]) -> str:
    first, _, rest = name.partition(".")
    parent, _, index = first.rpartition("_")
    # As it was; a stage that was taken out of its sequence; wrapped as a whole.
    for candidate in (name, f"{parent}.{index}.{rest}", rest):
        if candidate in known:
            return candidate
    return name


def _select(
    state: Mapping[str, Any], model: nn.Module, names: Mapping[str, str], known: Collection[str]
) -> tuple[State, str]:
    """The weights by the feature model's names, and what is wrong with them, or ""."""
    found, missing, misshapen = {}, [], []
    for name, own in model.state_dict().items():
        source = names[name]
        if source not in state:
            # Old checkpoints have no counter of batches.
            missing += [] if source.endswith("num_batches_tracked") else [source]
        elif not isinstance(state[source], Tensor) or state[source].shape != own.shape:
            there = tuple(getattr(state[source], "shape", ())) or type(state[source]).__name__
            misshapen.append(f"{source} is {there} there and {tuple(own.shape)} here")
        else:
            found[name] = state[source]
    unknown = [name for name in state if name not in known]
    problems = [
        _list("is missing", "are missing", missing),
        _list("is unknown", "are unknown", unknown),
        _list("has another shape", "have another shape", misshapen),
    ]
    return found, "; ".join(problem for problem in problems if problem)


def _list(one: str, many: str, items: list[str], shown: int = 3) -> str:
    if not items:
        return ""
    rest = ["..."] if len(items) > shown else []
    verb = one if len(items) == 1 else many
    return f"{len(items)} of the weights {verb} ({', '.join([*items[:shown], *rest])})"


def _translate(name: str, state: State, classifier: nn.Module) -> State:
    """The state with the original authors' names turned into timm's, where timm can do it."""
    module = sys.modules[timm.model_entrypoint(name).__module__]
    translate = getattr(module, "checkpoint_filter_fn", None)
    if translate is None:
        return state
    try:
        return translate(state, classifier)
    except Exception:  # what it raises on weights of another model is anything
        return state

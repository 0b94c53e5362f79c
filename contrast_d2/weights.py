"""Reading files of weights without running code that they hold."""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


def read_weights(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint that `torch.save` wrote, or a `.safetensors` file, onto the CPU.

    Objects other than tensors and plain Python values are refused, not built. A file of
    `torch.save` is a zip archive with a checksum for each tensor, which `torch.load` ignores: they
    are verified here, so that a flipped bit is an error and not a weight.

    Args:
        path: of a local file.

    Returns:
        What the file holds: a state dict, or a dict that has one under some name.

    Raises:
        ValueError: there is no such file, it is damaged or no checkpoint, or it holds code.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file.")
    try:
        if path.endswith(".safetensors"):
            content = safetensors.torch.load_file(path)
        else:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if broken := archive.testzip():
                        raise zipfile.BadZipFile(f"its part {broken} fails its checksum")
            # Programs such as timm's save their arguments beside the weights: plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                # Named here, since it is the default of torch 2.6 and newer only.
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the readers of its format raise on a damaged file
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({_reason(path, error)}): give a file that "
            "torch.save wrote, of tensors and plain values, or a .safetensors file."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__} and not a dict of weights: give a state "
            "dict, or a checkpoint of a training run."
        )
    return content


def averaged_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The moving average of the weights that a training's checkpoint holds beside them.

    Args:
        checkpoint: what `read_weights` gives of it.

    Returns:
        Those weights by name that the model has at test time; none if the training averaged none.
    """
    hooks = checkpoint.get("trainer", {}).get("hooks", {})
    return hooks.get("WeightAverage", {}).get("average", {})


def _reason(path: str, error: Exception) -> str:
    if os.path.getsize(path) == 0:
        return "it is empty"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds objects, which can run code, or is damaged"
    first = (str(error).strip().splitlines() or [""])[0].partition(". ")[0].rstrip(".")
    return f"it is damaged or of another kind: {type(error).__name__}: {first}"

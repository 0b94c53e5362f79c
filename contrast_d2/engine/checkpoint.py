"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import glob
import logging
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor, nn

from ..files import write_durably
from ..segmentor import is_training_only
from ..weights import averaged_weights, read_weights
from .device import first_not_finite

logger = logging.getLogger(__name__)

_PICKLES = (".pkl", ".pyth")

# Of those that `--resume` may start from.
_TRAINING_CHECKPOINT = re.compile(r"model_(\d{7}|final)\.pth")


def find_resumable(folder: str) -> str:
    """The checkpoint to resume from: the last one of a folder, or, if that is damaged, the newest
    one that is whole, with a warning.

    The main process looks, and all processes get its answer: all of them have to ask.

    Args:
        folder: of the run.

    Returns:
        Its path, or "" where no training has left a checkpoint.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    found = _newest_whole(folder) if comm.is_main_process() else ("", "")
    path, problem = comm.all_gather(found)[0]
    if problem:
        raise ValueError(problem)
    return path


def last_checkpoint(folder: str) -> str:
    """The path of a run's newest weights, which `last_checkpoint` in its folder names.

    Args:
        folder: of the run.

    Raises:
        ValueError: there are none.
    """
    last = os.path.join(folder, "last_checkpoint")
    name, problem = _read_name(last) if os.path.exists(last) else ("", "")
    if problem:
        raise ValueError(f"{problem}: name the weights with train.init_checkpoint=FILE.")
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise ValueError(
            f"no weights: {folder} has no checkpoint. Name one with train.init_checkpoint=FILE, or "
            "the folder of a run with train.output_dir=FOLDER."
        )
    return path


def training_checkpoints(folder: str) -> list[str]:
    """The paths of the checkpoints in a folder that a training can be resumed from."""
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "model_*.pth")))
    return [path for path in paths if _TRAINING_CHECKPOINT.fullmatch(os.path.basename(path))]


def _newest_whole(folder: str) -> tuple[str, str]:
    """The path to resume from, "" if there is none; and why none will do, "" if one does."""
    last = os.path.join(folder, "last_checkpoint")
    candidates = sorted(training_checkpoints(folder), key=_iteration, reverse=True)
    problems = []
    if os.path.exists(last):
        named, problem = _read_name(last)
        if problem:
            problems.append(problem)
        else:
            path = os.path.join(folder, named)
            candidates = [path, *(other for other in candidates if other != path)]
    elif candidates:
        problems.append(f"{last} is missing")
    for path in candidates:
        try:
            read_weights(path)
        except ValueError as error:
            problems.append(str(error).partition(": give")[0])
            continue
        if problems:
            logger.warning("%s: resuming from %s instead.", "; ".join(problems), path)
        return path, ""
    if not problems:
        return "", ""
    return "", (
        f"no checkpoint to resume from: {'; '.join(problems)}. Put back a copy of one, or "
        "leave out --resume to train anew."
    )


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer; a kill at any moment leaves it a checkpoint to resume from.

    Files are written under a temporary name, flushed to disk and renamed; `last_checkpoint` names a
    file only once that is complete. What is damaged later is told by its checksums when a run is
    resumed, which then starts from the checkpoint before it.

    Args:
        model, save_dir, save_to_disk, checkpointables: as detectron2's.
        allow_pickle: read `.pkl` files too, detectron2's ImageNet weights among them. Reading one
            runs whatever code it holds.
        config: of the experiment, plain values by key, which becomes a part of each file.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_pickle: bool = False,
        config: Mapping[str, Any] | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._allow_pickle = allow_pickle
        self._config = {} if config is None else {"config": dict(config)}

    def check_file(self, path: str) -> None:
        """Refuses a checkpoint file that cannot be loaded, before any work is done for it.

        Raises:
            ValueError: there is no such file, or it is a pickle and those are not allowed.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise ValueError(f"train.init_checkpoint={path}: there is no such file.")
        if path.endswith(_PICKLES):
            self._check_pickle(path)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint, as detectron2's.

        Raises:
            ValueError: it holds none of the model's weights, or is a pickle and those are not
                allowed.
        """
        self.check_file(path)
        self._unfit: list[str] = []
        self._entries: set[str] = set()
        rest = super().load(path, *args, **kwargs)
        parameters = {name for name, _ in self.model.named_parameters()}
        if path and parameters <= set(self._unfit):
            raise ValueError(
                f"{path} holds none of the model's weights, such as {min(parameters)}: it is of "
                "another architecture, or has other names for them."
            )
        return rest

    def resume(self, path: str) -> dict[str, Any]:
        """Takes up weights and state of a training.

        Args:
            path: found by `find_resumable`.

        Returns:
            Further entries of the file.

        Raises:
            ValueError: the checkpoint is of another model, holds weights alone, or is not to be
                seen from this machine.
        """
        if not os.path.isfile(path):
            raise ValueError(
                f"{path} is on the first machine and not on this one: give all machines of a job "
                "the same train.output_dir, on a disk that they share."
            )
        rest = self.load(path)
        lacking = sorted(set(self.checkpointables) - self._entries)
        if lacking:
            raise ValueError(
                f"{path} holds weights alone, without {', '.join(lacking)}, and cannot be resumed "
                f"from: start from the weights with train.init_checkpoint={path}."
            )
        if self._unfit:
            raise ValueError(
                f"{path} does not fit the model: {len(self._unfit)} of its weights are missing "
                f"there or have another shape, such as {self._unfit[0]}. Resume with the config "
                "that the training began with."
            )
        return rest

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resumes from the newest whole checkpoint, or else loads weights, as detectron2's.

        Raises:
            ValueError: as `find_resumable`, `resume` and `load`.
        """
        last = find_resumable(self.save_dir) if resume else ""
        return self.resume(last) if last else self.load(path, checkpointables=[])

    def _check_pickle(self, path: str) -> None:
        if not self._allow_pickle:
            raise ValueError(
                f"train.init_checkpoint={path}: reading a pickle runs the code that it holds. If "
                "you trust where the file comes from, set train.allow_pickle=True."
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Reads the local file, as which an address or one with a query may turn out."""
        if filename.endswith(_PICKLES):
            self._check_pickle(filename)
            return super()._load_file(filename)
        content = read_weights(filename)
        content = content if "model" in content else {"model": content}
        if not isinstance(content["model"], dict):
            raise ValueError(
                f"{filename} holds a {type(content['model']).__name__} as 'model' and not a dict "
                "of weights: give a state dict, or a checkpoint of a training run."
            )
        self._entries = set(content)
        return content

    def load_for_inference(self, path: str) -> None:
        """Loads all weights that the model has at test time, averaged ones if there are any.

        Raises:
            ValueError: there is no such file, it is of another model, or a pickle and those are not
                allowed.
        """
        rest = self.load(path, checkpointables=[])
        unfit = [name for name in self._unfit if not is_training_only(name)]
        if unfit:
            raise ValueError(
                f"{path} does not fit the model: {len(unfit)} of its weights are missing there or "
                f"have another shape, such as {unfit[0]}. Evaluate it with the config it was "
                "trained with."
            )
        average = averaged_weights(rest)
        if average:
            self.logger.info("Taking the averaged weights of %s", path)
            self.model.load_state_dict(average, strict=False)

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        shapes = [name for name, *_ in incompatible.incorrect_shapes]
        self._unfit = [*incompatible.missing_keys, *shapes]
        # What only a training needs is left out of a network for predictions on purpose.
        unexpected = incompatible.unexpected_keys
        unexpected[:] = [name for name in unexpected if not is_training_only(name)]
        super()._log_incompatible_keys(incompatible)

    def save(self, name: str, *, is_last: bool = True, **extra: Any) -> None:
        """Writes model and checkpointables to `<save_dir>/<name>.pth`.

        Args:
            name: without folder and ending.
            is_last: let `--resume` start from this file.
            extra: further entries of the file.

        Raises:
            FloatingPointError: a weight or an average of weights is not finite; nothing is written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **self._config, **extra}
        for key, checkpointable in self.checkpointables.items():
            data[key] = checkpointable.state_dict()
        check_finite(data["model"], name)
        check_finite(averaged_weights(data), name)
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_durably(path, lambda file: torch.save(data, file))
        if is_last:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes a file of `save_dir` the one that `--resume` starts from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_durably(path, lambda file: file.write(last_filename_basename.encode()))


def check_finite(weights: Mapping[str, Tensor], name: str) -> None:
    """Refuses weights that are not finite, before they become a file.

    Args:
        weights: by name, on any device.
        name: of the checkpoint, for the message.

    Raises:
        FloatingPointError: one of them holds inf or nan.
    """
    bad = first_not_finite(weights)
    if bad is not None:
        raise FloatingPointError(
            f"{bad} is not finite, so {name}.pth is not written: resume from an earlier "
            "checkpoint, with a lower optimizer.lr or with train.clip_norm."
        )


def _read_name(path: str) -> tuple[str, str]:
    """The name in a `last_checkpoint` file, which may be torn; and why there is none."""
    if not os.path.isfile(path):
        return "", f"{path} is no file"
    with open(path, "rb") as file:
        name = file.read().decode(errors="replace").strip()
    if not name:
        return "", f"{path} is empty"
    if os.path.basename(name) != name:
        return "", f"{path} names {name}, which is not in its folder"
    return name, ""


def _iteration(path: str) -> float:
    """The last iteration that a training checkpoint holds; file times say when it was copied."""
    number = os.path.basename(path)[len("model_") : -len(".pth")]
    if number != "final":
        return int(number)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)["iteration"]
    except Exception:  # of a damaged one, which will be told when it is read
        return math.inf

"""Checkpoints that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import IO, Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..segmentor import is_training_only

_PICKLES = (".pkl", ".pyth")


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer; a kill at any moment leaves it a checkpoint to resume from.

    Files are written under a temporary name, flushed to disk and renamed; `last_checkpoint` names a
    file only once that is complete.

    Args:
        model, save_dir, save_to_disk, checkpointables: as detectron2's.
        allow_pickle: read `.pkl` files too, detectron2's ImageNet weights among them. Reading one
            runs whatever code it holds.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: bool | None = None,
        allow_pickle: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._allow_pickle = allow_pickle

    def check_file(self, path: str) -> None:
        """Refuses a checkpoint file that cannot be loaded, before any work is done for it.

        Raises:
            ValueError: there is no such file, or it is a pickle and those are not allowed.
        """
        if path and "://" not in path and not os.path.isfile(path):
            raise ValueError(f"train.init_checkpoint={path}: there is no such file.")
        if path.endswith(_PICKLES) and not self._allow_pickle:
            raise ValueError(
                f"train.init_checkpoint={path}: reading a pickle runs the code that it holds. If "
                "you trust where the file comes from, set train.allow_pickle=True."
            )

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads a checkpoint, as detectron2's.

        Raises:
            ValueError: it holds none of the model's weights, or is a pickle and those are not
                allowed.
        """
        self.check_file(path)
        self._unfit: list[str] = []
        rest = super().load(path, *args, **kwargs)
        parameters = {name for name, _ in self.model.named_parameters()}
        if path and parameters <= set(self._unfit):
            raise ValueError(
                f"{path} holds none of the model's weights, such as {min(parameters)}: it is of "
                "another architecture, or has other names for them."
            )
        return rest

    def load_for_inference(self, path: str) -> None:
        """Loads all weights that the model has at test time.

        Raises:
            ValueError: there is no such file, it is of another model, or a pickle and those are not
                allowed.
        """
        self.load(path, checkpointables=[])
        unfit = [name for name in self._unfit if not is_training_only(name)]
        if unfit:
            raise ValueError(
                f"{path} does not fit the model: {len(unfit)} of its weights are missing there or "
                f"have another shape, such as {unfit[0]}. Evaluate it with the config it was "
                "trained with."
            )

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        shapes = [name for name, *_ in incompatible.incorrect_shapes]
        self._unfit = [*incompatible.missing_keys, *shapes]
        super()._log_incompatible_keys(incompatible)

    def save(self, name: str, *, is_last: bool = True, **extra: Any) -> None:
        """Writes model and checkpointables to `<save_dir>/<name>.pth`.

        Args:
            name: without folder and ending.
            is_last: let `--resume` start from this file.
            extra: further entries of the file.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **extra}
        for key, checkpointable in self.checkpointables.items():
            data[key] = checkpointable.state_dict()
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        if is_last:
            self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes a file of `save_dir` the one that `--resume` starts from."""
        path = os.path.join(self.save_dir, "last_checkpoint")
        write_atomically(path, lambda file: file.write(last_filename_basename.encode()))


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that `path` is never seen half-written, whenever the process dies.

    Args:
        path: of the file, in a folder that exists.
        write: puts the content into the open binary file that it is given.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise

"""What a run leaves in its folder beside its results: the log, its config, what produced it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import detectron2
import timm
import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from .. import __version__
from ..files import stop_when_disk_is_full, write_durably
from ..segmentor import inference_state_dict
from .checkpoint import check_finite, training_checkpoints

logger = logging.getLogger(__name__)

# What a killed run left under temporary names, and nobody else.
_OF_A_KILLED_RUN = re.compile(
    r"(model_(\d{7}|final|best|inference)\.pth|last_checkpoint|metrics\.json|run\.json)\.\d+\.tmp"
)


def make_folder(output_dir: str) -> None:
    """Makes the folder of a run.

    Args:
        output_dir: `train.output_dir`.

    Raises:
        ValueError: the folder cannot be made, or cannot be written to.
    """
    if comm.is_main_process():
        try:
            PathManager.mkdirs(output_dir)
        except OSError as error:
            raise ValueError(f"train.output_dir={output_dir} cannot be made: {error}.") from error
        if not (os.path.isdir(output_dir) and os.access(output_dir, os.W_OK)):
            raise ValueError(
                f"train.output_dir={output_dir} cannot be written: name a folder of your own."
            )
    comm.synchronize()


def open_log(output_dir: str, args: argparse.Namespace) -> None:
    """Opens and begins the log in the folder of a run.

    detectron2's `default_setup` also overwrites the folder's config.yaml, which here waits until
    everything that can be wrong with an experiment has been checked: see `begin_run`.

    Args:
        output_dir: `train.output_dir`, which exists.
        args: of the command line.
    """
    rank = comm.get_rank()
    # Lines that do not fit on a full disk are lost; their tracebacks would hide the error's own.
    logging.raiseExceptions = False
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    setup_logger(output_dir, distributed_rank=rank, name="contrast_d2", abbrev_name="c_d2")
    setup_logger(output_dir, distributed_rank=rank)
    for name in ("fvcore", "contrast_d2", "detectron2"):
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.INFO)  # details go to the file
    logger.info("Rank of current process: %d. World size: %d", rank, comm.get_world_size())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line: %s", args)


def begin_run(cfg: DictConfig, start: int) -> None:
    """Prepares the folder for a training: config.yaml, run.json, nothing of an earlier run.

    Args:
        cfg: whole config.
        start: the first iteration; above 0 the training continues one of this folder.
    """
    output_dir = cfg.train.output_dir
    for name in os.listdir(output_dir):
        path = os.path.join(output_dir, name)
        if _OF_A_KILLED_RUN.fullmatch(name) and os.path.isfile(path):
            os.unlink(path)
    if not start:
        _put_earlier_run_aside(output_dir)
    with stop_when_disk_is_full(output_dir):
        LazyConfig.save(cfg, os.path.join(output_dir, "config.yaml"))
    record_run(output_dir, start)


def save_inference_weights(model: nn.Module, output_dir: str) -> None:
    """Writes `model_inference.pth`: the weights without those of the contrast method."""
    path = os.path.join(output_dir, "model_inference.pth")
    state = {"model": inference_state_dict(model)}
    check_finite(state["model"], "model_inference")
    write_durably(path, lambda file: torch.save(state, file))
    logger.info("Weights without the contrast method: %s", path)


def record_run(output_dir: str, start: int = 0) -> None:
    """Writes `run.json`: the command, the commit, the versions and the machine of a run.

    Args:
        output_dir: folder of the run, which exists.
        start: the first iteration; above 0 the note is added to the "restarts" of the one that is
            there.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    note: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "contrast_d2": __version__,
        "commit": commit_of(Path(__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2_version(),
        "timm": timm.__version__,
        "device": gpu or platform.machine() + " CPU",
        "processes": comm.get_world_size(),
        "threads": torch.get_num_threads(),
    }
    path = os.path.join(output_dir, "run.json")
    if start and os.path.exists(path):
        first = json.loads(Path(path).read_text())
        first["restarts"] = [*first.get("restarts", []), {"iteration": start, **note}]
        note = first
    write_durably(path, lambda file: file.write((json.dumps(note, indent=2) + "\n").encode()))


def detectron2_version() -> str:
    """The version of the detectron2 that is imported, with the commit where it is not a release.

    Its main branch calls itself 0.6 as well: the commit is known of a checkout, and of what pip
    has installed from a repository.
    """
    file = Path(str(detectron2.__file__))
    version, commit = detectron2.__version__, commit_of(file)
    try:
        distribution = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        distribution = None
    if distribution and Path(str(distribution.locate_file("detectron2"))) == file.parent:
        version = distribution.version
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        commit = origin.get("vcs_info", {}).get("commit_id")
    return f"{version} at {commit}" if commit else version


def commit_of(file: Path) -> str | None:
    """The git commit that a file is of, with "-dirty" if tracked files have changed since.

    None where the file is not under version control, or git is missing.
    """
    commands = (
        ["git", "ls-files", "--error-unmatch", file.name],
        ["git", "rev-parse", "HEAD"],
        ["git", "status", "--porcelain", "--untracked-files=no"],
    )
    try:
        _, commit, changes = [
            subprocess.run(
                command, cwd=file.parent, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("-dirty" if changes else "")


def _put_earlier_run_aside(output_dir: str) -> None:
    """Renames what another run has left in the folder, for a `--resume` not to continue that one.

    `model_best.pth` and `model_inference.pth` stay until the new run writes its own.
    """
    names = [os.path.join(output_dir, name) for name in ("metrics.json", "last_checkpoint")]
    paths = [*filter(os.path.exists, names), *training_checkpoints(output_dir)]
    for path in paths:
        os.replace(path, path + ".old")
    if paths:
        logger.warning("of an earlier run, and now ending in .old: %s", ", ".join(paths))

"""A note of what produced a run, beside its results."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import detectron2
import timm
import torch
from detectron2.utils import comm


def record_run(output_dir: str) -> None:
    """Writes `run.json`: the command, the commit, the versions and the machine of a run.

    Args:
        output_dir: folder of the run, which exists.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    note = {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit_of(Path(__file__)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "timm": timm.__version__,
        "device": gpu or platform.machine() + " CPU",
        "processes": comm.get_world_size(),
        "threads": torch.get_num_threads(),
    }
    Path(output_dir, "run.json").write_text(json.dumps(note, indent=2) + "\n")


def commit_of(file: Path) -> str | None:
    """The git commit that a file is of, with "-dirty" if tracked files have changed since.

    None where the file is not under version control, or git is not there.
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

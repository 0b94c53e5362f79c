"""The note of what produced a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
import torch

import contrast_d2
from contrast_d2.engine.record import commit_of, detectron2_version, record_run


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_and_uncommitted_changes_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_text("a = 1\n")
    assert commit_of(file) is None
    git(tmp_path, "init", "-q")
    assert commit_of(file) is None  # in a repository, but not of it
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit_of(file) == head
    (tmp_path / "notes.txt").write_text("not tracked")
    assert commit_of(file) == head
    file.write_text("a = 2\n")
    assert commit_of(file) == f"{head}-dirty"


def test_the_note_repeats_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", "a b.py", "train.seed=1"])
    record_run(str(tmp_path))
    note = json.loads((tmp_path / "run.json").read_text())
    assert note["command"] == "python train_net.py --config-file 'a b.py' train.seed=1"
    assert note["torch"] == torch.__version__
    assert note["contrast_d2"] == contrast_d2.__version__
    assert note["detectron2"] == detectron2_version()
    assert note["processes"] == 1


def test_a_checkout_of_detectron2_is_told_from_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert detectron2_version().startswith(detectron2.__version__)
    assert " at " not in detectron2_version()
    file = tmp_path / "detectron2" / "__init__.py"
    file.parent.mkdir()
    file.write_text("")
    monkeypatch.setattr(detectron2, "__file__", str(file))  # as with a folder on the import path
    assert detectron2_version() == detectron2.__version__
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert detectron2_version() == f"{detectron2.__version__} at {head}"

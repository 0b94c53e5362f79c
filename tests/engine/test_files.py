"""Files written whole or not at all, full disks, and the rows of metrics that a resume keeps."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage, JSONWriter
from torch import nn

from contrast_d2.engine import Checkpointer
from contrast_d2.engine.hooks import MetricsWriter, keep_metrics_until
from contrast_d2.files import (
    DiskFullError,
    stop_when_disk_is_full,
    write_durably,
)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write files of more bytes: what a disk does that has no more left."""
    resource = pytest.importorskip("resource", reason="limits on files are those of POSIX")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_failed_write_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half of the new")
        raise OSError(errno.EIO, "the disk is broken")

    with pytest.raises(OSError, match="the disk is broken"):
        write_durably(str(path), fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_costs_no_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    nn.init.zeros_(model.weight)
    for size in (100, 20_000):
        with largest_file(size), pytest.raises(DiskFullError) as raised:
            checkpointer.save("model_0000003")
        message = str(raised.value)
        assert "model_0000003.pth" in message and "File too large" in message
        assert "--resume" in message and "\n" not in message
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    checkpointer.save("model_0000003")
    assert not torch.load(tmp_path / "model_0000003.pth")["model"]["weight"].any()


def test_metrics_on_a_full_disk_stop_with_the_same_line(tmp_path: Path) -> None:
    hook = MetricsWriter(lambda: [JSONWriter(str(tmp_path / "metrics.json"))], 1, str(tmp_path))
    with EventStorage(0) as storage:
        hook.trainer = type(
            "Loop", (), {"iter": 0, "max_iter": 9, "storage": storage, "catch_up": int}
        )
        hook.before_train()
        storage.put_scalars(loss=1.0)
        hook.after_step()
        storage.iter = 1
        storage.put_scalars(loss=2.0)
        with largest_file(10), pytest.raises(DiskFullError, match=f"{tmp_path} could not be"):
            hook.after_step()


def test_other_errors_are_passed_on() -> None:
    with pytest.raises(PermissionError), stop_when_disk_is_full("file"):
        raise PermissionError(errno.EACCES, "no")
    with pytest.raises(RuntimeError, match="^a defect$"), stop_when_disk_is_full("file"):
        raise RuntimeError("a defect")


def test_rows_after_the_checkpoint_and_torn_ones_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    rows = [json.dumps({"iteration": i, "loss": float(i)}) + "\n" for i in range(6)]
    path.write_text("".join(rows) + rows[0][:9])
    keep_metrics_until(str(path), 5)
    assert path.read_text() == "".join(rows)
    path.write_text("".join(rows[:3]) + "3.5\n" + "{}\n" + "".join(rows[3:]))
    keep_metrics_until(str(path), 3)
    assert path.read_text() == "".join(rows[:4])
    before = path.stat()
    keep_metrics_until(str(path), 3)  # nothing to drop: not written anew
    assert path.stat().st_ino == before.st_ino
    keep_metrics_until(str(tmp_path / "none.json"), 3)
    assert os.listdir(tmp_path) == ["metrics.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="folders cannot be opened there")
def test_the_folder_is_synced_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(sorted(os.listdir(tmp_path)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_durably(str(tmp_path / "file"), lambda file: file.write(b"x"))
    assert synced == [[f"file.{os.getpid()}.tmp"], ["file"]]

"""tools/prepare_dataset.py, run as users run it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data import published
from tests.helpers import running_first

TOOL = Path(__file__).parents[2] / "tools/prepare_dataset.py"
LABELS = "ADEChallengeData2016/annotations_detectron2"


# The sixth label file is half written when the process is killed.
DIES_WHILE_IT_WRITES = """
import itertools, os, signal
from PIL import Image

save, numbers = Image.Image.save, itertools.count(1)

def save_or_die(image, file, *args, **options):
    save(image, file, *args, **options)
    if next(numbers) == 6:
        file.flush()
        os.truncate(file.name, os.path.getsize(file.name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

Image.Image.save = save_or_die
"""


def command(root: Path) -> list[str]:
    options = ["--root", str(root), "--workers", "1", "--partial"]
    return [sys.executable, str(TOOL), "ade20k", *options]


def labels(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / LABELS).rglob("*.png")}


@pytest.mark.slow
def test_killed_and_run_again(tmp_path) -> None:
    """A process that is killed while it writes leaves complete files; the next one goes on."""
    count = 10
    published.ade20k(tmp_path, count)
    environment = running_first(DIES_WHILE_IT_WRITES, tmp_path / "first")
    process = subprocess.run(command(tmp_path), env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    killed = labels(tmp_path)
    assert len(killed) == 5
    (torn,) = (tmp_path / LABELS).rglob("*.tmp")
    assert 0 < torn.stat().st_size < len(next(iter(killed.values())))

    again = subprocess.run(command(tmp_path), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines() == [
        f"{2 * count - len(killed)} label files written, {len(killed)} were there",
        f"ade20k_sem_seg_train: {count} images",
        f"ade20k_sem_seg_val: {count} images",
    ]
    assert not list((tmp_path / LABELS).rglob("*.tmp"))
    complete = labels(tmp_path)
    assert len(complete) == 2 * count and killed.items() <= complete.items()
    assert len(set(complete.values())) == 1  # their sources are equal
    # Standard error is no terminal here: warnings of the counts, and no bar.
    assert all(line.startswith("warning: ade20k") for line in again.stderr.splitlines())


def test_an_incomplete_download_is_one_line(main, tmp_path, monkeypatch, capsys) -> None:
    published.ade20k(tmp_path, 1)
    monkeypatch.setenv("DETECTRON2_DATASETS", "elsewhere")  # --root comes first
    assert main(["ade20k", "--root", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ade20k_sem_seg_train") and "20,210" in line


def test_what_is_used_as_published_is_counted(main, tmp_path, monkeypatch, capsys) -> None:
    published.cadis(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert main(["cadis", "--partial"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "cadis_task1_sem_seg_train: 19 images",
        "cadis_task1_sem_seg_val: 3 images",
        "cadis_task1_sem_seg_test: 3 images",
    ]


def test_an_unknown_name_lists_those_that_exist(main, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["cityscape"])
    assert stopped.value.code == 2
    assert "pascal_context" in capsys.readouterr().err

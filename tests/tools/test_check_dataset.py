"""tools/check_dataset.py and the guide that uses it, run as users run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/check_dataset.py"
GUIDE = (ROOT / "docs/custom_data.md").read_text()


def write_dataset(folder: Path) -> None:
    """Colour boxes with labels in colours, as the guide's table has them."""
    table = np.array([(128, 64, 128), (0, 0, 142), (70, 130, 180), (0, 0, 0)], np.uint8)
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for part in ("images", "annotations"):
            (folder / part / split).mkdir(parents=True)
        for i in range(count):
            labels = np.kron(np.arange(12).reshape(3, 4) % 4, np.ones((30, 30), int))
            noise = rng.integers(-20, 21, (*labels.shape, 3))
            image = (table[labels].astype(int) // 2 + 60 + noise).astype(np.uint8)
            Image.fromarray(image).save(folder / f"images/{split}/{i}.jpg")
            Image.fromarray(table[labels]).save(folder / f"annotations/{split}/{i}.png")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: v for name, v in os.environ.items() if name != "DETECTRON2_DATASETS"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_guide_as_written(tmp_path) -> None:
    """Labels in colours are refused; converted as the guide says, they are trained on."""
    for name in ("tools", "train_net.py", "configs/common"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(ROOT / name)
    data = tmp_path / "datasets/my_data"
    write_dataset(data)
    (description,) = blocks("json")
    (data / "dataset.json").write_text(description)
    experiment, conversion = blocks("python")
    config = tmp_path / re.search(r"`(configs/\S+\.py)`:", GUIDE)[1]
    config.parent.mkdir()
    config.write_text(experiment)
    check, train = blocks("sh")

    refused = run(["bash", "-ec", check], tmp_path)
    assert refused.returncode == 1 and "error: 5 label files hold colours" in refused.stdout

    converted = run([sys.executable, "-c", conversion], tmp_path)
    assert converted.returncode == 0, converted.stderr
    passed = run(["bash", "-ec", check], tmp_path)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert passed.stdout.splitlines()[-1] == "0 errors, 0 warnings, 0 notes"
    assert passed.stderr == ""  # no bar where it is no terminal
    assert "<td>sky</td>" in (tmp_path / "report.html").read_text()

    trained = run(["bash", "-ec", train], tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "output/trial/model_final.pth").is_file()
    assert (tmp_path / "output/trial/inference/my_data_sem_seg_val").is_dir()


def test_errors_are_one_line(main, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for arguments, words in (
        (["camvit"], "error: Dataset 'camvit' is not registered"),
        (["shapes", "--workers", "0"], "error: workers must be at least 1"),
        (["shapes", "--html", str(tmp_path / "none/x.html")], "error: --html"),
    ):
        assert main(arguments) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(words) and len(err.splitlines()) == 1


def test_the_built_in_scenes_are_fine(main, tmp_path, capsys) -> None:
    report = tmp_path / "report.html"
    assert main(["shapes_sem_seg_val", "--workers", "1", "--html", str(report)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "shapes_sem_seg_val: 64 images, 128x96",
        "0 errors, 0 warnings, 0 notes",
    ]
    assert report.stat().st_size > 1000

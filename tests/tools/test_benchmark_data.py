"""`tools/benchmark.py data`: what is compared does the same, on images like the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"

pytest.importorskip("pytorch_metric_learning", reason="the tool's other commands: install .[bench]")

# ruff: noqa: E402
from bench import data, tables


def test_all_mappers_give_the_same_samples(camvid, tmp_path) -> None:
    """The same labels, and images that differ as ours and torchvision's hues do."""
    records = DatasetCatalog.get(data.CAMVID)[:2]
    contenders = data.mappers(data.Images(data.CAMVID, records, (200, 300), 11), tmp_path)
    contenders.pop(data.OPENCV, None)
    for seed, record in enumerate(2 * records):
        samples = {}
        for name, mapper in contenders.items():
            np.random.seed(seed)
            samples[name] = mapper(record)
        labels = samples[data.PEER]["sem_seg"]
        image = samples[data.PEER]["image"].float()
        for sample in samples.values():
            assert sample["image"].shape == (3, 200, 300)
            ignored = sample["sem_seg"] == 255
            assert (sample["sem_seg"][~ignored] == labels[~ignored]).all()
            assert (labels[ignored] % 244 == 11).all()  # stored, or padding
            assert (sample["image"].float() - image).abs().mean() < 0.7


def test_opencv_gives_samples_of_the_same_kind(camvid) -> None:
    """Its own draws: sizes, padding, the limit on one class, and shares of classes on average."""
    pytest.importorskip("cv2", reason="a contender that is compared where it is installed")
    records = DatasetCatalog.get(data.CAMVID)[:3]
    contenders = data.mappers(data.Images(data.CAMVID, records, (200, 300), 11), Path())
    shares = {}
    for name in (data.PEER, data.OPENCV):
        np.random.seed(0)
        counts = np.zeros(12)
        for record in 20 * records:
            sample = contenders[name](record)
            assert sample["image"].shape == (3, 200, 300)
            assert sample["image"].dtype == torch.uint8
            counts += np.bincount(sample["sem_seg"].ravel(), minlength=12)
        shares[name] = counts / counts.sum()
    assert abs(shares[data.OPENCV] - shares[data.PEER]).max() < 0.05


def test_large_images_are_like_those_of_cityscapes(camvid, tmp_path) -> None:
    records = DatasetCatalog.get(data.CAMVID)[40:41]
    written = data.write_large_images(records, tmp_path, void=11)
    (png,), (jpg,) = written["png"], written["jpg"]
    assert 2.0e6 < Path(png["file_name"]).stat().st_size < 3.0e6
    with Image.open(png["file_name"]) as image, Image.open(records[0]["file_name"]) as frame:
        assert (image.mode, image.size) == ("RGB", (2048, 1024))
        small = np.asarray(image.resize((480, 240), Image.BOX), float)
        assert abs(small - np.asarray(frame.crop((0, 60, 480, 300)), float)).mean() < 3
    with Image.open(jpg["file_name"]) as image:
        assert (image.format, image.size) == ("JPEG", (2048, 1024))
    with Image.open(png["sem_seg_file_name"]) as labels:
        assert (labels.mode, labels.size) == ("L", (2048, 1024))
        assert set(np.unique(labels)) <= {*range(11), 255}


@pytest.mark.slow
def test_the_tool_measures_and_writes(camvid, main, tmp_path, capsys) -> None:
    output = tmp_path / "out/performance_data.json"
    assert main(["data", "--images", "1", "--repeats", "2", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert len(found["kinds"]) == 3
    for kind in found["kinds"].values():
        assert kind["images"] == 1 and kind["rounds"] == 2
        assert list(kind["contenders"])[:2] == [data.PEER, data.OURS]
        for row in kind["contenders"].values():
            assert 0 < row["ms"]["p10"] <= row["ms"]["median"] <= row["ms"]["p90"]
        assert set(kind["contenders"][data.PEER]["times_detectron2"].values()) == {1.0}
    assert "2048x1024, PNG: 1 images" in capsys.readouterr().out
    assert data._LARGE not in DatasetCatalog
    section = f"<!-- {output.name}: loading -->\n<!-- end -->"
    lines = tables.fill(section, output.parent).splitlines()
    assert len(lines) == 4 + sum(len(kind["contenders"]) for kind in found["kinds"].values())
    assert lines[3].startswith("| 2048x1024, PNG, ") and f"| {data.PEER} |" in lines[3]


def test_mistakes_give_one_clear_line(main, monkeypatch, tmp_path, capsys) -> None:
    assert main(["data", "--images", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: --images 0: ")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert main(["data"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "camvid" in line

"""tools/position_prior.py, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

import contrast_d2.data  # noqa: F401  (registers the datasets)
from contrast_d2.data import LabelMap, load_labels

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/position_prior.py"


def label_maps(name: str) -> np.ndarray:
    label_map = LabelMap.from_metadata(MetadataCatalog.get(name))
    records = DatasetCatalog.get(name)
    return np.stack([load_labels(record["sem_seg_file_name"], label_map) for record in records])


@pytest.mark.slow
def test_camvid_scores_are_those_of_a_plain_count(camvid, tmp_path):
    train, val = "camvid_sem_seg_train", "camvid_sem_seg_val"
    output = tmp_path / "results" / "prior.json"
    command = [sys.executable, TOOL, "--train", train, "--eval", val, "--output", output]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    maps = label_maps(train)
    counts = np.stack([(maps == k).sum(axis=0) for k in range(11)])
    pixels = counts.sum(axis=(1, 2), keepdims=True)
    prior = (counts + pixels / (pixels.sum() + 1)).argmax(axis=0)  # the fraction decides ties
    maps = label_maps(val)
    hits = [((maps == k) & (prior == k)).sum() for k in range(11)]
    either = [((maps == k) | ((prior == k) & (maps != 255))).sum() for k in range(11)]
    iou = 100 * np.array(hits) / np.array(either)

    report = json.loads(output.read_text())
    assert (report["train"], report["eval"]) == (train, val)
    assert report["command"].startswith("python tools/position_prior.py --train camvid_sem_seg_tr")
    classes = MetadataCatalog.get(val).stuff_classes
    scores = [report["sem_seg"][f"IoU-{name}"] for name in classes]
    assert scores == pytest.approx(iou.tolist())
    assert report["sem_seg"]["mIoU"] == pytest.approx(np.mean(scores))
    assert done.stdout.splitlines()[-1] == f"mIoU {report['sem_seg']['mIoU']:.2f} on {val}"


def test_an_unknown_dataset_is_one_line_with_the_nearest_name(main, capsys):
    assert main(["--train", "shapes_sem_seg_trian", "--eval", "shapes_sem_seg_val"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "shapes_sem_seg_train" in line

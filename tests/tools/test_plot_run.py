"""tools/plot_run.py on the folder of a run, run as users run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import SemanticSegmentor
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from omegaconf import OmegaConf
from PIL import Image

from contrast_d2.data import SemSegMapper, build_test_loader
from contrast_d2.studio.visualize import WRONG

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/plot_run.py"
VAL = "shapes_sem_seg_val"
NUM_CLASSES = 9


def config():
    stages = L(ResNet.make_default_stages)(depth=18, norm="BN")
    return OmegaConf.create(
        {
            "model": L(SemanticSegmentor)(
                backbone=L(ResNet)(
                    stem=L(BasicStem)(in_channels=3, out_channels=64, norm="BN"),
                    stages=stages,
                    out_features=["res2"],
                ),
                sem_seg_head=L(SemSegFPNHead)(
                    input_shape=L("builtins.dict")(res2=L(ShapeSpec)(channels=64, stride=4)),
                    num_classes=NUM_CLASSES,
                    conv_dims=16,
                    common_stride=4,
                    norm="BN",
                ),
                pixel_mean=[128.0, 128.0, 128.0],
                pixel_std=[64.0, 64.0, 64.0],
            ),
            "train": {"channels_last": False},
            "dataset": {"num_classes": NUM_CLASSES},
            "dataloader": {
                "test": L(build_test_loader)(
                    dataset=VAL,
                    mapper=L(SemSegMapper)(dataset_name=VAL, is_train=False),
                    num_workers=0,
                )
            },
        },
        flags={"allow_objects": True},
    )


def write_metrics(run_dir: Path, *, loss: float, miou: float | None) -> None:
    lines = [
        {"iteration": i, "total_loss": loss, "loss_sem_seg": loss, "lr": 0.1} for i in (19, 39)
    ]
    if miou is not None:
        lines[-1] |= {"sem_seg/mIoU": miou, "sem_seg/IoU-disc": miou, "sem_seg/IoU-dot": 1.0}
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_dir / "metrics.json").write_text(text)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model says background everywhere."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    cfg = config()
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    model = instantiate(cfg.model)
    predictor = model.sem_seg_head.predictor
    torch.nn.init.zeros_(predictor.weight)
    with torch.no_grad():
        predictor.bias.copy_(torch.eye(NUM_CLASSES)[0])
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    write_metrics(folder, loss=1.0, miou=12.345)
    return folder


def plot(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the tool in a process of its own, as users do."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_pictures_of_one_run_lie_in_its_folder_and_the_last_lines_say_so(run_dir):
    done = plot(run_dir, "--images", 2)
    assert done.returncode == 0, done.stderr
    # The first and the last of 64 images.
    names = "class_iou.png, curves.png, prediction_val-00000.png, prediction_val-00063.png"
    assert done.stdout.splitlines()[-2:] == [
        f"mIoU 12.35 on {VAL}",
        f"pictures: {run_dir}: {names}",
    ]
    for name in names.split(", "):
        with Image.open(run_dir / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert pixels.std() > 10
        # Shapes are predicted as background, which the error map shows.
        if name.startswith("prediction"):
            assert (pixels == WRONG).all(axis=-1).sum() > 500


def test_several_runs_are_overlaid_where_output_says(run_dir, tmp_path, main, capsys):
    second, both = tmp_path / "second", tmp_path / "both"
    second.mkdir()
    write_metrics(second, loss=0.5, miou=None)
    assert main([str(run_dir), str(second), "--images", "0", "--output", str(both)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"first: mIoU 12.35 on {VAL}",
        "second: mIoU not evaluated yet",
        f"pictures: {both}: class_iou.png, curves.png",
    ]
    assert {path.name for path in both.iterdir()} == {"class_iou.png", "curves.png"}
    assert list(second.glob("*.png")) == []


def test_mistakes_give_one_clear_line(run_dir, tmp_path, main, capsys):
    bare, untrained, nowhere = tmp_path / "bare", tmp_path / "untrained", tmp_path / "nowhere"
    bare.mkdir()
    untrained.mkdir()
    write_metrics(untrained, loss=1.0, miou=None)
    (untrained / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    for arguments, message in {
        (nowhere,): f"{nowhere} does not exist",
        (bare,): f"{bare / 'metrics.json'} does not exist",
        (untrained,): f"{untrained} has no checkpoint",
        (run_dir, run_dir): "a run is named twice",
    }.items():
        assert main([str(argument) for argument in arguments]) == 1
        out, err = capsys.readouterr()
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert out == ""

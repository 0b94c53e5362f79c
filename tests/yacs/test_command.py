"""The command with a yaml file, as a user of detectron2 runs it: real processes, generated images.

The backbone and the dataset are those of a module that only --import brings in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MODULE = """
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import nn

from contrast_d2.yacs import CONFIG_REGISTRY


class Stages(Backbone):
    def __init__(self, width):
        super().__init__()
        self.width = width
        self.fine = nn.Conv2d(3, width, 3, stride=4, padding=1)
        self.coarse = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        fine = self.fine(x)
        return {"res2": fine, "res3": self.coarse(fine)}

    def output_shape(self):
        return {f"res{i}": ShapeSpec(channels=self.width, stride=2**i) for i in (2, 3)}


@CONFIG_REGISTRY.register()
def add_stages_config(cfg):
    cfg.MODEL.STAGES = CfgNode({"WIDTH": 4})


@BACKBONE_REGISTRY.register()
def build_stages(cfg, input_shape):
    return Stages(cfg.MODEL.STAGES.WIDTH)


source = MetadataCatalog.get("shapes_sem_seg_val")
DatasetCatalog.register("few_shapes", lambda: DatasetCatalog.get("shapes_sem_seg_val")[:6])
MetadataCatalog.get("few_shapes").set(
    **{key: value for key, value in source.as_dict().items() if key != "name"}
)
"""

YAML = """
MODEL:
  META_ARCHITECTURE: ContrastiveSegmentor
  BACKBONE: {NAME: build_stages}
  STAGES: {WIDTH: 6}
  SEM_SEG_HEAD:
    NAME: FCNDecoder
    NORM: BN
    IN_FEATURES: [res2, res3]
    NUM_CLASSES: 9
  CONTRAST:
    NAME: MultiScaleContrast
    MULTISCALE:
      SCALE_WEIGHTS: {res2: 1.0}
      PROJECTOR: {EMBED_DIM: 8}
DATASETS: {TRAIN: [few_shapes], TEST: [few_shapes]}
DATALOADER: {NUM_WORKERS: 1}
INPUT:
  CROP: {ENABLED: True, TYPE: absolute, SIZE: [64, 64]}
SOLVER:
  IMS_PER_BATCH: 4
  MAX_ITER: 4
  LR_SCHEDULER_NAME: WarmupPolyLR
  WARMUP_ITERS: 0
  CHECKPOINT_PERIOD: 2
LOG_PERIOD: 1
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train_net.py"), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, in which two processes have trained."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_parts.py").write_text(MODULE)
    (folder / "my.yaml").write_text(YAML)
    flags = ["--config-file", "my.yaml", "--import", "my_parts", "--num-gpus", "2"]
    result = run(folder, *flags, "OUTPUT_DIR", "out", "SOLVER.MAX_ITER", "2")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_two_processes_train_with_an_imported_module(folder: Path) -> None:
    out = folder / "out"
    rows = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert rows[0]["loss_contrast_res2"] > 0
    assert (out / "model_final.pth").exists()
    assert "--import my_parts" in json.loads((out / "run.json").read_text())["command"]
    assert "imports=['my_parts']" in (out / "log.txt").read_text()
    assert "Process 1 of 2" in (out / "log.txt.rank1").read_text()


@pytest.mark.slow
def test_its_run_is_resumed_and_its_saved_config_evaluated(folder: Path) -> None:
    flags = ["--config-file", "my.yaml", "--import", str(folder / "my_parts.py")]
    result = run(folder, *flags, "--resume", "OUTPUT_DIR", "out", "TEST.EVAL_PERIOD", "4")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Starting training from iteration 2" in result.stdout + result.stderr
    scores = folder / "out/inference/few_shapes/sem_seg_evaluation.json"
    before = scores.read_text()
    scores.unlink()
    saved = ["--config-file", "out/config.yaml", "--eval-only"]
    result = run(folder, *saved, "--import", "my_parts", "dataloader.test.num_workers=0")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(scores.read_text()) == json.loads(before)
    result = run(folder, *saved)
    assert result.returncode == 1
    assert "is not registered" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MODEL.MASK_ON", "True"], "error: MODEL.MASK_ON=True: not read"),
        (["--import", "no_parts"], "error: --import no_parts: there is no such module"),
    ],
)
def test_a_mistake_gets_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    config = str(ROOT / "configs/camvid/semfpn_r18_base_6k.yaml")
    result = run(tmp_path, "--config-file", config, *arguments)
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout

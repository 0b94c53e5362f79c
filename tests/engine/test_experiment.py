"""Which changes of a config a resume takes up, and which it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from contrast_d2.engine import Checkpointer, check_same_experiment, load_config, plain_config

ROOT = Path(__file__).parents[2]
LAZY = "configs/shapes/semfpn_r18_ms_cs_demo.py"
YACS = "configs/camvid/semfpn_r18_ms_cs_6k.yaml"
Compare = Callable[..., None]


@pytest.fixture
def compare(tmp_path: Path) -> Compare:
    """Resumes from a checkpoint of an experiment with overrides of it."""

    def compare(*overrides: str, config: str = LAZY) -> None:
        before = plain_config(load_config(str(ROOT / config)))
        checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path), config=before)
        checkpointer.save("model_0000001")
        cfg = load_config(str(ROOT / config), overrides)
        check_same_experiment(cfg, str(tmp_path / "model_0000001.pth"))

    return compare


FREE = [
    *("train.max_iter=999", "train.output_dir=elsewhere", "train.checkpointer.period=3"),
    *("train.eval_period=7", "train.log_period=1", "train.writers=[mlflow]", "train.device=cpu"),
    *("train.dashboard=None", "dataloader.train.num_workers=0", "dataloader.test.num_workers=0"),
    *("model.backbone.pretrained=False", "train.init_checkpoint=a.pth"),
    "model.backbone.weights_file=gone.pth",
]


def test_what_changes_no_result_is_taken_up(compare: Compare) -> None:
    compare()
    compare(*FREE)
    compare("SOLVER.MAX_ITER", "99", "OUTPUT_DIR", "x", "TEST.EVAL_PERIOD", "9", config=YACS)


def test_the_rest_is_refused_by_name(compare: Compare, subtests: pytest.Subtests) -> None:
    for key, value in [
        ("optimizer.lr", "0.5"),
        ("model.contrast.temperature", "0.3"),
        ("train.accumulation_steps", "2"),
        ("train.best_metric", "sem_seg/mACC"),
        ("lr_multiplier.power", "0.5"),
        ("dataloader.train.total_batch_size", "4"),
        ("dataset.train", "shapes_sem_seg_val"),
    ]:
        with subtests.test(key):
            with pytest.raises(ValueError) as raised:
                compare("train.max_iter=999", f"{key}={value}")
            first, *rows, last = str(raised.value).splitlines()
            assert "model_0000001.pth" in first
            assert f"  {key}={value}, was " in "\n".join(rows).replace("'", "")
            assert "max_iter" not in str(raised.value)
            asked = re.search(r"train\.resume_changes=\[(.*)\]", last)
            assert asked and key in asked[1].split(", ")
            # What the line proposes does it.
            compare(f"{key}={value}", f"train.resume_changes=[{asked[1]}]")
    with pytest.raises(ValueError, match=r"optimizer\.lr=0\.9, was"):
        compare("SOLVER.BASE_LR", "0.9", config=YACS)


def test_what_the_state_is_made_of_cannot_be_changed(
    compare: Compare, subtests: pytest.Subtests
) -> None:
    for change in ("train.seed=3", "optimizer._target_=torch.optim.Adam"):
        with subtests.test(change):
            with pytest.raises(ValueError) as raised:
                compare(change, f"train.resume_changes=[{change.partition('=')[0]}]")
            assert change.partition("=")[0] in str(raised.value)
            assert "train.init_checkpoint=" in str(raised.value)
            assert "train.resume_changes=" not in str(raised.value).splitlines()[-1]


def test_a_key_that_is_not_there_is_not_changed(compare: Compare) -> None:
    with pytest.raises(ValueError, match=r"train\.resume_changes=.*no key optimizr\.lr"):
        compare("train.resume_changes=[optimizr.lr]")


def test_a_checkpoint_without_a_config_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "model_0000001.pth"
    torch.save({"model": {}}, path)
    with pytest.raises(ValueError, match="holds no config.*train.init_checkpoint="):
        check_same_experiment(load_config(str(ROOT / LAZY)), str(path))

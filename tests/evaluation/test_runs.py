from __future__ import annotations

import json
import math
import os

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from omegaconf import OmegaConf
from torch import nn

from contrast_d2.evaluation.runs import (
    last_checkpoint,
    last_scores,
    load_run_model,
    read_config,
    read_metrics,
)


def write_lines(path, *lines: dict | str) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(texts))


def test_metrics_of_a_resumed_run_keep_the_last_value_of_an_iteration(tmp_path):
    path = tmp_path / "metrics.json"
    write_lines(
        path,
        {"iteration": 19, "total_loss": 2.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 1.0},
        {"iteration": 59, "total_loss": 9.0, "sem_seg/IoU-car": math.nan},
        # Killed, then resumed from iteration 20.
        {"iteration": 39, "total_loss": 1.5},
        {"iteration": 19, "sem_seg/mIoU": 30.0},
    )
    metrics = read_metrics(path)
    assert list(metrics) == [19, 39, 59]
    assert metrics[19] == {"total_loss": 2.0, "lr": 0.1, "sem_seg/mIoU": 30.0}
    assert metrics[39] == {"total_loss": 1.5}
    assert math.isnan(metrics[59]["sem_seg/IoU-car"])


def test_metrics_skip_torn_lines_and_keep_what_a_resumed_run_appends_to_one(tmp_path):
    path = tmp_path / "metrics.json"
    torn = '{"iteration": 39, "total_lo'
    write_lines(path, {"iteration": 19, "a": 1.0}, torn, {"iteration": 59, "a": 3.0}, torn)
    assert read_metrics(path) == {19: {"a": 1.0}, 59: {"a": 3.0}}


def test_missing_and_empty_metrics_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.json does not exist"):
        read_metrics(tmp_path / "metrics.json")
    write_lines(tmp_path / "metrics.json", '{"iteration": 19, "tot')
    with pytest.raises(ValueError, match="holds no metrics yet"):
        read_metrics(tmp_path / "metrics.json")


def test_scores_come_from_the_newest_report_else_from_the_metrics(tmp_path):
    metrics = {
        9: {"sem_seg/mIoU": 10.0, "sem_seg/IoU-car": 1.0},
        19: {"sem_seg/mIoU": 20.0, "sem_seg/IoU-car": math.nan},
        29: {"total_loss": 1.0},
    }
    save_config(tmp_path, width=3)
    dataset, scores = last_scores(tmp_path, metrics)
    assert dataset == "some_val"
    assert scores["mIoU"] == 20.0
    assert math.isnan(scores["IoU-car"])
    assert last_scores(tmp_path, {29: {"total_loss": 1.0}}) is None

    for age, name in enumerate(("new", "old")):
        path = tmp_path / "inference" / name / "sem_seg_evaluation.json"
        path.parent.mkdir(parents=True)
        path.write_text(
            json.dumps({"dataset": name, "sem_seg": {"mIoU": 30.0 + age, "IoU-car": None}})
        )
        os.utime(path, (1000 - age, 1000 - age))
    dataset, scores = last_scores(tmp_path, metrics)
    assert (dataset, scores["mIoU"]) == ("new", 30.0)
    assert math.isnan(scores["IoU-car"])


class Linear(nn.Linear):
    """A stand-in for a network that would download weights when it is built."""

    def __init__(self, width: int, pretrained: bool) -> None:
        assert not pretrained
        super().__init__(width, 2)


def save_config(run_dir, width: int) -> None:
    config = OmegaConf.create(
        {
            "width": width,
            "test": "some_val",
            "model": L(Linear)(width="${width}", pretrained=True),
            "dataloader": {"test": {"dataset": "${test}"}},
        },
        flags={"allow_objects": True},
    )
    LazyConfig.save(config, str(run_dir / "config.yaml"))


def test_model_has_the_newest_weights_and_downloads_none(tmp_path):
    save_config(tmp_path, width=3)
    weights = {name: Linear(3, False) for name in ("model_final.pth", "model_0000019.pth")}
    for name, layer in weights.items():
        torch.save({"model": layer.state_dict(), "iteration": 19}, tmp_path / name)
    assert last_checkpoint(tmp_path).name == "model_final.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000019.pth")
    model = load_run_model(tmp_path)
    assert torch.equal(model.weight, weights["model_0000019.pth"].weight)
    assert not model.training


def test_unusable_runs_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"config\.yaml has no dataloader\.test\.dataset"):
        read_config(tmp_path)
    save_config(tmp_path, width=3)
    with pytest.raises(ValueError, match=r"no checkpoint \(model_final\.pth does not exist\)"):
        load_run_model(tmp_path)
    (tmp_path / "model_final.pth").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match=r"model_final\.pth cannot be read as a checkpoint"):
        load_run_model(tmp_path)
    torch.save({"model": Linear(4, False).state_dict()}, tmp_path / "model_final.pth")
    with pytest.raises(ValueError, match=r"does not fit the model .*size mismatch for weight"):
        load_run_model(tmp_path)

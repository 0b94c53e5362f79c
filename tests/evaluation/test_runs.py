from __future__ import annotations

import json
import math
import os

import pytest

from contrast_d2.evaluation.runs import last_scores, read_config, read_metrics


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
    save_config(tmp_path)
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


def save_config(run_dir) -> None:
    text = "test: some_val\nmodel: {}\ndataloader: {test: {dataset: '${test}'}}\n"
    (run_dir / "config.yaml").write_text(text)


def test_unusable_configs_are_errors_that_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"config\.yaml does not exist"):
        read_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(ValueError, match=r"config\.yaml.*dataloader\.test\.dataset"):
        read_config(tmp_path)

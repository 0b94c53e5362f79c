"""`tools/benchmark.py evaluation`: both evaluators see the same scores, in both layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"

pytest.importorskip("pytorch_metric_learning", reason="the tool's other commands: install .[bench]")

# ruff: noqa: E402
from bench import evaluation, tables

CPU = torch.device("cpu")


@pytest.fixture
def small(camvid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 128x256 pixels in place of 2048x1024."""
    monkeypatch.setattr(evaluation, "_SIZE", (128, 256))


def test_the_layouts_hold_the_same_scores(small, tmp_path) -> None:
    (record,) = evaluation._register(tmp_path, 1)
    try:
        by_class, by_pixel = (
            evaluation._scores(record, 0, channels_last)
            for channels_last in evaluation.LAYOUTS.values()
        )
    finally:
        DatasetCatalog.remove(evaluation._DATASET)
    assert by_class.shape == (19, 128, 256)
    assert by_class.stride() == (128 * 256, 256, 1) and by_pixel.stride() == (1, 256 * 19, 19)
    torch.testing.assert_close(by_class, by_pixel)


def test_the_tool_measures_and_writes(main, small, tmp_path, capsys) -> None:
    output = tmp_path / "out/performance_evaluation.json"
    assert main(["evaluation", "--images", "2", "--repeats", "2", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert list(found["layouts"]) == list(evaluation.LAYOUTS)
    for rows in found["layouts"].values():
        assert list(rows)[:2] == [evaluation.PEER, evaluation.OURS]
        assert all(0 < row["ms"]["p10"] <= row["ms"]["p90"] for row in rows.values())
    assert "scores channels-last: 2 images" in capsys.readouterr().out
    assert evaluation._DATASET not in DatasetCatalog
    section = f"<!-- {output.name}: evaluations -->\n<!-- end -->"
    lines = tables.fill(section, output.parent).splitlines()
    assert len(lines) == 4 + 2 * 3 and lines[3].startswith("| by class | detectron2 |")


def test_evaluators_that_disagree_are_not_compared(small, monkeypatch) -> None:
    class Wrong(evaluation.SemSegEvaluator):
        def process(self, inputs: list[dict], outputs: list[dict]) -> None:
            super().process(inputs, [{"sem_seg": -output["sem_seg"]} for output in outputs])

    monkeypatch.setattr(evaluation, "SemSegEvaluator", Wrong)
    with pytest.raises(RuntimeError, match="the evaluators disagree on"):
        evaluation.measure(images=1, device=CPU, rounds=1, most_seconds=1, say=lambda line: None)
    assert evaluation._DATASET not in DatasetCatalog


def test_a_mistake_gives_one_clear_line(main, capsys) -> None:
    assert main(["evaluation", "--images", "0"]) == 1
    assert capsys.readouterr().err.startswith("error: --images 0: ")

"""tools/kill_points.py: what it counts as a difference, and a short run of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/kill_points.py"

if not hasattr(os, "fork"):
    pytest.skip("forks its trainings", allow_module_level=True)

# ruff: noqa: E402
import kill_points


def write_run(folder: Path, change: Callable[[dict[str, Any], list[dict]], Any]) -> Path:
    """A finished run, or one that has come out otherwise."""
    folder.mkdir()
    state = {"model": {"w": torch.ones(3)}, "trainer": {"rates": [0.1, 0.2], "best": float("nan")}}
    rows = [{"iteration": i, "loss": 1.0 / (1 + i), "iou": float("nan")} for i in range(2)]
    change(state, rows)
    for name in ("model_final", "model_best", "model_inference"):
        torch.save(state, folder / f"{name}.pth")
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


CHANGES = {
    "a weight in its last bit": (
        lambda state, rows: state["model"]["w"][1:2].view(torch.int32).add_(1),
        "model_final.pth/model/w",
    ),
    "its type": (
        lambda state, rows: state["model"].update(w=torch.ones(3, dtype=torch.float64)),
        "model_best.pth/model/w",
    ),
    "a number of the state": (
        lambda state, rows: state["trainer"]["rates"].__setitem__(1, 0.3),
        "model_inference.pth/trainer/rates/1",
    ),
    "an entry more": (lambda state, rows: state.update(more=1), "model_final.pth/more"),
    "a metric": (lambda state, rows: rows[1].update(loss=0.51), "metrics.json: "),
    "a row more": (lambda state, rows: rows.append(rows[1]), "metrics.json: 2 and 3 rows"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_difference_is_found(change: str, tmp_path: Path) -> None:
    do, expected = CHANGES[change]
    whole = write_run(tmp_path / "whole", lambda state, rows: None)
    other = write_run(tmp_path / "other", do)
    found = kill_points.differences(whole, other)
    assert any(line.startswith(expected) for line in found)


def test_equal_runs_differ_in_times_alone(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", lambda state, rows: rows[0].update(time=1.0))
    other = write_run(tmp_path / "other", lambda state, rows: rows[0].update(time=2.0))
    assert kill_points.differences(whole, other) == []


@pytest.mark.slow
def test_a_run_is_killed_resumed_and_compared(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    output.write_text('{"earlier": {}}')
    result = subprocess.run(
        [sys.executable, TOOL, "--points", "2", "--cases", "pixel_memory", "--output", output],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "pixel_memory: 2 kills in " in result.stdout
    assert "0 differences, 0 failures" in result.stdout
    results = json.loads(output.read_text())
    assert list(results) == ["earlier", "pixel_memory"]
    kills = results["pixel_memory"]["kills"]
    assert [kill["kind"] for kill in kills] == ["time", "write"]
    assert kills[0]["iteration"] <= kills[1]["iteration"]

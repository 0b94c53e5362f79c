"""tools/benchmark.py dashboard: what is timed, and what a baseline is told."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"
DEMO = [str(ROOT / f"configs/shapes/semfpn_r18_{name}_demo.py") for name in ("base", "ms_cs")]

pytest.importorskip("pytorch_metric_learning", reason="the benchmark's peer: install .[bench]")

# ruff: noqa: E402
from bench import dashboard


def test_steps_and_pictures_are_timed(main, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "found.json"
    looks = (float(n * n) for n in itertools.count())  # 0, 1; 4, 9; 16, 25
    clock = SimpleNamespace(process_time=lambda: next(looks), perf_counter=lambda: 0.0)
    monkeypatch.setattr(dashboard, "time", clock)
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    assert (
        main(["dashboard", DEMO[1], "--repeats", "1", "--device", "cpu", "--output", str(output)])
        == 0
    )
    found = json.loads(output.read_text())
    row = found["dashboards"]["semfpn_r18_ms_cs_demo"]
    times = {kind: values["median"] for kind, values in row["ms"].items()}
    assert times == {"plain": 1000, "inspected": 5000, "shown": 9000}
    assert row["event_kb"] > 50 and row["rounds"] == 1
    assert {"command", "commit", "date", "machine", "versions"} <= set(found)


def test_a_baseline_has_no_dashboard(main, capsys) -> None:
    assert main(["dashboard", DEMO[0], "--repeats", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "a baseline has no dashboard" in error
    assert error.count("\n") == 1

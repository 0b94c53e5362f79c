"""Comparing variants over seeds, and the tool that does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import LazyConfig
from omegaconf import OmegaConf

from contrast_d2.evaluation.summary import summarize_runs, summary_table

ROOT = Path(__file__).parents[2]


def write_run(
    folder: Path, seed: int, miou: float, *, dataset: str = "d_val", last: int = 4
) -> Path:
    folder.mkdir(parents=True)
    config = {
        "train": {"seed": seed, "max_iter": 4},
        "model": {"contrast": None},
        "dataloader": {"test": {"dataset": dataset}},
    }
    LazyConfig.save(OmegaConf.create(config), str(folder / "config.yaml"))
    rows = [
        {"iteration": 1, "loss_sem_seg": 2.0},
        {"iteration": 2, "sem_seg/mIoU": miou / 2},
        {"iteration": last, "sem_seg/mIoU": miou, "sem_seg/IoU-road": float("nan")},
    ]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "run.json").write_text(json.dumps({"commit": f"c{seed}", "command": "python x"}))
    return folder


@pytest.fixture
def variants(tmp_path: Path) -> dict[str, list[Path]]:
    return {
        "base": [write_run(tmp_path / "b0", 0, 40.0), write_run(tmp_path / "b1", 1, 42.0)],
        "ms_cs": [write_run(tmp_path / "m1", 1, 45.0), write_run(tmp_path / "m0", 0, 41.0)],
    }


def test_variants_are_compared_seed_by_seed(variants: dict[str, list[Path]]) -> None:
    result = summarize_runs(variants)
    base, ms_cs = result["summary"]["base"], result["summary"]["ms_cs"]
    assert base["mean"] == 41.0 and base["std"] == pytest.approx(2**0.5)
    assert ms_cs["differences"] == {1: 3.0, 0: 1.0}
    run = result["runs"]["ms_cs"][0]
    assert (run["seed"], run["commit"], run["dataset"]) == (1, "c1", "d_val")
    assert run["mIoU_by_iteration"] == {2: 22.5, 4: 45.0}
    assert run["loss_sem_seg_by_iteration"] == {1: 2.0}
    assert run["sem_seg"] == {"mIoU": 45.0, "IoU-road": None}
    table = summary_table(result)
    assert "| base | 2 | 41.00 ± 1.41 | reference |" in table
    assert "| ms_cs | 2 | 43.00 ± 2.83 | +3.00, +1.00 |" in table


def test_one_seed_has_no_spread(variants: dict[str, list[Path]]) -> None:
    result = summarize_runs({"base": variants["base"][:1]})
    assert result["summary"]["base"]["std"] is None
    assert "| base | 1 | 40.00 | reference |" in summary_table(result)


def test_what_cannot_be_compared_is_refused(tmp_path: Path, variants) -> None:
    unfinished = write_run(tmp_path / "u", 2, 10.0, last=3)
    with pytest.raises(ValueError, match="u is not finished: .* iteration 4"):
        summarize_runs({"base": [unfinished]})
    other = write_run(tmp_path / "o", 2, 10.0, dataset="other_val")
    with pytest.raises(ValueError, match=r"different datasets: \['d_val', 'other_val'\]"):
        summarize_runs({**variants, "other": [other]})
    with pytest.raises(ValueError, match="two runs of 'base' have the same seed"):
        summarize_runs({"base": [variants["base"][0]] * 2})


@pytest.mark.slow
def test_the_tool_writes_the_file_and_prints_the_table(variants, tmp_path: Path) -> None:
    output = tmp_path / "results" / "x.json"
    runs = [f"{name}={folder}" for name, folders in variants.items() for folder in folders]
    command = [sys.executable, ROOT / "tools/summarize_runs.py", "--output", output]
    done = subprocess.run(
        [*command, *runs], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| ms_cs | 2 | 43.00 ± 2.83 | +3.00, +1.00 |" in done.stdout
    assert json.loads(output.read_text())["summary"]["ms_cs"]["mean"] == 43.0
    done = subprocess.run(
        [*command, f"base={tmp_path / 'none'}"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

"""tools/ablate.py as people run it, with trainings of a small network on the generated shapes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers import running_first

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/ablate.py"
DEFINITION = ROOT / "configs/ablations/shapes.yaml"
SHORT = """\
overrides:
  - dataloader.train.mapper.augmentations.crop_size=[64,64]
  - dataloader.train.total_batch_size=2
  - dataloader.train.num_workers=0
  - dataloader.test.num_workers=0
  - train.log_period=1
  - train.checkpointer.period=4
  - train.eval_period=0
"""


# The training of the second cell kills itself and the tool after its first checkpoint.
DIES_AFTER_A_CHECKPOINT = """
import sys

command = " ".join(sys.orig_argv)
if "train_net.py" in command and "ms_cs_demo" in command:
    import os, signal
    from contrast_d2.engine import Checkpointer

    save = Checkpointer.save

    def save_and_die(*args, **options):
        save(*args, **options)
        os.killpg(0, signal.SIGKILL)

    Checkpointer.save = save_and_die
"""


def short_definition(folder: Path, iterations: int) -> Path:
    """The shapes, with a training that takes seconds."""
    text = DEFINITION.read_text()
    for key in ("max_iter=200", "eval_period=100", "checkpointer.period=50"):
        assert key in text
        text = text.replace(f"  - train.{key}\n", "")
    path = folder / "quick.yaml"
    path.write_text(text.replace("overrides:\n", f"{SHORT}  - train.max_iter={iterations}\n", 1))
    return path


@pytest.fixture(autouse=True)
def tools_on_the_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_mistakes_give_one_line(main, tmp_path: Path, capsys) -> None:
    path = short_definition(tmp_path, 6)
    text = path.read_text()
    for arguments, changed, message in (
        (["--seeds", "4"], text, f"--seeds 4: {path} has 0."),
        (["--variants", "no"], text, f"--variants no: {path} has base, ms_cs."),
        ([], text.replace("seeds:", "sedes:"), f"{path} has an unknown key sedes."),
        ([], text.replace("base_demo", "none"), "quick: variant base: --config-file"),
        # Found by building it.
        ([], text.replace("embed_dim=32", "embed_dim=0"), "variant ms_cs: "),
    ):
        path.write_text(changed)
        outputs = ["--output", str(tmp_path / "out"), "--results", str(tmp_path)]
        assert main([str(path), *outputs, *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_status_trains_nothing(main, tmp_path: Path, capsys) -> None:
    path = short_definition(tmp_path, 6)
    assert main([str(path), "--output", str(tmp_path / "out"), "--status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["missing", "base", "seed", "0"],
        ["missing", "ms_cs", "seed", "0"],
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_ablation_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    path = short_definition(tmp_path, 8)
    arguments = [str(path), "--output", str(tmp_path / "out"), "--results", str(tmp_path / "res")]
    command = [sys.executable, str(TOOL), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first, second = (tmp_path / f"out/quick/{name}_seed0" for name in ("base", "ms_cs"))
    killed = subprocess.run(
        command,
        env=running_first(DIES_AFTER_A_CHECKPOINT, tmp_path / "first", environment),
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    untouched = (first / "metrics.json").stat().st_mtime_ns
    assert [path.name for path in second.glob("model_*.pth")] == ["model_0000003.pth"]
    assert not (tmp_path / "res").exists()

    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "quick: 2 cells, 1 to train" in done.stdout
    assert (first / "metrics.json").stat().st_mtime_ns == untouched
    starts = re.findall(r"Starting training from iteration (\d+)", (second / "log.txt").read_text())
    assert [int(start) > 0 for start in starts] == [False, True]

    result = json.loads((tmp_path / "res/quick.json").read_text())
    assert list(result["summary"]) == ["base", "ms_cs"]
    base, ms_cs = result["runs"]["base"][0], result["runs"]["ms_cs"][0]
    assert (base["iterations"], base["dataset"]) == (8, "shapes_sem_seg_val")
    assert 100 < ms_cs["peak_memory_mib"] < 10_000 and ms_cs["seconds_per_step"] > 0
    rows = result["summary"]
    assert rows["base"]["contrast_parameters"] == 0 < rows["ms_cs"]["contrast_parameters"]
    assert rows["ms_cs"]["parameters"] == (
        rows["base"]["parameters"] + rows["ms_cs"]["contrast_parameters"]
    )
    assert {"command", "commit", "date", "machine", "versions"} <= result.keys()
    assert "| base |" in done.stdout and "difference to base" in done.stdout
    with Image.open(tmp_path / "res/quick.png") as picture:
        assert picture.size[0] > 800
    assert "<h1>Generated shapes" in (tmp_path / "out/quick/report.html").read_text()

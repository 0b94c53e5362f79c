"""Planning cells, finding what there is of them, and training them, by a stand-in."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from contrast_d2.engine import load_config
from contrast_d2.studio.ablation import (
    Ablation,
    Cell,
    Variant,
    examine,
    plan_cells,
    read_definition,
    train_cells,
)

from .stand_in import ITERATIONS

STAND_IN = Path(__file__).with_name("stand_in.py")
ROOT = Path(__file__).parents[3]
DEFINITIONS = sorted((ROOT / "configs/ablations").glob("*.yaml"))


def load(path: str, overrides: Sequence[str]) -> OmegaConf:
    """A config whose learning rate is the name of its file."""
    config = {
        "train": {"max_iter": ITERATIONS, "seed": 0, "output_dir": "x"},
        "optimizer": {"lr": path},
        "dataloader": {"test": {"dataset": "d_val"}},
    }
    return OmegaConf.merge(config, OmegaConf.from_dotlist([o.replace("'", "") for o in overrides]))


def plan(root: Path, *names: str, ablation: str = "a", seeds: tuple[int, ...] = (0,)) -> list[Cell]:
    variants = tuple(Variant(name, name, (), "") for name in names)
    cells = plan_cells(Ablation(ablation, "", "", seeds, variants), root, load)
    # Where the stand-in finds the config that it has to leave.
    prepared = []
    for cell in cells:
        path = root / f"{cell.variant}{cell.seed}.yaml"
        path.parent.mkdir(exist_ok=True)
        config = {**cell.config, "train": {**cell.config["train"], "output_dir": "anywhere"}}
        path.write_text(yaml.safe_dump(config))
        prepared.append(cell._replace(config_file=str(path)))
    return prepared


def train(cells: Sequence[Cell], **options) -> tuple[list[str], list[str]]:
    """Names of the cells that failed, and what was said."""
    lines: list[str] = []
    options = {"progress": lambda _, line: lines.append(line) if line else None, **options}
    failures = train_cells(cells, STAND_IN, **options)
    return [f"{failure.cell.name}: {failure.reason}" for failure in failures], lines


def states(cells: Sequence[Cell]) -> list[str]:
    return [found.state for found in examine(cells)]


@pytest.mark.parametrize("path", DEFINITIONS, ids=lambda path: path.stem)
def test_the_definitions_that_come_with_it(path: Path, tmp_path: Path) -> None:
    ablation = read_definition(path)
    cells = plan_cells(ablation._replace(seeds=(1,)), tmp_path, load_config)
    assert [cell.variant for cell in cells] == [variant.name for variant in ablation.variants]
    assert {cell.iterations for cell in cells} == {
        6000 if "6k" in path.stem else 200 if path.stem == "shapes" else 1500
    }
    assert {cell.config["train"]["seed"] for cell in cells} == {1}
    # No two variants are the same.
    assert len({json.dumps(cell.config, sort_keys=True) for cell in cells}) == len(cells)


def test_the_scales_of_table_1a() -> None:
    path = ROOT / "configs/ablations/camvid_table1a_cpu.yaml"
    found = {}
    for variant in read_definition(path).variants:
        contrast = load_config(variant.config, variant.overrides).model.contrast
        weights = {} if contrast is None else dict(contrast.scale_weights)
        pairs = [] if contrast is None else [tuple(row[:2]) for row in contrast.cross_scale]
        found[variant.name] = ({name for name, weight in weights.items() if weight}, pairs)
    scales = {"res2", "res3", "res4", "res5"}
    assert found == {
        "none": (set(), []),
        "one_scale": ({"res2"}, []),
        "multi_scale": (scales, []),
        "one_pair": (scales, [("res2", "res5")]),
        "two_pairs": (scales, [("res2", "res5"), ("res2", "res4")]),
    }


def test_mistakes_are_told_with_the_variant(tmp_path: Path) -> None:
    good = Variant("good", "configs/shapes/semfpn_r18_base_demo.py", (), "")
    camvid = Variant("camvid", "configs/camvid/semfpn_r18_base_cpu.py", (), "")
    for bad, message in (
        (good._replace(config="none.py"), "variant bad: --config-file none.py: there is no such"),
        (good._replace(overrides=("optimizer.lrr=1",)), "variant bad: unknown key|unknown config"),
        (camvid, "variant good is evaluated on shapes_sem_seg_val, bad on camvid_sem_seg_val"),
    ):
        ablation = Ablation("a", "", "", (0,), (good, bad._replace(name="bad")))
        with pytest.raises(ValueError, match=message):
            plan_cells(ablation, tmp_path, load_config)


def test_cells_are_trained_seed_by_seed_and_not_twice(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WAIT", "0.7")
    cells = plan(tmp_path, "p", "q", seeds=(0, 5))
    assert [cell.name for cell in cells] == ["p seed 0", "q seed 0", "p seed 5", "q seed 5"]
    assert cells[3].folder == tmp_path / "a/q_seed5"
    assert states(cells) == ["missing"] * 4
    failed, lines = train(cells[:3])
    assert failed == []
    assert lines[:3] == ["p seed 0: training", "p seed 0: finished", "q seed 0: training"]
    assert states(cells) == ["finished"] * 3 + ["missing"]
    usage = json.loads((cells[0].folder / "resources.json").read_text())
    assert 3 < usage["peak_host_mib"] < 100  # and not this process'


def test_a_failed_cell_is_reported_and_the_others_go_on(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FAIL", "p_seed0")
    monkeypatch.setenv("STOP", "q_seed0")
    cells = plan(tmp_path, "p", "q", "r")
    failed, lines = train(cells)
    assert failed == ["p seed 0: no weights", "q seed 0: ended by SIGABRT"]
    assert "p seed 0: failed: no weights" in lines
    assert states(cells) == ["begun", "begun", "finished"]
    # The same call continues where it stopped.
    monkeypatch.setenv("FAIL", "")
    assert train(cells[:2])[0] == []
    assert states(cells) == ["finished"] * 3
    assert (cells[1].folder / "started_at_4").exists()


def test_another_setting_is_found(tmp_path: Path) -> None:
    (cell,) = plan(tmp_path, "p")
    train([cell])
    train_part = {**cell.config["train"], "seed": 1, "ema_decay": 0.9}
    changed = cell._replace(config={**cell.config, "train": train_part})
    (found,) = examine([changed])
    assert found.state == "changed" and found.folder == cell.folder
    assert found.differences == (
        "train.seed: 0, asked for 1",
        "train.ema_decay: absent, asked for 0.9",
    )
    (found,) = examine([changed], ["train.ema", "train.seed"])
    assert found.differences == ("train.ema_decay: absent, asked for 0.9",)
    assert examine([changed], ["train"])[0].state == "finished"


def test_an_equal_cell_of_another_ablation_is_taken(tmp_path: Path) -> None:
    first = plan(tmp_path, "p", "q")
    train(first)
    second = plan(tmp_path, "q", "z", ablation="b")
    renamed = second[0]._replace(variant="y", folder=tmp_path / "b/y_seed0")
    found = examine([renamed, second[1]])
    assert [what.state for what in found] == ["finished", "missing"]
    assert found[0].folder == first[1].folder
    # One that is not finished is nobody else's.
    (first[1].folder / "metrics.json").write_text('{"iteration": 3, "time": 1.0}\n')
    assert states([renamed]) == ["missing"]


def test_a_config_that_a_kill_has_torn_is_trained_again(tmp_path: Path) -> None:
    (cell,) = plan(tmp_path, "p")
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text("train: {seed: [")
    assert states([cell]) == ["begun"]


def test_cells_side_by_side(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WAIT", "1.0")
    cells = plan(tmp_path, "p", "q", "r")
    _, lines = train(cells, parallel=3)
    assert lines[:3] == [f"{cell.name}: training" for cell in cells]
    with pytest.raises(ValueError, match="--parallel 0"):
        train(cells, parallel=0)


def test_what_another_process_trains_is_left_to_it(tmp_path: Path) -> None:
    cells = plan(tmp_path, "p", "q")
    cells[0].folder.parent.mkdir()
    with cells[0].beside(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train(cells) == (
            [],
            ["p seed 0: another process trains it", "q seed 0: training", "q seed 0: finished"],
        )
    assert states(cells) == ["missing", "finished"]


@pytest.mark.slow
def test_the_lock_outlives_the_process_that_started_a_training(tmp_path: Path) -> None:
    (cell,) = plan(tmp_path, "p")
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.studio.ablation.test_cells import plan, train\n"
        "train(plan(Path(sys.argv[1]), 'p'))"
    )
    environment = {**os.environ, "WAIT": "6", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    while not (cell.folder / "started_at_0").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train([cell])[1] == ["p seed 0: another process trains it"]
    while not states([cell]) == ["finished"]:
        time.sleep(0.1)


def test_an_interrupt_ends_the_trainings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WAIT", "600")
    cells = plan(tmp_path, "p", "q")

    def terminate(_, line: str) -> None:
        if line == "q seed 0: training":
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(cells, parallel=2, progress=terminate)
    assert signal.getsignal(signal.SIGTERM) is before
    # Both ended: their locks can be had.
    monkeypatch.setenv("WAIT", "0")
    assert train(cells)[0] == []

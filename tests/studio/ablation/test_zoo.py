"""MODEL_ZOO.md says what results say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from contrast_d2.evaluation.summary import summarize_runs
from contrast_d2.studio.ablation import model_zoo
from tests.evaluation.test_summary import write_run

ROOT = Path(__file__).parents[3]
DEFINITION = """\
title: two of them
baseline: base
seeds: [0, 1]
source: Table 9, of another network
variants:
  base: {config: configs/b.py, published: "70.1"}
  ms_cs: {config: configs/m.py, overrides: [a.b=1]}
  later: {config: configs/l.py, published: "72.0"}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with an ablation that is measured in part, and a comparison without one."""
    runs = {
        "base": [write_run(tmp_path / "b0", 0, 40.0), write_run(tmp_path / "b1", 1, 42.0)],
        "ms_cs": [write_run(tmp_path / "m0", 0, 41.0), write_run(tmp_path / "m1", 1, 45.0)],
    }
    for folder in (tmp_path / "configs/ablations", tmp_path / "results"):
        folder.mkdir(parents=True)
    (tmp_path / "configs/ablations/two.yaml").write_text(DEFINITION)
    (tmp_path / "configs/ablations/no.yaml").write_text(DEFINITION.replace("two of", "none of"))
    result = summarize_runs(runs)
    for run in [run for group in result["runs"].values() for run in group]:
        run["device"] = "abacus"
        run["command"] = (
            "python train_net.py --config-file configs/x.py c.d=2 train.seed=0 train.output_dir=o"
        )
    for name in ("two", "other"):
        (tmp_path / f"results/{name}.json").write_text(json.dumps(result))
    (tmp_path / "results/speed.json").write_text('{"command": "x", "runs": []}')
    return tmp_path


def section(text: str, heading: str) -> str:
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_ours_and_the_papers_have_columns_of_their_own(root: Path) -> None:
    found = section(model_zoo(root), "Two of them").splitlines()
    assert "`python tools/ablate.py configs/ablations/two.yaml`" in found
    assert "Published: Table 9, of another network." in found
    assert (
        "Measured on d_val: 4 iterations, abacus, commits c0, c1; every run with its command in "
        "[`two.json`](results/two.json)."
    ) in found
    assert found[-5:] == [
        "| variant | trained with | ours, mIoU | seeds | difference to base | published |",
        "| --- | --- | --- | --- | --- | --- |",
        "| base | [`b.py`](configs/b.py) | 41.00 ± 1.41 | 2 |  | 70.1 |",
        "| ms_cs | [`m.py`](configs/m.py) `a.b=1` | 43.00 ± 2.83 | 2 | +2.00 [+1.00, +3.00] |  |",
        "| later | [`l.py`](configs/l.py) | not measured |  |  | 72.0 |",
    ]


def test_what_was_never_run_comes_after_what_was(root: Path) -> None:
    text = model_zoo(root)
    assert text.index("## Two of them") < text.index("## None of them") < text.index("## `other")
    lines = section(text, "None of them").splitlines()
    assert "| ms_cs | [`m.py`](configs/m.py) `a.b=1` | not measured |  |" in lines
    assert not any("Measured on" in line for line in lines)


def test_results_without_a_definition_are_told_by_their_commands(root: Path) -> None:
    found = section(model_zoo(root), "`other.json`")
    assert "| base | [`x.py`](configs/x.py) `c.d=2` | 41.00 ± 1.41 | 2 |  |" in found
    assert "published" not in found and "ablate.py" not in found


def test_the_document_is_up_to_date(tmp_path: Path) -> None:
    written = (ROOT / "MODEL_ZOO.md").read_text()
    assert written == model_zoo(ROOT), "run python tools/model_zoo.py"
    # It is what results are, not what they were when this test was written.
    for name in ("results", "configs/ablations"):
        shutil.copytree(ROOT / name, tmp_path / name)
    assert model_zoo(tmp_path) == written
    path = tmp_path / "results/camvid_methods.json"
    path.write_text(path.read_text().replace('"mean": 33.43', '"mean": 33.53'))
    assert written != model_zoo(tmp_path)


def test_the_files_that_it_names_are_there() -> None:
    names = re.findall(r"\]\(([\w./]+)\)", (ROOT / "MODEL_ZOO.md").read_text())
    assert len(set(names)) > 15
    assert [name for name in set(names) if not (ROOT / name).exists()] == []

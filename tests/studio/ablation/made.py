"""Made-up runs of an ablation, and the page of one."""

from __future__ import annotations

import json
from pathlib import Path

from contrast_d2.studio.ablation import Ablation, Variant, collect_results, write_page
from tests.evaluation.test_summary import write_run

ABLATION = Ablation(
    "a",
    "Two <b>of</b> them",
    "Table 9: another network",
    (0, 1, 2),
    (Variant("base", "b.py", (), "70.1"), Variant("ms_cs", "m.py", (), ""))
    + (Variant("later", "l.py", (), "72.0"),),
)
PARAMETERS = {"base": (11_000_000, 0), "ms_cs": (12_500_000, 1_500_000), "later": (1, 0)}
SCORES = {"base": [40.0, 42.0, 41.0], "ms_cs": [44.0, 43.0, 45.5]}


def timed_run(folder: Path, seed: int, miou: float, *, ms: float, mib: float, gpu: bool) -> Path:
    """A run with steps of so many ms, its first one slow, and so much memory."""
    write_run(folder, seed, miou)
    with (folder / "metrics.json").open("a") as file:
        for i, seconds in enumerate((9.0, ms / 1000, ms / 1000)):
            file.write(json.dumps({"iteration": i, "time": seconds}) + "\n")
    (folder / "resources.json").write_text(json.dumps({"peak_host_mib": mib}))
    if gpu:
        lines = "eta: 0:01  max_mem: 1100M\n", f"eta: 0:00  max_mem: {mib:.0f}M\n", "max_mem: 9M\n"
        (folder / "log.txt").write_text("".join(lines))
    return folder


def made_folders(root: Path) -> dict[str, list[Path]]:
    """Three runs of each of two variants."""
    return {
        name: [
            timed_run(
                root / f"{name}{seed}",
                seed,
                miou,
                ms=100.0 if name == "base" else 150.0,
                mib=2000.0 + seed,
                gpu=name == "base",
            )
            for seed, miou in enumerate(scores)
        ]
        for name, scores in SCORES.items()
    }


def made_page(path: Path) -> None:
    """The page of these runs, one of which has a long command."""
    result = collect_results(ABLATION, made_folders(path.parent), PARAMETERS)
    result["runs"]["ms_cs"][0]["command"] = "python <script>throw 1</script>" + " a.b=c" * 60
    write_page(path, result)

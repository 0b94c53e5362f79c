"""`MODEL_ZOO.md`: what has been trained, beside what papers have published."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .definition import Ablation, Variant, read_definition
from .results import difference_cell, markdown, mean_cell, number_cell

_HEAD = """\
# Model zoo

Written by `python tools/model_zoo.py` from [`results/`](results/README.md) and
`configs/ablations/`; change those, and run it again.

## How to read it

- **Ours** is the mIoU on the validation set in percent: mean and standard deviation over seeds,
  whole images, one scale, after the last iteration. *Not measured* means that nobody has run it
  yet; nothing here is estimated.
- **Differences** are between runs of equal seeds, so that what a seed does to both drops out. In
  brackets: 95% of the percentile bootstrap of their mean. With two or three seeds that is just
  their range, with one there is none. An interval that holds 0 says that these seeds show no
  difference.
- **Published** is what a paper reports for the same row of its table, with another network, other
  data or another schedule, as the line above the table says. Compare it with its own column only:
  its steps from row to row are of interest, its level is not.
- **ms_cs** and all other files with `ms_cs` in their names are ours: the paper's sampling with at
  least 32 anchors of each class. `ms_cs_paper` is without that floor, `ms_cs_release` the official
  code. **pixel** and **pixel_memory** have the paper's anchors, all pairs, and the official code's
  weight.
- Runs **on a CPU** are 1,500 iterations of a small network from scratch, on small crops. They are
  far from converged and speak of early training. Those on a GPU are the ones to rely on, where
  they are measured.
- Times are not here, since these runs shared their machines: [docs/methods.md](docs/methods.md) and
  [docs/performance.md](docs/performance.md) have times taken for that purpose, with the conditions
  of each.
- There are no weights to download. A row is trained by `python train_net.py --config-file FILE
  OVERRIDES train.seed=SEED`, a whole table by the command under its heading, which continues where
  it was stopped; with `--results output/results` it leaves the numbers here as they are.

Experiment files of the papers' own networks and schedules, with the published numbers:
[docs/reproducing.md](docs/reproducing.md).
"""


def model_zoo(root: Path) -> str:
    """The whole document.

    Args:
        root: of the repository.

    Raises:
        ValueError: a definition or a file of results cannot be read.
    """
    return "\n".join([_HEAD, *_sections(root)])


def _sections(root: Path) -> Iterator[str]:
    definitions = [read_definition(path) for path in sorted(root.glob("configs/ablations/*.yaml"))]
    results = {path.stem: result for path in root.glob("results/*.json") if (result := _runs(path))}
    # What is measured comes first; a definition on generated data is a first try of the tool.
    for measured in (True, False):
        for ablation in definitions:
            result = results.get(ablation.name)
            if (result is not None) == measured and ablation.name != "shapes":
                yield from _section(ablation, result)
    names = {ablation.name for ablation in definitions}
    for name in sorted(results.keys() - names):
        yield from _section(_as_run(name, results[name]), results[name])


def _runs(path: Path) -> dict[str, Any] | None:
    """A file of `summarize_runs`; None for one of other measurements."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if "runs" in content and "summary" in content else None


def _as_run(name: str, result: Mapping[str, Any]) -> Ablation:
    """A comparison without definition, as the commands of its runs tell it."""
    variants = tuple(
        Variant(variant, *_trained_with(group[0]["command"]), "")
        for variant, group in result["runs"].items()
    )
    seeds = {run["seed"] for group in result["runs"].values() for run in group}
    return Ablation(name, f"`{name}.json`", "", tuple(sorted(seeds)), variants)


def _trained_with(command: str) -> tuple[str, tuple[str, ...]]:
    words = shlex.split(command)
    own = ("train.seed=", "train.output_dir=")
    rest = words[words.index("--config-file") + 2 :]
    overrides = [word for word in rest if "=" in word and not word.startswith(own)]
    return words[words.index("--config-file") + 1], tuple(overrides)


def _section(ablation: Ablation, result: Mapping[str, Any] | None) -> Iterator[str]:
    title = re.sub(r"^\w", lambda first: first[0].upper(), ablation.title)
    yield f"## {title}\n"
    if not ablation.title.startswith("`"):
        yield f"`python tools/ablate.py configs/ablations/{ablation.name}.yaml`\n"
    if result is not None:
        yield f"{_provenance(ablation.name, result)}\n"
    if ablation.source:
        yield f"Published: {ablation.source}.\n"
    yield f"{markdown(_rows(ablation, result))}\n"


def _provenance(name: str, result: Mapping[str, Any]) -> str:
    runs = [run for group in result["runs"].values() for run in group]
    iterations = ", ".join(f"{count:,}" for count in sorted({run["iterations"] for run in runs}))
    devices = ", ".join(sorted({run["device"] for run in runs}))
    commits = sorted({str(run["commit"])[:7] for run in runs})
    of_commits = f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"
    return (
        f"Measured on {result['dataset']}: {iterations} iterations, {devices}, "
        f"{of_commits}; every run with its command in [`{name}.json`](results/{name}.json)."
    )


def _rows(ablation: Ablation, result: Mapping[str, Any] | None) -> list[list[str]]:
    summary = {} if result is None else result["summary"]
    found = [summary.get(variant.name) for variant in ablation.variants]
    columns = {
        "variant": [variant.name for variant in ablation.variants],
        "trained with": [_settings(variant) for variant in ablation.variants],
        "ours, mIoU": ["not measured" if row is None else mean_cell(row) for row in found],
        "seeds": ["" if row is None else str(len(row["mIoU"])) for row in found],
        f"difference to {ablation.baseline}": [row and difference_cell(row) or "" for row in found],
        "peak memory, MiB": [row and number_cell(row, "peak_memory_mib") or "" for row in found],
        "published": [variant.published for variant in ablation.variants],
    }
    known = {name: cells for name, cells in columns.items() if any(cells)}
    return [list(known), *map(list, zip(*known.values(), strict=True))]


def _settings(variant: Variant) -> str:
    file = f"[`{Path(variant.config).name}`]({variant.config})"
    return " ".join([file, *(f"`{override}`" for override in variant.overrides)])

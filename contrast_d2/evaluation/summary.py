"""Comparing variants over seeds, from the folders of their runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .metrics import finite_scores
from .runs import last_scores, read_config, read_metrics

_METRIC = "mIoU"


def summarize_runs(variants: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Collects the scores of several runs per variant, and compares the variants seed by seed.

    Args:
        variants: folders of the runs by variant; the first variant is the reference.

    Returns:
        A tree for JSON: "runs" by variant (seed, command, commit, machine, scores in percent, mIoU
        and losses by iteration), and a "summary" by variant: mean and standard deviation of the
        mIoU over seeds, and the differences to the reference on the same seed.

    Raises:
        ValueError: a run is unfinished or unreadable, a seed occurs twice, or the runs were
            evaluated on different datasets.
    """
    runs = {name: [_read_run(folder) for folder in folders] for name, folders in variants.items()}
    datasets = {run["dataset"] for group in runs.values() for run in group}
    if len(datasets) != 1:
        raise ValueError(f"the runs were evaluated on different datasets: {sorted(datasets)}.")
    by_seed: dict[str, dict[int, float]] = {}
    for name, group in runs.items():
        by_seed[name] = {run["seed"]: run["sem_seg"][_METRIC] for run in group}
        if len(by_seed[name]) != len(group):
            raise ValueError(f"two runs of {name!r} have the same seed: name each run once.")
    reference = next(iter(by_seed.values()))
    summary = {name: _compare(scores, reference) for name, scores in by_seed.items()}
    return {"dataset": datasets.pop(), "summary": summary, "runs": runs}


def summary_table(result: Mapping[str, Any]) -> str:
    """The summary as a Markdown table.

    Args:
        result: of `summarize_runs`.
    """
    lines = [
        f"| variant | seeds | mIoU on {result['dataset']} | difference, seed by seed |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in result["summary"].items():
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        differences = ", ".join(f"{d:+.2f}" for d in row["differences"].values())
        reference = name == next(iter(result["summary"]))
        lines.append(
            f"| {name} | {len(row['mIoU'])} | {row['mean']:.2f}{spread} "
            f"| {'reference' if reference else differences} |"
        )
    return "\n".join(lines)


def _read_run(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    metrics = read_metrics(folder / "metrics.json")
    if config.train.max_iter not in metrics:
        raise ValueError(
            f"{folder} is not finished: it has no evaluation at iteration {config.train.max_iter}. "
            "Continue it with --resume."
        )
    scores = last_scores(folder, metrics)
    assert scores is not None, "a finished run was evaluated"
    note = folder / "run.json"
    return {
        **(json.loads(note.read_text()) if note.is_file() else {}),
        "seed": config.train.seed,
        "iterations": config.train.max_iter,
        "dataset": scores.dataset,
        "sem_seg": finite_scores(scores.scores),
        "mIoU_by_iteration": _series(metrics, "sem_seg/mIoU"),
        "loss_sem_seg_by_iteration": _series(metrics, "loss_sem_seg"),
    }


def _series(metrics: Mapping[int, Mapping[str, float]], name: str) -> dict[int, float]:
    return {i: round(row[name], 4) for i, row in metrics.items() if name in row}


def _compare(scores: Mapping[int, float], reference: Mapping[int, float]) -> dict[str, Any]:
    values = list(scores.values())
    return {
        "mIoU": dict(scores),
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "differences": {s: v - reference[s] for s, v in scores.items() if s in reference},
    }

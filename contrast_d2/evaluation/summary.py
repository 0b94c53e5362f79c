"""Comparing variants over seeds, from the folders of their runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .metrics import finite_scores
from .runs import RunCost, last_scores, read_config, read_metrics, run_cost

_METRIC = "mIoU"
_RESAMPLES = 20_000


def summarize_runs(variants: Mapping[str, Sequence[Path]]) -> dict[str, Any]:
    """Collects the scores of several runs per variant, and compares the variants seed by seed.

    Args:
        variants: folders of the runs by variant; the first variant is the reference.

    Returns:
        A tree for JSON: "runs" by variant (seed, command, commit, machine, scores in percent, mIoU
        and losses by iteration, time and memory), and a "summary" by variant: mean and standard
        deviation of the mIoU over seeds; its differences to the reference on the same seeds, with
        their mean and its bootstrap interval; medians of time and memory over the runs; and
        "extra_time_per_point", by how many percent of the reference's a step is longer for each
        point of mIoU gained, where the interval is above 0.

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
    first = next(iter(by_seed))
    summary: dict[str, dict[str, Any]] = {}
    for name, scores in by_seed.items():
        summary[name] = {**_compare(scores, by_seed[first]), **_costs(runs[name])}
    for name, row in summary.items():
        is_other = name != first and row["differences"]
        row["difference"] = mean_difference(list(row["differences"].values())) if is_other else None
        row["extra_time_per_point"] = _extra_time_per_point(row, summary[first])
    return {"dataset": datasets.pop(), "summary": summary, "runs": runs}


def mean_difference(differences: Sequence[float]) -> dict[str, float | None]:
    """The mean of paired differences, with an interval that holds 95% of its bootstrap.

    The percentile bootstrap: means of as many differences, drawn with replacement. With two or
    three the interval is their range, since all draws are of the least in more than 2.5% of the
    cases. With one there is none.

    Args:
        differences: one for each seed, at least one.

    Returns:
        "mean", "low" and "high".
    """
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return {"mean": mean, "low": None, "high": None}
    values = np.asarray(differences)
    draws = np.random.default_rng(0).integers(len(values), size=(_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return {"mean": mean, "low": float(low), "high": float(high)}


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
        **run_cost(folder, metrics)._asdict(),
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


def _costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    costs: dict[str, float | None] = {}
    for name in RunCost._fields:
        known = [run[name] for run in runs if run[name] is not None]
        costs[name] = statistics.median(known) if known else None
    return costs


def _extra_time_per_point(row: Mapping[str, Any], reference: Mapping[str, Any]) -> float | None:
    gained = row["difference"]
    times = row["seconds_per_step"], reference["seconds_per_step"]
    if gained is None or gained["low"] is None or gained["low"] <= 0 or None in times:
        return None
    return 100 * (times[0] / times[1] - 1) / gained["mean"]

"""The results of an ablation: a tree for JSON, a table and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...evaluation.summary import summarize_runs
from ..visualize import GRID, LINE_COLORS, MUTED, TEXT
from .definition import Ablation

_DOT, _MEAN, _BASELINE = LINE_COLORS[0], LINE_COLORS[1], "#9a9a9a"


def collect_results(
    ablation: Ablation,
    folders: Mapping[str, Sequence[Path]],
    parameters: Mapping[str, tuple[int, int]],
) -> dict[str, Any]:
    """The scores and costs of an ablation's finished cells.

    Args:
        ablation: the definition.
        folders: of the finished runs by variant; variants without any may be absent.
        parameters: by variant, how many numbers are trained, and how many of them are the contrast
            method's.

    Returns:
        What `summarize_runs` gives, with "title", "source", "published" and "parameters" of each
        variant.

    Raises:
        ValueError: the baseline has no finished run, or a run cannot be read.
    """
    finished = {v.name: folders[v.name] for v in ablation.variants if folders.get(v.name)}
    if ablation.baseline not in finished:
        raise ValueError(
            f"{ablation.name}: the baseline {ablation.baseline} has no finished run: nothing can "
            "be compared yet."
        )
    result = summarize_runs(finished)
    for name, row in result["summary"].items():
        row["parameters"], row["contrast_parameters"] = parameters[name]
    published = {v.name: v.published for v in ablation.variants if v.published}
    about = {"title": ablation.title, "source": ablation.source, "published": published}
    return {**about, **result}


def ablation_table(result: Mapping[str, Any]) -> str:
    """Results as a Markdown table, and lines on how to read it.

    Args:
        result: of `collect_results`.
    """
    return "\n".join([markdown(table_rows(result)), "", *reading_notes(result)])


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """The table's cells, its heads first; columns of which nothing is known are left out.

    Args:
        result: of `collect_results`.
    """
    summary, published = result["summary"], result.get("published", {})
    baseline = next(iter(summary))
    columns = {
        "variant": list(summary),
        "mIoU": [mean_cell(row) for row in summary.values()],
        "seeds": [str(len(row["mIoU"])) for row in summary.values()],
        f"difference to {baseline}": [difference_cell(row) for row in summary.values()],
        "ms per step": [number_cell(row, "seconds_per_step", 1000) for row in summary.values()],
        "peak memory, MiB": [number_cell(row, "peak_memory_mib") for row in summary.values()],
        "parameters, M (of the contrast)": [_millions(row) for row in summary.values()],
        "extra time per point": [_extra_time(row) for row in summary.values()],
        "published": [published.get(name, "") for name in summary],
    }
    known = {name: cells for name, cells in columns.items() if any(cells)}
    return [list(known), *map(list, zip(*known.values(), strict=True))]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of its cells, the heads first."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "| " + " | ".join(["---"] * len(rows[0])) + " |", *body])


def reading_notes(result: Mapping[str, Any]) -> list[str]:
    """What a reader of the table has to know, as sentences.

    Args:
        result: of `collect_results`.
    """
    runs = [run for group in result["runs"].values() for run in group]
    seeds = sorted(len(row["mIoU"]) for row in result["summary"].values())
    notes = [
        f"mIoU on {result['dataset']}: mean and standard deviation over seeds, in percent. "
        "Differences are of runs with equal seeds; in brackets what holds 95% of their mean's "
        "percentile bootstrap."
    ]
    if seeds[0] < 5:
        notes.append(
            f"{seeds[0]} {'seed is' if seeds[0] == 1 else 'seeds are'} few: with two or three the "
            "interval is the range of the differences, with one there is none."
        )
    commits = sorted({str(run.get("commit"))[:7] for run in runs})
    iterations = sorted({run["iterations"] for run in runs})
    devices = sorted({str(run.get("device")) for run in runs})
    notes.append(
        f"{', '.join(f'{count:,}' for count in iterations)} iterations on {', '.join(devices)}; "
        f"{'commit' if len(commits) == 1 else 'commits'} {', '.join(commits)}."
    )
    if any(_extra_time(row) for row in result["summary"].values()):
        notes.append(
            "Extra time per point: by how much of the baseline's a step is longer, for each point "
            "of mIoU gained, where the interval is above 0. Times are medians of what runs logged, "
            "on a machine that may have had other work."
        )
    if result.get("published"):
        notes.append(f"Published: {result['source']}. Not to be compared with ours as numbers.")
    return notes


def mean_cell(row: Mapping[str, Any]) -> str:
    """Mean and standard deviation."""
    return f"{row['mean']:.2f}" + ("" if row["std"] is None else f" ± {row['std']:.2f}")


def difference_cell(row: Mapping[str, Any]) -> str:
    """Mean paired difference and its interval."""
    found = row["difference"]
    if found is None:
        return ""
    interval = "" if found["low"] is None else f" [{found['low']:+.2f}, {found['high']:+.2f}]"
    return f"{found['mean']:+.2f}{interval}"


def number_cell(row: Mapping[str, Any], name: str, factor: float = 1.0) -> str:
    """A value of the summary, times a factor; "" where it is not known."""
    return "" if row.get(name) is None else f"{factor * row[name]:,.0f}"


def _millions(row: Mapping[str, Any]) -> str:
    if "parameters" not in row:
        return ""
    contrast = row["contrast_parameters"]
    own = f" ({contrast / 1e6:.2f})" if contrast else ""
    return f"{row['parameters'] / 1e6:.2f}{own}"


def _extra_time(row: Mapping[str, Any]) -> str:
    cost = row["extra_time_per_point"]
    return "" if cost is None else f"{cost:+.1f}%"


def plot_variants(result: Mapping[str, Any]) -> Figure:
    """Every run's mIoU by variant, and the differences to the baseline with their intervals.

    Args:
        result: of `collect_results` or `summarize_runs`.
    """
    summary = result["summary"]
    height = 1.1 + 0.42 * len(summary)
    figure = Figure(figsize=(9.0, height), dpi=120, facecolor="white", layout="constrained")
    scores, differences = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(summary))
    for axes, title in ((scores, "mIoU (%)"), (differences, "difference to the baseline (points)")):
        _style(axes, title)
    for y, row in zip(rows, summary.values(), strict=True):
        scores.plot(list(row["mIoU"].values()), [y] * len(row["mIoU"]), "o", color=_DOT, alpha=0.6)
        scores.plot([row["mean"]], [y], "|", color=_MEAN, markersize=18, markeredgewidth=2)
        found = row["difference"]
        if found is not None:
            paired = list(row["differences"].values())
            differences.plot(paired, [y] * len(paired), "o", color=_DOT, alpha=0.6)
            differences.plot([found["mean"]], [y], "|", color=_MEAN, ms=18, mew=2)
            if found["low"] is not None:
                differences.plot([found["low"], found["high"]], [y, y], color=_MEAN, linewidth=1.5)
    differences.axvline(0.0, color=_BASELINE, linewidth=1.0)
    scores.set(yticks=rows, ylim=(len(rows) - 0.5, -0.5))
    scores.set_yticklabels(list(summary), fontsize=9, color=TEXT)
    caption = "dots: runs, bars: their means, lines: bootstrap intervals of 95%"
    figure.supxlabel(caption, fontsize=8, color=MUTED)
    return figure


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=TEXT)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b5b5b5")
    axes.tick_params(labelsize=8, colors=MUTED)
    axes.tick_params(axis="y", length=0)

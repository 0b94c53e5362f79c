"""An ablation as one HTML file."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..html_page import escape, html_page, png_address, wide, wide_picture
from ..visualize import plot_class_iou
from .results import plot_variants, reading_notes, table_rows

_STYLE = ".runs td:last-child, .runs th:last-child { text-align: left }"
# Where the table is too wide, lines break before an interval and between words, but not between a
# number and its spread or unit.
_IN_A_NUMBER = re.compile(r" (?=[±+-])|(?<=±) |(?<=\d) (?=\w)")


def write_page(path: str | Path, result: Mapping[str, Any]) -> None:
    """Writes table, figure, scores per class and the commands of all runs.

    Args:
        path: of the HTML file.
        result: of `collect_results`.

    Raises:
        OSError: the file cannot be written.
    """
    Path(path).write_text(html_page(result["title"], _body(result), style=_STYLE), encoding="utf-8")


def _body(result: Mapping[str, Any]) -> Iterator[str]:
    head, *body = table_rows(result)
    unbroken = [[_IN_A_NUMBER.sub("\N{NO-BREAK SPACE}", cell) for cell in row] for row in body]
    yield wide(_table([head, *unbroken], "results"))
    yield from (f'<p class="muted">{escape(note)}</p>' for note in reading_notes(result))
    yield _picture(plot_variants(result), "mIoU of each run, and differences to the baseline")
    yield "<h2>Classes</h2><p>Mean over seeds of each variant's intersection over union.</p>"
    yield _picture(plot_class_iou(_class_means(result)), "IoU of each class by variant")
    yield "<h2>Runs</h2>"
    runs = [
        [name, str(run["seed"]), f"{run['sem_seg']['mIoU']:.2f}", run.get("command", "")]
        for name, group in result["runs"].items()
        for run in group
    ]
    yield wide(_table([["variant", "seed", "mIoU", "command"], *runs], "runs"))


def _table(rows: list[list[str]], kind: str) -> str:
    head, *body = rows
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in body)
    body_rows = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<table class="{kind}"><tr>{heads}</tr>{body_rows}</table>'


def _picture(figure: Any, text: str) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return wide_picture(png_address(content.getvalue()), text)


def _class_means(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Mean scores by variant; nan where a class was nowhere in the ground truth."""
    means = {}
    for name, group in result["runs"].items():
        means[name] = {
            score: _mean_of([run["sem_seg"].get(score) for run in group])
            for score in group[0]["sem_seg"]
        }
    return means


def _mean_of(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")

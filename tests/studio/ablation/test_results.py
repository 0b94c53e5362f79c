"""Results of an ablation: differences, costs, table, figure and page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import bootstrap

from contrast_d2.evaluation.summary import mean_difference, summarize_runs
from contrast_d2.studio.ablation import (
    Variant,
    ablation_table,
    collect_results,
    plot_variants,
    write_page,
)
from contrast_d2.studio.ablation.results import table_rows
from tests.evaluation.test_summary import write_run

from .made import ABLATION, PARAMETERS, SCORES, made_folders, timed_run


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, list[Path]]:
    return made_folders(tmp_path)


@pytest.fixture
def result(folders) -> dict:
    return collect_results(ABLATION, folders, PARAMETERS)


@pytest.mark.parametrize("count", [5, 12])
def test_the_interval_is_that_of_scipy(count: int) -> None:
    differences = np.random.default_rng(1).normal(1.0, 2.0, count)
    found = mean_difference(list(differences))
    theirs = bootstrap(
        (differences,), np.mean, n_resamples=50_000, method="percentile", rng=0
    ).confidence_interval
    assert found["mean"] == pytest.approx(differences.mean())
    assert (found["low"], found["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.06)


def test_with_few_seeds_the_interval_is_their_range_or_none() -> None:
    assert mean_difference([1.0, 4.0, 2.5]) == {"mean": 2.5, "low": 1.0, "high": 4.0}
    assert mean_difference([1.0]) == {"mean": 1.0, "low": None, "high": None}


def test_differences_and_costs(result: dict) -> None:
    base, ms_cs = result["summary"]["base"], result["summary"]["ms_cs"]
    assert base["difference"] is None and base["extra_time_per_point"] is None
    # 4, 1 and 4.5 points.
    assert ms_cs["difference"]["mean"] == pytest.approx(9.5 / 3)
    assert (ms_cs["difference"]["low"], ms_cs["difference"]["high"]) == (1.0, 4.5)
    assert (base["seconds_per_step"], ms_cs["seconds_per_step"]) == (0.1, 0.15)
    assert ms_cs["extra_time_per_point"] == pytest.approx(50 / (9.5 / 3))
    # Of the GPU where there is one: the largest that its log has had.
    assert [run["peak_memory_mib"] for run in result["runs"]["base"]] == [2000, 2001, 2002]
    assert ms_cs["peak_memory_mib"] == 2001
    assert (ms_cs["parameters"], ms_cs["contrast_parameters"]) == (12_500_000, 1_500_000)
    assert result["published"] == {"base": "70.1", "later": "72.0"}
    assert list(result["runs"]) == ["base", "ms_cs"]  # one is not there yet


def test_no_points_have_no_price(folders) -> None:
    summary = summarize_runs({"ms_cs": folders["ms_cs"], "base": folders["base"]})["summary"]
    assert summary["base"]["difference"]["mean"] < 0
    assert summary["base"]["extra_time_per_point"] is None


def test_a_point_has_no_price_where_the_interval_holds_0(tmp_path: Path) -> None:
    runs = {
        name: [
            timed_run(tmp_path / f"{name}{i}", i, miou, ms=ms, mib=1.0, gpu=False)
            for i, miou in enumerate(scores)
        ]
        for name, scores, ms in (("base", (40.0, 42.0), 1.0), ("other", (44.0, 41.0), 2.0))
    }
    row = summarize_runs(runs)["summary"]["other"]
    assert row["difference"] == {"mean": 1.5, "low": -1.0, "high": 4.0}
    assert row["extra_time_per_point"] is None
    alone = summarize_runs({name: group[:1] for name, group in runs.items()})["summary"]["other"]
    assert alone["difference"]["mean"] == 4.0 and alone["extra_time_per_point"] is None


def test_the_table(result: dict) -> None:
    table = ablation_table(result)
    row = "| ms_cs | 44.17 ± 1.26 | 3 | +3.17 [+1.00, +4.50] | 150 | 2,001 "
    assert row + "| 12.50 (1.50) | +15.8% |  |" in table
    assert "| base | 41.00 ± 1.00 | 3 |  | 100 | 2,001 | 11.00 |  | 70.1 |" in table
    assert "mIoU on d_val: mean and standard deviation" in table
    assert "3 seeds are few: with two or three the interval is the range" in table
    assert "commits c0, c1, c2." in table
    assert "Published: Table 9: another network." in table


def test_columns_of_which_nothing_is_known_are_left_out(tmp_path: Path) -> None:
    folders = {"base": [write_run(tmp_path / "b", 0, 40.0)]}
    ablation = ABLATION._replace(variants=ABLATION.variants[:1], source="")
    ablation = ablation._replace(variants=(Variant("base", "b.py", (), ""),))
    found = collect_results(ablation, folders, PARAMETERS)
    heads, row = table_rows(found)
    assert heads == ["variant", "mIoU", "seeds", "parameters, M (of the contrast)"]
    assert row == ["base", "40.00", "1", "11.00"]


def test_without_a_baseline_there_is_nothing_to_compare(folders) -> None:
    with pytest.raises(ValueError, match="a: the baseline base has no finished run"):
        collect_results(ABLATION, {"ms_cs": folders["ms_cs"]}, PARAMETERS)


def test_the_figure_draws_every_run_and_every_interval(result: dict) -> None:
    scores, differences = plot_variants(result).axes
    drawn = {tuple(line.get_xdata()) for line in scores.lines}
    assert tuple(SCORES["ms_cs"]) in drawn and tuple(SCORES["base"]) in drawn
    drawn = {tuple(line.get_xdata()) for line in differences.lines}
    assert (4.0, 1.0, 4.5) in drawn and (1.0, 4.5) in drawn
    assert [label.get_text() for label in scores.get_yticklabels()] == ["base", "ms_cs"]


def test_the_page_shows_names_as_they_are(result: dict, tmp_path: Path) -> None:
    for run in result["runs"]["base"]:
        run["command"] = "python <i>x</i>"
    write_page(tmp_path / "report.html", result)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Two &lt;b&gt;of&lt;/b&gt; them</h1>" in page
    assert "python &lt;i&gt;x&lt;/i&gt;" in page
    assert page.count("data:image/png;base64,") == 2


def test_numbers_of_the_page_stay_whole_and_commands_as_they_are(result, tmp_path: Path) -> None:
    result["published"]["ms_cs"] = "71.0 ± 0.2, 7.4 GB"
    result["runs"]["base"][0]["command"] = "python train_net.py --config-file -x a=+1 3 b"
    write_page(tmp_path / "report.html", result)
    # A line may break where a space is.
    page = (tmp_path / "report.html").read_text().replace("\N{NO-BREAK SPACE}", "~")
    assert "<td>44.17~±~1.26</td><td>3</td><td>+3.17 [+1.00,~+4.50]</td>" in page
    assert "<td>71.0~±~0.2, 7.4~GB</td>" in page
    assert "python train_net.py --config-file -x a=+1 3 b" in page

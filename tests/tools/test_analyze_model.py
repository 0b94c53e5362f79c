"""tools/analyze_model.py: its table, its verdict, its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/analyze_model.py"
BASE, METHOD = (
    str(ROOT / f"configs/shapes/semfpn_r18_{name}_demo.py") for name in ("base", "ms_cs")
)


def test_baseline_and_method_cost_the_same_at_test_time(main, tmp_path: Path, capsys) -> None:
    output = tmp_path / "new" / "models.json"
    assert main(["--output", str(output), "--config-file", BASE, METHOD, *SMALL_NETWORK]) == 0
    base, method = json.loads(output.read_text())["models"].values()
    assert base["size"] == method["size"] == [96, 128]
    assert base["inference"] == method["inference"]
    assert base["training_only"] == {} and list(method["training_only"]) == ["contrast"]
    assert base["inference_differences"] is None and method["inference_differences"] == []
    assert (method["backbone"], method["decoder"]) == ("test_resnet", "SemSegFPNDecoder")
    assert method["contrast"] == "MultiScaleContrast" and method["num_classes"] == 9
    text = capsys.readouterr().out
    assert "the same scores bit for bit" in text and "nothing to compare" in text
    contrast = method["training_only"]["contrast"]["parameters"]
    assert f" contrast {contrast / 1e6:.3f} " in " ".join(text.split())


def test_a_difference_is_told_and_fails(main, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        main.__globals__, "inference_differences", lambda *args: ["scores differ by up to 1"]
    )
    assert main(["--size", "32", "64", "--config-file", METHOD, *SMALL_NETWORK]) == 2
    text = capsys.readouterr().out
    assert "with contrast, inference is another: scores differ by up to 1" in text
    assert "an image of 32x64" in text


def test_mistakes_give_one_clear_line(main, tmp_path: Path, capsys) -> None:
    for arguments, message in (
        ([str(tmp_path / "none.py")], "none.py"),
        ([METHOD, "model.contrasts=None"], "model.contrasts"),
        ([METHOD, "--size", "0", "64"], "--size 0 64"),
        ([str(ROOT / "configs/cadis/ocr_r50_base_task2_50ep.py")], "say which with --size"),
    ):
        assert main(["--config-file", *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line

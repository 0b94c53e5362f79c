"""tools/export_model.py: what it writes, what it checks, and what it says of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from torch import nn

from contrast_d2.deploy import export
from contrast_d2.engine import load_config

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/export_model.py"
CONFIG = str(ROOT / "configs/shapes/semfpn_r18_ms_cs_demo.py")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A model with its contrast method, whose weights are not those that a config starts with."""
    torch.manual_seed(1)
    return instantiate(load_config(CONFIG, SMALL_NETWORK).model).eval()


@pytest.fixture
def weights(trained: nn.Module, tmp_path: Path) -> str:
    path = tmp_path / "model_final.pth"
    torch.save({"model": trained.state_dict(), "iteration": 7}, path)
    return str(path)


def arguments(weights: str, output: Path, *more: str) -> list[str]:
    command = ["--config-file", CONFIG, "--weights", weights, "--output", str(output)]
    return [*command, *more, *SMALL_NETWORK]


@pytest.mark.parametrize("kind", ["torch_export", "onnx"])
def test_writes_the_network_of_the_weights(
    kind: str, main, trained: nn.Module, weights: str, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "new" / ("model.onnx" if kind == "onnx" else "model.pt2")
    more = ("--format", kind, "--size", "60", "90", "--check")
    assert main(arguments(weights, output, *more)) == 0
    *checks, written = capsys.readouterr().out.strip().splitlines()
    assert [line.split(":")[0].strip() for line in checks] == [
        f"{count} x 60x90" for count in (1, 2, 3)
    ]
    assert str(output) in written and "60x90" in written

    image = 255 * torch.rand(3, 60, 90)
    if kind == "onnx":
        found = export.onnx_runner(output.read_bytes())(image[None])
    else:
        found = torch.export.load(output).module()(image[None])
    with torch.no_grad():
        expected = trained([{"image": image}])[0]["sem_seg"]
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert [path.name for path in output.parent.iterdir()] == [output.name]


def test_nothing_is_written_that_differs(
    main, weights: str, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = export.Difference((1, 3, 32, 32), largest=1e-2, argmax=0.5)
    monkeypatch.setitem(main.__globals__, "compare", lambda run, model, shapes: [other])
    output = tmp_path / "model.pt2"
    more = ("--format", "torch_export", "--size", "32", "32", "--check")
    assert main(arguments(weights, output, *more)) == 2
    assert capsys.readouterr().err.startswith("error: that is more than rounding explains")
    assert not output.exists()


def test_mistakes_give_one_clear_line(main, weights: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "model.onnx"
    other = tmp_path / "other.pth"
    torch.save({"model": {"backbone.other": torch.zeros(1)}}, other)
    code = tmp_path / "code.pth"
    torch.save({"model": Path(tmp_path)}, code)  # an object, which could be any
    for command, message in (
        (arguments(weights, tmp_path / "model.pt2"), "end in .onnx"),
        (arguments(str(tmp_path / "none.pth"), output), "none.pth: there is no such file"),
        (arguments(str(other), output), "other.pth"),
        (arguments(str(code), output), "it holds objects, which can run code"),
        (arguments(weights, output, "--size", "0", "64"), "size=(0, 64)"),
        ([*arguments(weights, output), "model.backbon.name=x"], "model.backbon.name"),
    ):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert not output.exists()

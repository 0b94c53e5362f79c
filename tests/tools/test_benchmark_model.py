"""tools/benchmark.py model: which steps are measured, what a step does, and their tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"
CPU = torch.device("cpu")
DEMO = [ROOT / f"configs/shapes/semfpn_r18_{name}_demo.py" for name in ("base", "ms_cs")]
BASE, METHOD = (path.stem for path in DEMO)

pytest.importorskip("pytorch_metric_learning", reason="the benchmark's peer: install .[bench]")

# ruff: noqa: E402
from bench import methods, models, scenes, tables, worker


def tiny_step(**changes: Any) -> methods.MethodStep:
    return replace(models.step_of(DEMO, batch=2, size=(64, 96)), **changes)


def test_a_step_is_that_of_the_experiment() -> None:
    step = models.step_of(DEMO)
    assert list(step.files) == [BASE, METHOD]
    assert (step.scene.batch, step.scene.height, step.scene.width) == (8, 96, 128)
    assert step.scene.num_classes == 9
    assert worker.from_json(json.loads(json.dumps(worker.to_json(step)))) == step


def test_labels_have_the_look_of_their_datasets() -> None:
    streets = models.scene_of(19, 2, (256, 512))
    assert streets.object_area == 2000 / 4 and streets.classes_per_image == 13
    labels = scenes.draw_labels(streets)
    assert labels.shape == (2, 256, 512)
    rooms = models.scene_of(150, 1, (512, 512))
    assert rooms.object_area == 2000 and rooms.num_classes == 150
    few = models.scene_of(3, 1, (64, 64))
    assert set(scenes.draw_labels(few).unique().tolist()) <= {0, 1, 2, 255}


def test_ignored_labels_are_those_of_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    config = methods.experiment(str(DEMO[0]))
    config.dataset.ignore_label = 9
    monkeypatch.setattr(methods, "experiment", lambda path: config)
    batch = models.step_of(DEMO, batch=4, size=(64, 96))._batch()
    assert {tuple(x["image"].shape) for x in batch} == {(3, 64, 96)}
    labels = torch.stack([x["sem_seg"] for x in batch])
    assert 9 in labels and labels.max() == 9


def test_a_step_updates_and_tells_what_it_keeps() -> None:
    (run,) = tiny_step().contenders(CPU, [METHOD]).values()
    leaves = run.leaves
    before = [leaf.detach().clone() for leaf in leaves]
    kept = run.settle()
    assert not all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))
    # AdamW has two numbers for each parameter; there are few buffers.
    parameters = sum(leaf.nbytes for leaf in leaves)
    assert 3 * parameters < kept < 3.02 * parameters


def test_precision_is_that_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for precision in methods.PRECISIONS:
        step = tiny_step(precision=precision)
        step_model = step.model(BASE)
        monkeypatch.setattr(methods.MethodStep, "model", lambda self, name, m=step_model: m)
        dtypes = []
        step_model.sem_seg_head.predictor.register_forward_hook(
            lambda module, inputs, output, dtypes=dtypes: dtypes.append(output.dtype)
        )
        (run,) = step.contenders(CPU, [BASE]).values()
        assert run().dtype == torch.float32
        found[precision] = dtypes
        monkeypatch.undo()
    assert found == {"fp32": [torch.float32], "bf16": [torch.bfloat16]}


def test_only_what_shall_be_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    tiny_step().contenders(CPU, [BASE])
    assert compiled == []
    tiny_step(compiled=True).contenders(CPU, [BASE, METHOD])
    assert [model.contrast is not None for model in compiled] == [False, True]


@pytest.mark.slow
def test_the_tool_measures_models(tmp_path: Path) -> None:
    output = tmp_path / "model.json"
    command = [sys.executable, TOOL, "model", *DEMO, "--repeats", "1", "--device", "cpu"]
    command += ["--batch", "1", "--size", "32", "64", "--output", output]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ((name, case),) = json.loads(output.read_text())["cases"].items()
    assert name == BASE and case["scene"]["height"] == 32
    base, method = case["methods"][BASE], case["methods"][METHOD]
    assert base["times_baseline"]["median"] == 1 and method["parameters"] > base["parameters"]
    # Weights, gradients and two numbers of AdamW for each.
    assert base["peak_mib"] > 16 * base["parameters"] / 2**20
    assert method["peak_mib"] > base["peak_mib"]
    table = tables.fill("<!-- model.json: training -->\n<!-- end -->\n", tmp_path)
    ratio = f"{method['peak_mib'] / base['peak_mib']:.3f}"
    assert f"| 1 x 32x64 | fp32, eager | `{BASE}` |" in table
    assert table.splitlines()[-2].endswith(f"| {ratio} |")


def test_mistakes_give_one_clear_line(main, monkeypatch, capsys) -> None:
    monkeypatch.setattr(methods, "multiplies_bf16", lambda device: False)
    base, method = map(str, DEMO)
    camvid = str(ROOT / "configs/camvid/semfpn_r18_ms_cs_6k.py")
    for arguments, message in (
        ((base,), "a method at least"),
        ((base, base), "a method at least"),
        ((method, base), "name the baseline first"),
        ((base, camvid), "[9, 11] classes"),
        ((base, method, "--batch", "0"), "--batch 0"),
        ((base, method, "--precision", "bf16", "--device", "cpu"), "bf16 on cpu: it emulates"),
        ((base, "none.py"), "none.py: there is no such file"),
    ):
        assert main(["model", *arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_the_papers_counts_stand_beside_ours(tmp_path: Path) -> None:
    part = {"parameters": 59_000_000, "flops": 230_000_000_000, "activations": 1}
    small = {"parameters": 1_160_000, "flops": 4_000_000_000, "activations": 1}
    model = {
        "backbone": "swin_tiny_patch4_window7_224.ms_in22k",
        "decoder": "UPerNetDecoder",
        "size": [512, 512],
        "inference": {"backbone": part},
        "training_only": {"contrast": small},
        "inference_differences": [],
    }
    other = {**model, "backbone": None, "training_only": {}, "inference_differences": None}
    worse = {**model, "decoder": "FCNDecoder", "inference_differences": ["graphs differ"]}
    results = {"models": {"ours": model, "base": other, "broken": worse}}
    (tmp_path / "models.json").write_text(json.dumps(results))
    text = tables.fill("<!-- models.json: models -->\n<!-- end -->", tmp_path)
    assert "| `ours` | 59.00 | 60 |  | 1.16 | 512x512 | 230.0 | 4.0 | the same |" in text
    assert "| `base` | 59.00 |  |  |  | 512x512 | 230.0 |  |  |" in text
    assert "| `broken` | 59.00 |  |  | 1.16 | 512x512 | 230.0 | 4.0 | another |" in text

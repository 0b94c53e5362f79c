"""tools/benchmark.py gpu: rehearsed on the CPU; its plan, its promises, and how failures end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"
CPU = torch.device("cpu")

pytest.importorskip("pytorch_metric_learning", reason="the benchmark's peer: install .[bench]")

# ruff: noqa: E402
from bench import gpu, gpu_work
from bench.workloads import OURS, TEXTBOOK


def test_every_measurement_runs(subtests: pytest.Subtests) -> None:
    """One of each kind, in this process; the slow test has all, in theirs."""
    kinds = {}
    for name, function, arguments in gpu.plan(gpu.DRY, [["--version"]]):
        kinds.setdefault(function, (name, arguments))
    kinds.pop(gpu_work.compiled, None)  # tests/contrast/kernels/test_compiled.py
    found: dict[str, Any] = {}
    for function, (name, arguments) in kinds.items():
        with subtests.test(name):
            found[name] = json.loads(json.dumps(gpu_work.call(function, CPU, arguments)))
            assert gpu._lines(name, found[name])[0].startswith(name)
    assert len(found) == 9
    assert found["tests 0"]["status"] == 0
    step = found["step tiny bf16"]
    assert step["launches"] > 8 and step["waits"] == 0 < step["device_ms"]
    errors = found["errors bf16"]
    assert errors["equal"] and errors["too_large"] == []
    assert 0 < errors[OURS]["value"] < errors[TEXTBOOK]["value"]
    loss = found["infonce 96 bf16"][OURS]
    assert 0 < loss["times_limit"] < loss["times_least"]
    assert 0 <= found["model shapes/semfpn_r18_base_demo b2 channels-last"]["idle"] < 1
    if not torch.cuda.is_available():
        assert found["graph"]["why_not"]


def test_the_plan_names_each_measurement_once_and_begins_with_the_promises() -> None:
    names = [name for name, _, _ in gpu.plan(gpu.FULL, gpu.gpu_tests())]
    assert len(set(names)) == len(names)
    assert not {"step cityscapes_b8 bf16", "infonce 9984 bf16", "errors fp32"} - set(names[:8])
    of_kernels = [name.split() for name in names if name.startswith("kernels")]
    assert {(d, a) for _, d, a, *_ in of_kernels} == {
        *(("D256", f"A{a}") for a in (256, 1024, 4096, 9984)),
        *((f"D{d}", "A4096") for d in (64, 128, 512)),
    }
    for name in gpu.FULL.models[0][0]:
        assert (ROOT / f"configs/{name}.py").is_file()
        assert {f"model {name} b{b}{last}" for b in (2, 8) for last in ("", " channels-last")} <= {
            *names
        }
    # What every promise needs is measured.
    found = gpu.promises({"found": {}}, gpu.FULL)
    assert {kept for _, kept, _ in found} == {None}
    for _, _, words in found:
        assert set(words.removeprefix("no ").split(", ")) <= set(names)


def results(**changes: Any) -> dict[str, Any]:
    """Of a GPU that keeps all promises."""
    base, method = (
        f"model cityscapes/fcn_hrnet48_{x}_40k b8 channels-last" for x in gpu._METHODS[:2]
    )
    found: dict[str, Any] = {base: {"ms": 96.0}, method: {"ms": 100.0}}
    for precision in ("bf16", "fp32"):
        for name in gpu.FULL.steps:
            found[f"step {name} {precision}"] = {"launches": 40, "waits": 0, "device_ms": 2.0}
        found[f"errors {precision}"] = {"too_large": [], "equal": True}
    found["infonce 9984 bf16"] = {OURS: {"times_limit": 1.5, "times_least": 3.0}}
    for name, change in changes.items():
        key = {"step": "step ade20k_b16 fp32", "loss": "step cityscapes_b8 bf16"}.get(name, name)
        found[{"method": method}.get(key, key)].update(change)
    return {"found": found}


def test_kept_promises_pass() -> None:
    assert all(kept for _, kept, _ in gpu.promises(results(), gpu.FULL))


@pytest.mark.parametrize(
    ("changes", "broken", "words"),
    [
        ({"step": {"launches": 41}}, ["step ade20k_b16 fp32, launches and waits"], "41 launches"),
        ({"step": {"waits": 1}}, ["step ade20k_b16 fp32, launches and waits"], "1 waits"),
        (
            {"infonce 9984 bf16": {OURS: {"times_limit": 1.6, "times_least": 3.2}}},
            ["InfoNCE near the limit of 16 bits"],
            "1.60 times",
        ),
        ({"loss": {"device_ms": 2.1}}, ["loss alone in a training step"], "2.1% of 2%"),
        ({"method": {"ms": 102.0}}, ["loss and projectors in a training step"], "5.9% of 5%"),
        ({"errors bf16": {"equal": False}}, ["errors bf16, bit-equal runs"], "False"),
        ({"errors fp32": {"too_large": ["x: 1"]}}, ["errors fp32, within bounds"], "x: 1"),
    ],
)
def test_a_broken_promise_fails(changes: dict[str, Any], broken: list[str], words: str) -> None:
    found = [line for line in gpu.promises(results(**changes), gpu.FULL) if not line[1]]
    assert [name for name, _, _ in found] == broken
    assert words in found[0][2]


class Process:
    """In place of a pool of one process, and of `multiprocessing`: an end of time for each call."""

    def __init__(self) -> None:
        self.started = self.ended = 0

    def get_context(self, _: str) -> Process:
        return self

    def Pool(self, number: int) -> Process:
        assert number == 1
        self.started += 1
        return self

    def terminate(self) -> None:
        self.ended += 1

    def apply_async(self, _: Callable, arguments: tuple[Any, ...]) -> Process:
        self.function = arguments[0]
        return self

    def get(self, seconds: float) -> dict[str, Any]:
        return self.function(seconds)


def test_failures_cost_their_own_result_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def takes(seconds: float, error: Exception | None = None) -> Callable:
        def run(most: float) -> dict[str, Any]:
            now[0] += min(seconds, most)
            if seconds > most:
                raise TimeoutError
            if error is not None:
                raise error
            return {"ms": seconds}

        return run

    tasks = [
        ("good", takes(1.0), ()),
        ("broken", takes(1.0, RuntimeError("an illegal memory access")), ()),
        ("hangs", takes(1e9), ()),
        ("after", takes(5.0), ()),
        ("too late", takes(1.0), ()),
    ]
    process, kept, said = Process(), [], []
    monkeypatch.setattr(gpu, "multiprocessing", process)
    monkeypatch.setattr(gpu, "note", lambda device: {})
    monkeypatch.setattr(gpu, "plan", lambda sizes, tests: iter(tasks))
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    found = gpu.measure(
        gpu.DRY, CPU, seconds=166, keep=lambda x: kept.append(json.dumps(x)), say=said.append
    )
    assert found["found"] == {"good": {"ms": 1.0}, "after": {"ms": 5.0}}
    assert found["failed"] == {
        "broken": "RuntimeError: an illegal memory access",
        "hangs": "TimeoutError: ",
    }
    assert found["left_out"] == ["too late"]
    assert (process.started, process.ended) == (3, 3)
    assert len(kept) == 5 and json.loads(kept[0])["found"] == {"good": {"ms": 1.0}}
    assert said[0] == "good  ms 1  (1.0 s)"
    assert said[-1] == "left out, for want of time: too late"


@pytest.mark.slow
def test_a_rehearsal_finds_no_mistake(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, TOOL, "gpu", "--dry-run", "--seconds", "3000", "--output", output]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(output.read_text())
    assert results["failed"] == {} and results["left_out"] == []
    assert list(results["found"]) == [name for name, _, _ in gpu.plan(gpu.DRY, ())]
    verdicts = [line.split()[0] for line in done.stdout.splitlines()]
    assert verdicts.count("PASS") + verdicts.count("FAIL") == len(results["promises"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_rehearsal_is_possible(
    main: Callable[[Sequence[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", "--output", str(tmp_path / "gpu.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: there is no CUDA device: rehearse with --dry-run"

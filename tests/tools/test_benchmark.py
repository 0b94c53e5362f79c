"""tools/benchmark.py and its parts: what is counted, compared, promised and written."""

from __future__ import annotations

import copy
import gc
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contrast_d2.contrast import info_nce

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"
CPU = torch.device("cpu")

pytest.importorskip("pytorch_metric_learning", reason="the benchmark's peer: install .[bench]")

# ruff: noqa: E402
from bench import cases, contrast, growth, machine, peers, scenes, tables, worker
from bench.host_reads import count_host_reads
from bench.training import BASELINE, VARIANTS, TrainingStep
from bench.workloads import OURS, SUPCON, TEXTBOOK, InfoNCE, Step

TINY = cases.TINY_CASES["tiny"].workload
PEAKS = machine.Peaks(fp32=97e9, bf16=200e9, write=19.2e9, copy=10e9)


def unit_rows(number: int, width: int = 8) -> Tensor:
    return F.normalize(torch.randn(number, width), dim=1)


# The limit


def test_limit_of_the_loss_is_three_a_squared_d(subtests: pytest.Subtests) -> None:
    for anchors, ms in [(2048, 33), (4096, 133), (9984, 789)]:
        with subtests.test(anchors=anchors):
            assert 1000 * PEAKS.limit(InfoNCE(anchors).cost()) == pytest.approx(ms, rel=0.02)


def test_limit_against_a_memory_is_one_sided() -> None:
    cost = InfoNCE(100, memory=900, width=64).cost()
    assert cost.flop == 4 * 100 * 1000 * 64


def test_limit_of_a_step_has_all_terms_and_the_dense_gradients(monkeypatch) -> None:
    monkeypatch.setattr(Step, "drawn", lambda self: [990, 704, 410, 325])
    cost = cases.CASES["cityscapes_b8"].workload.cost()
    pairs = 3 * (990**2 + 704**2 + 410**2 + 325**2) + 6 * 990 * (325 + 410)
    assert cost.flop == pairs * 256
    assert cost.written == 8 * 256 * 4 * (128 * 256 + 64 * 128 + 32 * 64 + 16 * 32)
    assert cost.moved == (990 + 704 + 410 + 325) * 256 * 64 + 8 * 43_520
    assert 1000 * PEAKS.limit(machine.Cost(cost.flop, cost.written, 0)) == pytest.approx(
        44, rel=0.04
    )


# The inputs


def test_scenes_draw_about_as_many_anchors_as_the_datasets(subtests: pytest.Subtests) -> None:
    for name in [n for n, case in cases.CASES.items() if case.expected]:
        with subtests.test(name=name):
            case = cases.CASES[name]
            for drawn, expected in zip(case.workload.drawn(), case.expected, strict=True):
                assert drawn == pytest.approx(expected, rel=0.2)


def test_label_maps_are_coherent_long_tailed_and_reproducible() -> None:
    scene = replace(cases.STREET, batch=4)
    labels = scenes.draw_labels(scene)
    assert labels.shape == (4, 512, 1024)
    assert torch.equal(labels, scenes.draw_labels(scene))
    assert not torch.equal(labels, scenes.draw_labels(replace(scene, seed=scene.seed + 1)))
    counts = labels.flatten().bincount(minlength=256)
    assert counts[scene.num_classes : 255].sum() == 0
    assert counts[255] > 0
    counts = counts[: scene.num_classes].sort(descending=True).values
    assert counts[15] > 0
    assert counts[0] > 20 * counts[15]
    # Neighbours nearly always agree: pixels on borders are few.
    assert (labels[:, :, 1:] == labels[:, :, :-1]).float().mean() > 0.98


# The peers


def test_textbook_form_is_the_same_loss(subtests: pytest.Subtests) -> None:
    for count_empty in [False, True]:
        for against_a_set in [False, True]:
            with subtests.test(count_empty=count_empty, against_a_set=against_a_set):
                anchors = unit_rows(40).double().requires_grad_()
                labels = torch.randint(0, 5, (40,))
                labels[0] = 7  # without a positive
                other = (
                    (unit_rows(30).double(), torch.randint(0, 5, (30,))) if against_a_set else ()
                )
                results = []
                for loss in (info_nce, peers.textbook_info_nce):
                    value = loss(
                        anchors, labels, *other, temperature=0.2, count_empty_anchors=count_empty
                    )
                    results.append((value, *torch.autograd.grad(value, anchors)))
                for ours, textbook in zip(*results, strict=True):
                    torch.testing.assert_close(ours, textbook)


def test_memory_peer_contrasts_with_all_of_the_memory_and_the_batch_but_itself() -> None:
    anchors, memory = unit_rows(6), unit_rows(20)
    labels, memory_labels = torch.arange(6) % 3, torch.arange(20) % 3
    peer = peers.CrossBatchMemoryPeer(memory, memory_labels, len(anchors))
    for _ in range(2):  # a second batch takes the place of old samples
        value = peer(anchors, labels)
    everything = torch.cat([memory[6:], anchors, anchors])
    same = labels[:, None] == torch.cat([memory_labels[6:], labels, labels])
    logits = anchors @ everything.T / 0.1
    itself = torch.zeros_like(same)
    itself[:, -6:] = torch.eye(6, dtype=torch.bool)
    log_prob = logits - logits.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
    positive = same & ~itself
    expected = -(log_prob * positive).sum(dim=1) / positive.sum(dim=1)
    torch.testing.assert_close(value, expected.mean())


def test_contenders_of_a_step_compute_the_same_loss_on_the_same_draw() -> None:
    runs = TINY.contenders(CPU, [OURS, TEXTBOOK, SUPCON])
    values = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        values[name] = run().item()
    assert values[OURS] == pytest.approx(values[TEXTBOOK], rel=1e-5)
    assert values[SUPCON] != pytest.approx(values[TEXTBOOK], rel=1e-5)


# Waiting for the device


def repeat(x: Tensor) -> Tensor:
    return x.repeat_interleave(x.detach().abs().long())


def test_host_reads_are_counted(subtests: pytest.Subtests) -> None:
    for run, reads in [
        (lambda x: x.detach().sum().item(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: float(x.detach()[0]) + int(x.detach()[1]), 2),
        (lambda x: 1 if x[0] > 0 else 0, 1),
        (lambda x: x.detach().cpu().numpy(), 1),
        (lambda x: [x.cpu(), x.tolist()], 2),
        (lambda x: x.to("cpu"), 1),
        (lambda x: x.to("cpu", non_blocking=True).tolist(), 0),
        (lambda x: x.to(torch.float64), 0),
        (lambda x: x[x > 0], 1),
        (lambda x: x.clone().index_put_((x > 0,), x[:1].expand(2)), 1),
        (lambda x: x[torch.tensor([0, 1])], 0),
        (lambda x: x.masked_fill(x > 0, 0), 0),
        (lambda x: torch.nonzero(x), 1),
        (lambda x: torch.where(x > 0, x, -x), 0),
        (lambda x: x.unique(), 1),
        (repeat, 1),
        (lambda x: x.repeat_interleave(torch.tensor([1, 2, 3]), output_size=6), 0),
    ]:
        with subtests.test(run=run):
            assert not count_host_reads(partial(run, torch.tensor([-1.0, 2.0, 3.0])), CPU)
            x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True).mul(1)
            assert sum(count_host_reads(partial(run, x), CPU).values()) == reads


def test_host_reads_of_the_backward_pass_are_counted() -> None:
    class Reading(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.sum()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            return torch.full((3,), grad.item())

    x = torch.ones(3, requires_grad=True)
    counts = count_host_reads(lambda: Reading.apply(x).backward(), CPU)
    assert counts == {"_local_scalar_dense": 1}


def test_a_step_never_waits() -> None:
    assert not count_host_reads(TINY.contenders(CPU, [OURS])[OURS], CPU)


# Products of bf16


def test_only_where_bf16_is_multiplied_is_its_peak_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_MATMUL_SIZES", (16, 32))
    monkeypatch.setattr(machine, "_BANDWIDTH_BYTES", 1 << 12)
    found = []
    for multiplies in (False, True):
        monkeypatch.setattr(machine, "multiplies_bf16", lambda device, m=multiplies: m)
        found.append(machine.Probes(CPU).measure())
    without, with_bf16 = found
    assert without.bf16 is None and with_bf16.bf16 > 0
    assert min(without.fp32, without.write, without.copy) > 0
    slow = with_bf16._replace(fp32=0.0)
    assert machine.median_peaks([with_bf16, slow, with_bf16]) == with_bf16
    assert machine.median_peaks([without, without]) == without


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="needs oneDNN on x86",
)
def test_a_processor_without_avx512_emulates_bf16() -> None:
    program = "import bench.machine as m, torch; print(m.multiplies_bf16(torch.device('cpu')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TOOL.parent,
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False\n"


def test_emulated_products_have_no_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_MATMUL_SIZES", (16,))
    monkeypatch.setattr(machine, "multiplies_bf16", lambda device: False)
    monkeypatch.setattr(
        contrast, "peak_mib", lambda work, device: [dict.fromkeys(names, 1.0) for _, names in work]
    )
    found = contrast.measure(["tiny_infonce"], CPU, rounds=1, most_seconds=0, say=lambda line: None)
    contenders = list(found["cases"]["tiny_infonce"]["contenders"])
    assert contenders == [OURS, TEXTBOOK, SUPCON]
    (tmp_path / "cpu.json").write_text(json.dumps(found))
    filled = tables.fill("<!-- cpu.json: machine -->\n<!-- end -->", tmp_path)
    assert " and none in bf16, " in filled


# Time and memory


class Clock:
    """In place of the module `time`; this process has the processor for 60% of it."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return 0.6 * self.now

    def wait(self) -> None:
        self.now += 0.1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(machine, "time", clock)
    return clock


def test_contenders_take_turns(clock: Clock) -> None:
    calls = []

    class Probes:
        def measure(self) -> machine.Peaks:
            assert not gc.isenabled()
            calls.append("peaks")
            return PEAKS

    def run(name: str) -> None:
        calls.append(name)
        clock.wait()

    runs = {name: partial(run, name) for name in "ab"}
    found = machine.interleave(runs, Probes(), CPU, rounds=2, most_seconds=0)
    turn = ["peaks", *4 * ["a"], *4 * ["b"]]
    assert calls == ["a", "b", *turn, *turn]
    assert found.calls == 4
    assert gc.isenabled()
    assert [len(seconds) for seconds in found.seconds.values()] == [2, 2]
    found = machine.interleave(runs, Probes(), CPU, rounds=50, most_seconds=0)
    assert len(found.peaks) == 5


def test_calls_of_a_round_are_as_many_as_the_slowest_contender_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = iter([0.1, 0.9, 0.5, 0.1, 0.2, 0.9, 0.8])

    class Probes:
        def measure(self) -> None:
            pass

    monkeypatch.setattr(machine, "seconds_of", lambda run, device: next(seconds))
    monkeypatch.setattr(machine, "_FEWEST_ROUNDS", 1)
    runs = {"a": lambda: None, "b": lambda: None}
    found = machine.interleave(runs, Probes(), CPU, rounds=1, most_seconds=0)
    # 0.1 and 0.9 s while warming up: two calls of 0.9 s are within 2 s.
    assert found.calls == 2
    assert found.seconds == {"a": [0.1], "b": [0.2]}


def test_a_busy_machine_is_told(clock: Clock) -> None:
    assert machine.warning(machine.Timings({}, 1, [], cpu_share=0.99)) is None

    class Probes:
        def measure(self) -> machine.Peaks:
            return PEAKS

    found = machine.interleave({"a": clock.wait}, Probes(), CPU, rounds=1, most_seconds=0)
    assert "60% of the time" in machine.warning(found)


def test_ratios_are_taken_round_by_round() -> None:
    slow = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert machine.ratios([3 * s for s in slow], slow) == {"median": 3, "p10": 3, "p90": 3}


@pytest.mark.slow
def test_peak_memory_counts_what_was_freed_again_and_no_outputs() -> None:
    # In a process of its own: this one may have so much free memory that it does not grow.
    program = (
        "import torch, bench.worker as w; print(w.resident_growth(lambda: torch.ones(1 << 24)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=TOOL.parent,
        env=os.environ | worker._OWN_PAGES,
        capture_output=True,
        text=True,
        check=True,
    )
    assert 60 < int(result.stdout) / 2**20 < 72
    ((ours, textbook),) = [
        found.values() for found in worker.peak_mib([(InfoNCE(2048), [OURS, TEXTBOOK])], CPU)
    ]
    matrix = 2048**2 * 4 / 2**20
    assert 5 * matrix < textbook < 12 * matrix
    assert -1 < ours < 2.5 * matrix
    # One gradient beside the one that is handed out, although another run left its own before.
    (wide,) = worker.peak_mib([(InfoNCE(256, width=1 << 15), [TEXTBOOK, OURS])], CPU)
    assert 24 < wide[OURS] < 72


def test_exponent_is_that_of_the_large_sizes() -> None:
    sizes = [1, 10, 100, 1000, 10_000]
    assert growth.exponent(sizes, [5 + 5e-3 * s**2 for s in sizes]) == pytest.approx(2, abs=0.1)
    assert growth.exponent(sizes, [2 * s for s in sizes]) == pytest.approx(1)


# Promises


@pytest.fixture
def kept() -> dict[str, Any]:
    """Results that keep all promises."""
    ours = {"times_limit": {"median": 1.0}, "peak_mib": 50.0}
    names = ("cityscapes_b8", "cityscapes_b8_large", "infonce_9984")
    return {
        "machine": {"device": "cpu"},
        "cases": {
            name: {
                "contenders": {OURS: copy.deepcopy(ours)},
                "drawn": list(cases.CASES[name].expected),
            }
            for name in names
        },
        "errors": {
            "torch.float32": {
                OURS: {"value": 2e-7, "gradient": 1e-6},
                TEXTBOOK: {"value": 0.0, "gradient": 1e-6},
            }
        },
    }


def test_kept_promises_give_no_line(kept) -> None:
    assert contrast.violations(kept) == []


@pytest.mark.parametrize(
    "case, path, value, words",
    [
        ("cityscapes_b8", (OURS, "times_limit", "median"), 1.9, "1.90 .*1.8"),
        ("cityscapes_b8_large", (OURS, "times_limit", "median"), 1.6, "1.60 "),
        ("infonce_9984", (OURS, "times_limit", "median"), 1.45, "1.45 .*1.4"),
        ("infonce_9984", (OURS, "peak_mib"), 120.0, "120 MiB.*100"),
    ],
)
def test_a_broken_promise_is_one_line(kept, case: str, path, value, words: str) -> None:
    found = kept["cases"][case]["contenders"]
    for key in path[:-1]:
        found = found[key]
    found[path[-1]] = value
    (line,) = contrast.violations(kept)
    assert line.startswith(f"{case}: ") and re.search(words, line)


def test_too_few_anchors_and_too_large_errors_are_broken_promises(kept) -> None:
    kept["cases"]["cityscapes_b8"]["drawn"][1] = 100
    kept["errors"]["torch.float32"][OURS]["gradient"] = 3e-6
    draws, error = contrast.violations(kept)
    assert "scale 1" in draws and "100" in draws
    assert error.startswith("torch.float32") and "3.0e-06" in error and "2.0e-06" in error


# Projection


def test_variants_of_the_projection_share_one_model() -> None:
    scene = replace(TINY.scene, batch=1)
    step = TrainingStep(scene, whole=True, backbone="resnet18")
    runs = step.contenders(CPU, [BASELINE, *VARIANTS])
    losses = {}
    for name, run in runs.items():
        torch.manual_seed(0)
        losses[name] = run().item()
    baseline = losses.pop(BASELINE)
    assert all(loss > baseline + 0.1 for loss in losses.values())
    # Batch norms of drawn pixels have other statistics than those of whole maps.
    assert losses["sampled, batch"] != pytest.approx(losses["dense"], rel=1e-4)


# The command line


@pytest.mark.slow
def test_the_tool_measures_checks_and_writes(tmp_path) -> None:
    output = tmp_path / "new" / "cpu.json"
    arguments = ["--shapes", "tiny", "tiny_memory", "--repeats", "1", "--check"]
    command = [sys.executable, TOOL, "contrast", *arguments, "--output", output]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert set(results["cases"]) == {"tiny", "tiny_memory"}
    assert set(results["cases"]["tiny_memory"]["contenders"]) == {OURS, SUPCON}
    tiny = results["cases"]["tiny"]
    assert tiny["contenders"][OURS]["times_ours"]["median"] == 1
    # The library is more accurate than the promise, and float32 errors are not those of bf16.
    errors = {dtype: rows[OURS]["gradient"] for dtype, rows in results["errors"].items()}
    assert 0 < errors["torch.float32"] < 1e-5 < errors["torch.bfloat16"] < 1e-1
    if sys.platform == "linux":
        assert results["machine"]["heap"] == "kept"
    assert results["machine"]["threads"] == 1
    assert results["command"].endswith("--check --output " + str(output))
    assert f"anchors drawn: {'/'.join(map(str, tiny['drawn']))}" in done.stdout
    for kind in ("machine", "steps", "losses", "errors"):
        text = f"before\n<!-- cpu.json: {kind} -->\nold\n<!-- end -->\nafter\n"
        filled = tables.fill(text, output.parent)
        assert "old" not in filled and filled.endswith("\n<!-- end -->\nafter\n")
        assert tables.fill(filled, output.parent) == filled
    steps = tables.fill("<!-- cpu.json: steps -->\n<!-- end -->\n", output.parent)
    median = f"{tiny['contenders'][TEXTBOOK]['ms']['median']:,.0f}"
    assert f"| {TEXTBOOK} | {median} |" in steps


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path) -> None:
    sweep = growth.sweeps(2048)["anchors"]
    sweep = sweep._replace(
        sizes=sweep.sizes[-2:], workloads=sweep.workloads[-2:], contenders=(TEXTBOOK,)
    )
    found = growth.measure({"anchors": sweep}, CPU, rounds=1, most_seconds=0, say=lambda _: None)
    textbook = found["sweeps"]["anchors"]["lines"][TEXTBOOK]
    assert textbook["mib_exponent"] == pytest.approx(2, abs=0.3)
    figure = growth.plot(found)
    legend = figure.axes[1].get_legend().get_texts()[0].get_text()
    assert legend == f"textbook: exponent {textbook['mib_exponent']:.2f}"
    figure.savefig(tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_mistakes_give_one_clear_line(main, tmp_path, capsys) -> None:
    for arguments, message in {
        ("contrast", "--repeats", "0"): "--repeats 0",
        ("growth", "--largest", "100"): "--largest 100",
        ("tables", "--docs", str(tmp_path / "none.md")): "none.md",
    }.items():
        assert main(list(arguments)) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_tables_of_the_documentation_are_those_of_the_results() -> None:
    texts = [(ROOT / f"docs/{name}.md").read_text() for name in tables.DOCUMENTS]
    for text in texts:
        assert tables.fill(text, ROOT / "results") == text
    for file in (ROOT / "results").glob("performance_*.json"):
        assert f"<!-- {file.name}: machine -->" in "".join(texts)


def test_a_table_without_results_says_so_and_an_unknown_one_is_refused(tmp_path) -> None:
    section = "<!-- gone.json: steps -->\nold\n<!-- end -->"
    expected = "<!-- gone.json: steps -->\nNot measured yet.\n<!-- end -->"
    assert tables.fill(section, tmp_path) == expected
    with pytest.raises(ValueError, match="no kind of table 'stairs'"):
        tables.fill(section.replace("steps", "stairs"), tmp_path)

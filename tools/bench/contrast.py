"""Measures the contrastive step and the InfoNCE against their limit and against other forms."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from contrast_d2.contrast import info_nce

from .cases import (
    ALL_CASES,
    MOST_MIB,
    MOST_TIMES_TEXTBOOK_ERROR,
    Case,
)
from .machine import (
    Peaks,
    Probes,
    Say,
    Timings,
    interleave,
    median_peaks,
    milliseconds,
    note,
    ratios,
    seconds_of,
    warning,
)
from .peers import textbook_info_nce
from .worker import default_heap_ms, peak_mib, to_json
from .workloads import OURS, TEXTBOOK, InfoNCE, Step

_ACCURACY_ANCHORS = 1024


def measure(
    names: Sequence[str],
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measures cases.

    Args:
        names: of `ALL_CASES`.
        device: where.
        rounds: how often each contender runs, at most.
        most_seconds: about how long a case is timed, unless that is less than five rounds.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, the machine's peaks before and after, accuracy, and by case
        the limit and every contender's time, its ratio to the limit and to the library, and memory.
    """
    probes = Probes(device)
    before = probes.measure()
    say(f"peaks: {_peaks_line(before)}")
    cases = {}
    for name in names:
        say(f"\n{name}: {_description(ALL_CASES[name])}")
        cases[name] = _measure_case(ALL_CASES[name], device, probes, rounds, most_seconds, say)
    accuracy = {str(dtype): errors(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    after = probes.measure()
    say(f"\npeaks: {_peaks_line(after)}")
    return {
        **note(device),
        "peaks": {"before": before._asdict(), "after": after._asdict()},
        "cases": cases,
        "errors": accuracy,
    }


def violations(results: Mapping[str, Any]) -> list[str]:
    """What of the promises does not hold, one line each.

    Args:
        results: of `measure`.
    """
    lines = []
    device = results["machine"]["device"]
    for name, found in results["cases"].items():
        case = ALL_CASES[name]
        ours = found["contenders"][OURS]
        most = case.most_times_limit if device == "cpu" else None
        if most is not None and ours["times_limit"]["median"] > most:
            lines.append(f"{name}: {ours['times_limit']['median']:.2f} times the limit, not {most}")
        if isinstance(case.workload, InfoNCE) and ours["peak_mib"] > MOST_MIB:
            if case.workload.anchors <= 10_000:
                lines.append(f"{name}: {ours['peak_mib']:.0f} MiB, not {MOST_MIB:.0f} at most")
        for scale, (drawn, expected) in enumerate(
            zip(found.get("drawn", ()), case.expected, strict=False)
        ):
            if not 0.8 <= drawn / expected <= 1.2:
                lines.append(f"{name}: scale {scale} draws {drawn} anchors, not about {expected}")
    return lines + too_large(results["errors"])


def too_large(errors: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """Which errors are larger than promised, one line each.

    Args:
        errors: by dtype, what `errors` finds.
    """
    lines = []
    for dtype, found in errors.items():
        for quantity, error in found[OURS].items():
            # An error below the resolution of the dtype is none: plain PyTorch may have been lucky.
            resolution = torch.finfo(getattr(torch, dtype.removeprefix("torch."))).eps
            allowed = MOST_TIMES_TEXTBOOK_ERROR * max(found[TEXTBOOK][quantity], resolution)
            if error > allowed:
                lines.append(f"{dtype}: error {error:.1e} of the {quantity}, not {allowed:.1e}")
    return lines


def _measure_case(
    case: Case,
    device: torch.device,
    probes: Probes,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    workload, names = case.workload, list(case.contenders)
    runs = workload.contenders(device, names)
    result: dict[str, Any] = {"workload": to_json(workload), "cost": workload.cost()._asdict()}
    if isinstance(workload, Step):
        result["drawn"] = workload.drawn()
        say(f"  anchors drawn: {'/'.join(map(str, result['drawn']))}")
    if case.once:
        timings = _run_once(runs[OURS], probes, device)
    else:
        timings = interleave(runs, probes, device, rounds=rounds, most_seconds=most_seconds)
    busy = warning(timings)
    if busy:
        say(busy)
    limits = [peaks.limit(workload.cost()) for peaks in timings.peaks]
    result["rounds"], result["calls_per_round"] = len(limits), timings.calls
    result["cpu_share"] = timings.cpu_share
    result["peaks"] = median_peaks(timings.peaks)._asdict()
    result["limit_ms"] = milliseconds(limits)
    say(f"  limit {result['limit_ms']['median']:.1f} ms at {_peaks_line(Peaks(**result['peaks']))}")
    ours = timings.seconds[OURS]
    (memory,) = peak_mib([(workload, names)], device)
    default_heap = {}
    if case.default_heap:
        default_heap = default_heap_ms(workload, (OURS, TEXTBOOK), device)
    result["contenders"] = {}
    for name, seconds in timings.seconds.items():
        row: dict[str, Any] = {
            "ms": milliseconds(seconds),
            "times_limit": ratios(seconds, limits),
            "times_ours": ratios(seconds, ours),
            "peak_mib": memory[name],
        }
        if name in default_heap:
            row["default_heap_ms"] = default_heap[name]
        result["contenders"][name] = row
        say(_contender_line(name, row))
    return result


def _run_once(run: Callable[[], object], probes: Probes, device: torch.device) -> Timings:
    peaks, cpu_start = [probes.measure()], time.process_time()
    seconds = seconds_of(run, device)
    return Timings({OURS: [seconds]}, 1, peaks, (time.process_time() - cpu_start) / seconds)


def errors(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Errors of value and gradient against the textbook form in float64, on the same input.

    That of the value is relative to the value, that of the gradient to its largest element.
    """
    anchors, labels, _, _ = InfoNCE(_ACCURACY_ANCHORS).inputs(device, dtype)
    value, gradient = _value_and_gradient(textbook_info_nce, anchors.double(), labels)
    found = {}
    for name, loss in ((OURS, info_nce), (TEXTBOOK, textbook_info_nce)):
        found_value, found_gradient = _value_and_gradient(loss, anchors, labels)
        found[name] = {
            "value": ((found_value - value).abs() / value.abs()).item(),
            "gradient": ((found_gradient - gradient).abs().max() / gradient.abs().max()).item(),
        }
    return found


def _value_and_gradient(
    loss: Callable[..., Tensor], anchors: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = anchors.detach().clone().requires_grad_()
    value = loss(leaf, labels)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach().double(), gradient.double()


def _description(case: Case) -> str:
    workload = case.workload
    if isinstance(workload, Step):
        scene = workload.scene
        size = f"{scene.batch} x {scene.height}x{scene.width}, {scene.num_classes} classes"
        expected = "/".join(map(str, case.expected))
        return size + (f", about {expected} anchors" if expected else "")
    memory = f" against {workload.memory:,} of a memory bank" if workload.memory else ""
    order = "" if workload.sorted else ", unsorted"
    return f"{workload.anchors:,} anchors{memory}{order}, {workload.classes} classes"


def _peaks_line(peaks: Peaks) -> str:
    bf16 = "no" if peaks.bf16 is None else f"{peaks.bf16 / 1e9:.0f}"
    return (
        f"{peaks.fp32 / 1e9:.0f} GFLOP/s fp32, {bf16} bf16, "
        f"{peaks.write / 1e9:.1f} GB/s write, {peaks.copy / 1e9:.1f} copy"
    )


def _contender_line(name: str, row: Mapping[str, Any]) -> str:
    time, limit, ours = row["ms"], row["times_limit"], row["times_ours"]
    line = (
        f"  {name:28} {time['median']:9.1f} ms  {limit['median']:6.2f} x limit  "
        f"{ours['median']:6.2f} x ours ({ours['p10']:.2f}-{ours['p90']:.2f})  "
        f"{row['peak_mib']:7.0f} MiB"
    )
    if "default_heap_ms" in row:
        line += f"  ({row['default_heap_ms']:.1f} ms with the default heap)"
    return line

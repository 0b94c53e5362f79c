"""Measures what the dashboard of the contrast costs in the steps in which it looks."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from .machine import Say, milliseconds, note
from .methods import MethodStep, experiment


def measure(
    files: Mapping[str, str],
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measures steps with and without it, in turn.

    Args:
        files: experiment files with a contrast, by name; the images are those of their data.
        device: where.
        rounds: how often each step runs, at most.
        most_seconds: begin no further round of a file after so long, once there are three.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and by file the times (ms) of a step of forward and
        backward, of one that is inspected, and of one that is shown and written for TensorBoard,
        with the bytes that one adds to its file. On a CPU they are processor times, to which
        others at work add little.
    """
    found = {}
    for name, path in files.items():
        with tempfile.TemporaryDirectory() as folder:
            steps, file_size = _steps(path, device, folder)
            seconds: dict[str, list[float]] = {kind: [] for kind in steps}
            for step in steps.values():
                step()  # what is done once
            before, start, count = file_size(), time.perf_counter(), 0
            while count < rounds and (count < 3 or time.perf_counter() - start < most_seconds):
                for kind, step in steps.items():
                    seconds[kind].append(_seconds(step, device))
                count += 1
            kilobytes = (file_size() - before) / count / 1000
        row = {kind: milliseconds(values) for kind, values in seconds.items()}
        found[name] = {"ms": row, "event_kb": kilobytes, "rounds": count}
        medians = "  ".join(f"{kind} {values['median']:.0f} ms" for kind, values in row.items())
        say(f"  {name:32} {medians}  {kilobytes:.0f} kB")
    return {**note(device), "files": dict(files), "dashboards": found}


def _steps(
    path: str, device: torch.device, folder: str
) -> tuple[dict[str, Callable[[], object]], Callable[[], int]]:
    """The steps that are compared, and the size of what the last has written."""
    from detectron2.config import instantiate
    from detectron2.data import MetadataCatalog
    from detectron2.utils.events import EventStorage, TensorboardXWriter

    from contrast_d2.contrast import Inspection
    from contrast_d2.studio.dashboard import Dashboard

    config = experiment(path)
    model = MethodStep({path: path}).model(path).to(device)
    batch = next(iter(instantiate(config.dataloader.train)))
    contrast = model.contrast
    if contrast is None:
        raise ValueError(f"{path}: a baseline has no dashboard; give a file with a contrast")
    class_names = MetadataCatalog.get(config.dataset.test).stuff_classes
    hook = Dashboard(1, folder, config.dataset.test)
    storage = EventStorage()
    hook.trainer = SimpleNamespace(iter=0, model=model, storage=storage, last_batch=batch)
    writer = TensorboardXWriter(folder)

    def step() -> None:
        model.zero_grad()
        sum(model(batch).values()).backward()

    def inspected() -> None:
        contrast.inspection = Inspection(len(class_names))
        step()
        contrast.inspection = None

    def shown() -> None:
        hook.before_step()
        step()
        hook.after_step()
        with storage:
            writer.write()

    def file_size() -> int:
        writer._writer.flush()
        events = [x for x in os.listdir(folder) if x.startswith("events")]
        return sum(os.path.getsize(os.path.join(folder, x)) for x in events)

    return {"plain": step, "inspected": inspected, "shown": shown}, file_size


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start

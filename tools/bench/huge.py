"""What a dataset of a million entries and an evaluation of thousands of images take."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset

from contrast_d2.data import build_train_loader
from contrast_d2.data.repeat_factors import factors_of_counts
from contrast_d2.data.samplers import ResumableTrainingSampler

from .machine import Say, note
from .processes import growth, resident_mib, usage
from .soak import FLAT_MIB

CONFIG = Path(__file__).parents[2] / "configs/shapes/semfpn_r18_base_demo.py"
NAME = "measured_sem_seg_train"

_EPOCHS = 100
_BATCH = 16
_EVERY = 20
# Images in which the heap and the workers' queues fill.
_WARMUP = 200


def measure_dataset(entries: int, classes: int, say: Say) -> dict[str, Any]:
    """Measures what listing, loading and resuming a dataset cost.

    Args:
        entries: images in its list.
        classes: of the dataset.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and by stage the seconds and the MiB.

    Raises:
        ValueError: too few entries.
    """
    if entries < _BATCH:
        raise ValueError(f"--entries {entries}: needs at least {_BATCH}.")
    stages: dict[str, dict[str, float]] = {}
    start = _EPOCHS * entries // _BATCH
    with registered(NAME, lambda: records(entries), classes=classes):
        with _stage("the list of records, by the dataset's own function", stages, say):
            listed = DatasetCatalog.get(NAME)
        del listed

        def build(start_iteration: int) -> Any:
            loader = build_train_loader(
                dataset=NAME, mapper=_as_it_is, total_batch_size=_BATCH, seed=0, num_workers=2
            )
            loader.start_at(start_iteration)
            return loader

        with _stage("loader, with its list, up to the first batch of 2 workers", stages, say):
            next(iter(build(0)))
        with _stage(f"the same, resumed after {_EPOCHS} epochs", stages, say):
            next(iter(build(start)))
    random = np.random.default_rng(0)
    counts = np.zeros((entries, classes), dtype=np.int64)
    for _ in range(10):  # an image holds about ten classes
        counts[np.arange(entries), random.integers(0, classes, entries)] += 100
    with _stage(f"repeat factors from the pixels of {classes} classes", stages, say):
        factors = factors_of_counts(counts, 0.2)
    with _stage(f"sampler with repeat factors, resumed after {_EPOCHS} epochs", stages, say):
        sampler = ResumableTrainingSampler(
            entries, seed=0, repeat_factors=factors, start=start * _BATCH
        )
        next(iter(sampler))
    return {
        **note(torch.device("cpu")),
        "entries": entries,
        "classes": classes,
        "mib_of_counts": counts.nbytes / (1 << 20),
        "stages": stages,
    }


def measure_evaluation(images: int, workers: int, say: Say) -> dict[str, Any]:
    """Evaluates generated images and watches the memory, workers' included.

    Args:
        images: how many.
        workers: of the loader.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, the slope in MiB per 1,000 images with its standard error,
        and the samples.

    Raises:
        ValueError: too few images for a slope.
    """
    if images < 2 * _WARMUP:
        raise ValueError(f"--images {images}: needs at least {2 * _WARMUP}.")
    cfg = LazyConfig.load(str(CONFIG))
    known = DatasetCatalog.get(cfg.dataset.train) + DatasetCatalog.get(cfg.dataset.test)
    metadata = MetadataCatalog.get(cfg.dataset.test).as_dict()
    metadata.pop("name")
    samples: list[tuple[int, float, int]] = []
    with registered(NAME, lambda: list(itertools.islice(itertools.cycle(known), images))):
        MetadataCatalog.get(NAME).set(**metadata)
        cfg.dataset.test = NAME
        cfg.dataloader.test.num_workers = workers
        cfg.dataloader.evaluator.output_dir = None
        model = instantiate(cfg.model).eval()
        done = itertools.count(1)

        def watch(*_: Any) -> None:
            number = next(done)
            if number % _EVERY == 0:
                now = usage(os.getpid())
                samples.append((number, round(now.mib, 1), now.handles))

        model.register_forward_hook(watch)
        evaluator = instantiate(cfg.dataloader.evaluator)
        start = time.monotonic()
        inference_on_dataset(model, instantiate(cfg.dataloader.test), evaluator)
        seconds = time.monotonic() - start
    late = [sample for sample in samples if sample[0] > _WARMUP]
    memory = growth([s[0] / 1000 for s in late], [s[1] for s in late])
    thirds = late[: len(late) // 3], late[-(len(late) // 3) :]
    handles = [statistics.median(s[2] for s in part) for part in thirds]
    not_flat = ["memory"] if memory.slope > max(2 * memory.error, FLAT_MIB) else []
    say(
        f"{images} images in {seconds:.0f} s: {memory.mean:.0f} MiB, {memory.slope:+.2f} ± "
        f"{memory.error:.2f} MiB per 1,000 images after the first {_WARMUP}; open files "
        f"{handles[0]:.0f}, later {handles[1]:.0f}: {'NOT FLAT' if not_flat else 'flat'}"
    )
    return {
        **note(torch.device("cpu")),
        "images": images,
        "workers": workers,
        "seconds": seconds,
        "mib": {**memory._asdict(), "most": max(s[1] for s in samples)},
        "handles": handles,
        "not_flat": not_flat,
        "samples": samples,
    }


def records(entries: int) -> list[dict[str, Any]]:
    """A list as that of a real dataset, without files."""
    return [
        {
            "file_name": f"/datasets/huge/images/{i // 1000:04d}/{i:07d}.jpg",
            "sem_seg_file_name": f"/datasets/huge/annotations/{i // 1000:04d}/{i:07d}.png",
            "image_id": f"{i:07d}",
            "height": 1024,
            "width": 2048,
        }
        for i in range(entries)
    ]


@contextmanager
def registered(
    name: str, load: Callable[[], list[dict[str, Any]]], classes: int | None = None
) -> Iterator[None]:
    """A dataset that is there for a while.

    Args:
        name: of the dataset.
        load: lists its records.
        classes: their number; None leaves the metadata to the caller.
    """
    DatasetCatalog.register(name, load)
    if classes is not None:
        names = [f"class {k}" for k in range(classes)]
        MetadataCatalog.get(name).set(stuff_classes=names, ignore_label=255)
    try:
        yield
    finally:
        DatasetCatalog.remove(name)
        if name in MetadataCatalog.list():
            MetadataCatalog.remove(name)


@contextmanager
def _stage(name: str, stages: dict[str, dict[str, float]], say: Say) -> Iterator[None]:
    """Notes the time, also that of the processor, and the most memory beyond what was there.

    Processor time includes that of processes that have ended.
    """
    before = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start, cpu_start = time.perf_counter(), sum(os.times()[:4])
    yield
    seconds, cpu_seconds = time.perf_counter() - start, sum(os.times()[:4]) - cpu_start
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024 - before
    stages[name] = {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "mib": round(peak, 1),
    }
    say(f"{name}: {seconds:.2f} s, {cpu_seconds:.2f} s of the processor, {peak:.0f} MiB")


def _as_it_is(record: dict[str, Any]) -> dict[str, Any]:
    return record

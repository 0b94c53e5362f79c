"""What the evaluation of an image costs, against detectron2's evaluator.

Both get the same class scores, 19 x 1024 x 2048 as for Cityscapes, and the same label files, made
from labels of CamVid; they take turns in one process with one thread. Scores lie in memory as
PyTorch does by default, all of one class together, or channels-last, all of one pixel together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as DetectronSemSegEvaluator
from PIL import Image
from torch.nn import functional as F

import contrast_d2.data  # noqa: F401  (registers the datasets)
from contrast_d2.evaluation import BoundaryIoU, SemSegEvaluator, TrimapIoU

from .machine import Say, milliseconds, note, ratios

PEER, OURS = "detectron2", "contrast_d2"
LAYOUTS = {"by class": False, "channels-last": True}
WITH_BOUNDARIES = "contrast_d2, with boundary IoU and four trimaps"
_DATASET, _LABELS_FROM = "benchmark_evaluator", "camvid_sem_seg_val"
_NUM_CLASSES, _SIZE, _VOID, _STORED_VOID = 19, (1024, 2048), 255, 11


def measure(
    *, images: int, device: torch.device, rounds: int, most_seconds: float, say: Say
) -> dict[str, Any]:
    """Measures the processor time of an image.

    Args:
        images: how many.
        device: where: a CPU.
        rounds: how often, at most, each image is evaluated by every contender.
        most_seconds: begin no further round of a layout after so long.
        say: is told what is found.

    Returns:
        A tree for JSON: where, and by layout of the scores and contender the time of an image (ms)
        and how many times as fast as detectron2's evaluator it is.

    Raises:
        RuntimeError: the evaluators disagree on a score.
    """
    found = note(device) | {"images": images, "layouts": {}}
    with tempfile.TemporaryDirectory() as folder:
        records = _register(Path(folder), images)
        try:
            for layout, channels_last in LAYOUTS.items():
                say(f"\nscores {layout}: {images} images")
                seconds = _interleave(records, channels_last, rounds, most_seconds)
                found["layouts"][layout] = _compare(seconds, say)
        finally:
            DatasetCatalog.remove(_DATASET)
            MetadataCatalog.remove(_DATASET)
    return found


def _compare(seconds: dict[str, list[float]], say: Say) -> dict[str, Any]:
    rows = {}
    for name, times in seconds.items():
        row = {"ms": milliseconds(times), "times_detectron2": ratios(seconds[PEER], times)}
        ratio = row["times_detectron2"]
        say(
            f"  {name:50} {row['ms']['median']:6.1f} ms, {ratio['median']:.2f} times as fast as "
            f"{PEER} ({ratio['p10']:.2f} to {ratio['p90']:.2f})"
        )
        rows[name] = row
    return rows


def _register(folder: Path, count: int) -> list[dict[str, Any]]:
    """Labels of CamVid enlarged, as a dataset of 19 classes."""
    sources = DatasetCatalog.get(_LABELS_FROM)
    records = []
    for source in sources[:: max(1, len(sources) // count)][:count]:
        path = folder / Path(source["sem_seg_file_name"]).name
        with Image.open(source["sem_seg_file_name"]) as image:
            labels = np.asarray(image.resize(_SIZE[::-1], Image.NEAREST))
        Image.fromarray(np.where(labels == _STORED_VOID, _VOID, labels).astype(np.uint8)).save(path)
        records.append(source | {"sem_seg_file_name": str(path)})
    DatasetCatalog.register(_DATASET, lambda: records)
    names = [f"class {k}" for k in range(_NUM_CLASSES)]
    MetadataCatalog.get(_DATASET).set(stuff_classes=names, ignore_label=_VOID)
    return records


def _scores(record: dict[str, Any], seed: int, channels_last: bool) -> torch.Tensor:
    """Class scores as a network with stride 4 gives them: often right, smooth, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (side // 4 for side in _SIZE)
    with Image.open(record["sem_seg_file_name"]) as image:
        labels = torch.from_numpy(np.array(image.resize((width, height), Image.NEAREST))).long()
    truth = F.one_hot(torch.where(labels == _VOID, 0, labels), _NUM_CLASSES).permute(2, 0, 1)
    coarse = torch.randn(1, _NUM_CLASSES, height // 8, width // 8, generator=generator)
    noise = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    scores = (2.0 * truth + noise).contiguous(memory_format=layout)
    return F.interpolate(scores, size=_SIZE, mode="bilinear", align_corners=False)[0]


def _interleave(
    records: Sequence[dict[str, Any]], channels_last: bool, rounds: int, most_seconds: float
) -> dict[str, list[float]]:
    """Processor seconds of each image by contender, all in turn on the same scores."""
    evaluators = {
        PEER: DetectronSemSegEvaluator(_DATASET, distributed=False),
        OURS: SemSegEvaluator(_DATASET),
        WITH_BOUNDARIES: SemSegEvaluator(
            _DATASET, measures=[BoundaryIoU(_DATASET), TrimapIoU(_DATASET)]
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in evaluators}
    start = time.perf_counter()
    for number in range(rounds + 1):  # the first warms up and is not counted
        if number > 1 and time.perf_counter() - start > most_seconds:
            break
        for evaluator in evaluators.values():
            evaluator.reset()
        for seed, record in enumerate(records):
            output = {"sem_seg": _scores(record, seed, channels_last)}
            for name, evaluator in evaluators.items():
                begin = time.process_time()
                evaluator.process([record], [output])
                if number:
                    seconds[name].append(time.process_time() - begin)
    results = {name: evaluator.evaluate()["sem_seg"] for name, evaluator in evaluators.items()}
    # Of absent classes mIoU makes 0 or nothing, as the version of detectron2 has it.
    for name, expected in results[PEER].items():
        if name == "mIoU":
            continue
        if not all(np.isclose(r[name], expected, rtol=0, equal_nan=True) for r in results.values()):
            raise RuntimeError(f"the evaluators disagree on {name}: {results}")
    return seconds

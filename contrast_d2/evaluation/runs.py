"""What a training run leaves in its folder: metrics, scores and configuration."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf

Metrics = dict[int, dict[str, float]]

# What the processes of a run took, noted by what has started them: {"peak_host_mib": MiB}.
RESOURCES_FILE = "resources.json"


class RunScores(NamedTuple):
    """The scores of a run's last evaluation.

    Attributes:
        dataset: name of the dataset.
        scores: {"mIoU", "IoU-<class>", ...} in percent, nan for absent classes.
    """

    dataset: str
    scores: dict[str, float]


class RunCost(NamedTuple):
    """What a run took.

    Attributes:
        seconds_per_step: median time of a training step, evaluations left out; None if not logged.
        peak_memory_mib: the most memory that it had at a time: of its GPU where it has trained on
            one, else of its process; None where nobody noted it.
    """

    seconds_per_step: float | None
    peak_memory_mib: float | None


def read_metrics(path: str | Path) -> Metrics:
    """Read the metrics.json of detectron2's JSONWriter, one JSON object per line.

    A run that was killed and resumed repeats iterations, and may have torn a line: the last value
    of an iteration wins, and what cannot be read is skipped.

    Args:
        path: the metrics.json.

    Returns:
        {iteration: {name: value}} in the order of the iterations.

    Raises:
        ValueError: the file is missing or holds no metrics.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is this the output folder of a training run?")
    metrics: Metrics = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            values = _parse_line(line)
            if values is not None:
                metrics.setdefault(int(values.pop("iteration")), {}).update(values)
    if not metrics:
        raise ValueError(f"{path} holds no metrics yet; they appear after the first log period")
    return dict(sorted(metrics.items()))


def _parse_line(line: str) -> dict[str, float] | None:
    # A resumed run appends right after a torn line: its own object starts at the last brace.
    try:
        values = json.loads(line[max(line.rfind("{"), 0) :])
    except json.JSONDecodeError:
        return None
    return values if isinstance(values, dict) and "iteration" in values else None


def load_saved_config(path: str | Path) -> DictConfig:
    """Read a config that a run has saved, of plain values: no object of the yaml is built.

    The callables that it names are those that a model is built with: building it runs them.

    Raises:
        ValueError: the file cannot be read, is no valid yaml, or holds objects or no keys.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.constructor.ConstructorError as error:
        raise ValueError(
            f"{path} holds objects, which can run code ({error.problem}): write plain values, or "
            "an experiment file in Python."
        ) from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid yaml: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys.")
    return OmegaConf.create(content, flags={"allow_objects": True})


def read_config(run_dir: str | Path) -> DictConfig:
    """Read the config.yaml of a run.

    Raises:
        ValueError: it is missing, or is not a config of a model and its data.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; is this the output folder of a training run?")
    config = load_saved_config(path)
    for key in ("model", "dataloader.test.dataset"):
        if OmegaConf.select(config, key) is None:
            raise ValueError(f"{path} has no {key}; it is not the config of a training run")
    return config


def last_scores(run_dir: str | Path, metrics: Metrics) -> RunScores | None:
    """Find the scores of a run's last evaluation.

    Args:
        run_dir: the run; its newest `inference/**/sem_seg_evaluation.json` is read.
        metrics: what `read_metrics` gives, used when there is no such file.

    Returns:
        The scores, or None if the run was never evaluated.

    Raises:
        ValueError: the scores are in the metrics only and the config does not name the dataset.
    """
    reports = list(Path(run_dir).glob("inference/**/sem_seg_evaluation.json"))
    if reports:
        newest = max(reports, key=lambda path: path.stat().st_mtime)
        report = json.loads(newest.read_text())
        return RunScores(report["dataset"], _with_nan(report["sem_seg"]))
    evaluations = [values for values in metrics.values() if "sem_seg/mIoU" in values]
    if not evaluations:
        return None
    prefix = "sem_seg/"
    scores = {
        name.removeprefix(prefix): value
        for name, value in evaluations[-1].items()
        if name.startswith(prefix)
    }
    return RunScores(read_config(run_dir).dataloader.test.dataset, scores)


def run_cost(run_dir: str | Path, metrics: Metrics) -> RunCost:
    """Finds what a run took.

    Args:
        run_dir: the run; its log.txt tells the memory of a GPU, resources.json that of a process.
        metrics: what `read_metrics` gives.
    """
    seconds = [values["time"] for values in metrics.values() if "time" in values]
    log, note = Path(run_dir, "log.txt"), Path(run_dir, RESOURCES_FILE)
    # detectron2 writes it on a GPU only.
    text = log.read_text(errors="replace") if log.is_file() else ""
    peaks = [float(peak) for peak in re.findall(r"max_mem: (\d+)M", text)]
    if not peaks and note.is_file():
        peaks = [json.loads(note.read_text())["peak_host_mib"]]
    return RunCost(statistics.median(seconds) if seconds else None, max(peaks, default=None))


def _with_nan(scores: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in scores.items()}

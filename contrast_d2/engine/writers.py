"""Writers that hand a run's metrics and pictures to experiment trackers: W&B and MLflow.

Both libraries take their settings from their own environment variables: WANDB_PROJECT,
WANDB_MODE=offline and others; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and others.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils.events import EventWriter, get_event_storage
from omegaconf import OmegaConf

logger = logging.getLogger(__name__)

_PROJECT = "contrast_d2"
# What MLflow takes at once, and how long a value may be.
_MLFLOW_PARAMS, _MLFLOW_LENGTH = 100, 500
# W&B takes no histogram of more bins.
_WANDB_BINS = 512


@dataclass
class StepEvents:
    """What is new of one iteration.

    Attributes:
        scalars: by name.
        images: by name, (height, width, 3) uint8, RGB.
        histograms: by name, (n,) counts and (n + 1,) edges of the bins.
    """

    scalars: dict[str, float] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    histograms: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


class TrackerWriter(EventWriter):
    """Hands on what is new in the event storage, iteration by iteration.

    Scalars are smoothed as detectron2's writers do. To be called before the writer for TensorBoard,
    which removes pictures and histograms from the storage. What the tracker refuses while the
    training runs is logged and does not end it.
    """

    def __init__(self) -> None:
        self._last_write = -1

    def write(self) -> None:
        storage = get_event_storage()
        events: dict[int, StepEvents] = defaultdict(StepEvents)
        for name, (value, iteration) in storage.latest_with_smoothing_hint().items():
            if iteration > self._last_write:
                events[iteration].scalars[name] = float(value)
        # As detectron2's own writer does: the storage has no other way to read them.
        for name, image, iteration in storage._vis_data:
            events[iteration].images[name] = _as_uint8(image)
        for row in storage._histograms:
            edges = np.array([row["min"], *row["bucket_limits"]])
            counts = np.array(row["bucket_counts"])
            events[row["global_step"]].histograms[row["tag"]] = (counts, edges)
        for iteration in sorted(events):
            try:
                self.log(iteration, events[iteration])
            except Exception as error:  # of many kinds: files, network, the tracker's own
                logger.warning("%s: iteration %d is lost: %s", self.__class__, iteration, error)
        self._last_write = max([self._last_write, *events])

    @abstractmethod
    def log(self, iteration: int, events: StepEvents) -> None:
        """Hands on what is new of an iteration."""


class DispensableWriter(EventWriter):
    """Another writer, whose failures are logged and end no training.

    Args:
        writer: which does the work.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer

    def write(self) -> None:
        try:
            self._writer.write()
        except Exception as error:  # of many kinds: files, network, the library's own
            logger.warning("%s: metrics are lost: %s", type(self._writer).__name__, error)

    def close(self) -> None:
        try:
            self._writer.close()
        except Exception as error:
            logger.warning("%s does not close: %s", type(self._writer).__name__, error)


class WandbWriter(TrackerWriter):
    """Writes to Weights & Biases; `WANDB_MODE=offline` writes to `<output_dir>/wandb` alone.

    Args:
        output_dir: folder of the run, with its config.yaml and run.json, which are logged.
        resumed: continue the tracker's run that the folder knows.

    Raises:
        ValueError: W&B does not start.
    """

    def __init__(self, output_dir: str, *, resumed: bool) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        super().__init__()
        self._wandb = wandb
        known = _known_run(output_dir, "wandb") if resumed else None
        config, record = _notes(output_dir)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=os.path.basename(os.path.abspath(output_dir)),
                dir=output_dir,
                id=known,
                resume="allow" if known else None,
                config={**config, "run": record},
            )
        except wandb.Error as error:
            raise ValueError(
                f"train.writers: W&B does not start: {error}. Run `wandb login`, or set "
                "WANDB_MODE=offline."
            ) from error
        _remember_run(output_dir, "wandb", self._run.id)

    def log(self, iteration: int, events: StepEvents) -> None:
        values: dict[str, Any] = dict(events.scalars)
        for name, image in events.images.items():
            values[name] = self._wandb.Image(image)
        for name, (counts, edges) in events.histograms.items():
            values[name] = self._wandb.Histogram(np_histogram=_coarser(counts, edges))
        self._run.log(values, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter(TrackerWriter):
    """Writes to MLflow: to the server of MLFLOW_TRACKING_URI, or to a database in the run's folder,
    `<output_dir>/mlflow.db` with pictures in `mlartifacts`.

    MLflow knows no histograms: they become JSON files, `histograms/<name>/<iteration>.json`.

    Args:
        output_dir: folder of the run, with its config.yaml and run.json, which are logged.
        resumed: continue the tracker's run that the folder knows.

    Raises:
        ValueError: MLflow does not start.
    """

    def __init__(self, output_dir: str, *, resumed: bool) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        super().__init__()
        self._metric = Metric
        known = _known_run(output_dir, "mlflow") if resumed else None
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if not uri:
            folder = Path(output_dir).absolute()
            uri, artifacts = f"sqlite:///{folder / 'mlflow.db'}", (folder / "mlartifacts").as_uri()
        try:
            self._client = MlflowClient(uri)
            if known:
                self._run = self._client.get_run(known).info.run_id
                self._client.update_run(self._run, status="RUNNING")
            else:
                self._run = self._begin(output_dir, artifacts)
        except MlflowException as error:
            raise ValueError(
                f"train.writers: MLflow does not start: {error}. Check MLFLOW_TRACKING_URI, or "
                "unset it to write into the run's folder."
            ) from error
        _remember_run(output_dir, "mlflow", self._run)

    def _begin(self, output_dir: str, artifacts: str | None) -> str:
        """Makes a run, and logs config and record."""
        from mlflow.entities import Param

        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        known = self._client.get_experiment_by_name(title)
        experiment = (
            known.experiment_id if known else self._client.create_experiment(title, artifacts)
        )
        name = os.path.basename(os.path.abspath(output_dir))
        run = self._client.create_run(experiment, run_name=name).info.run_id
        config, record = _notes(output_dir)
        params = [Param(*row) for row in _flat({**config, "run": record})]
        for first in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(run, params=params[first : first + _MLFLOW_PARAMS])
        for file in ("config.yaml", "run.json"):
            if os.path.exists(os.path.join(output_dir, file)):
                self._client.log_artifact(run, os.path.join(output_dir, file))
        return run

    def log(self, iteration: int, events: StepEvents) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_mlflow_name(name), value, now, iteration)
            for name, value in events.scalars.items()
        ]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)
        for name, image in events.images.items():
            self._client.log_image(self._run, image, key=_mlflow_name(name), step=iteration)
        for name, (counts, edges) in events.histograms.items():
            table = {"counts": counts.tolist(), "edges": edges.tolist()}
            path = f"histograms/{_mlflow_name(name)}/{iteration}.json"
            self._client.log_dict(self._run, table, path)

    def close(self) -> None:
        self._client.set_terminated(self._run)


_PACKAGES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
WRITERS = {"wandb": WandbWriter, "mlflow": MlflowWriter}


def check_writers(names: Sequence[str]) -> None:
    """Whether there are such writers, and the packages that they need.

    Args:
        names: `train.writers` of a config.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    if isinstance(names, str):
        raise ValueError(f"train.writers={names}: give a list, train.writers=[{names}].")
    for name in names:
        if name not in WRITERS:
            raise ValueError(f"train.writers={list(names)}: choose from {sorted(WRITERS)}.")
        if any(find_spec(package) is None for package in _PACKAGES[name]):
            raise ValueError(
                f"train.writers={list(names)}: a package that {name} needs is not installed: "
                f"pip install 'contrast_d2[{name}]'."
            )


def open_writers(names: Sequence[str], output_dir: str, *, resumed: bool) -> list[EventWriter]:
    """The writers of the given names, on the main process.

    Args:
        names: keys of `WRITERS`.
        output_dir: folder of the run.
        resumed: whether the training continues one of this folder.

    Raises:
        ValueError: a tracker does not start.
    """
    return [WRITERS[name](output_dir, resumed=resumed) for name in names]


def _notes(output_dir: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config and the record of a run, as far as they are there."""
    config, record = Path(output_dir, "config.yaml"), Path(output_dir, "run.json")
    tree = OmegaConf.to_container(OmegaConf.load(config)) if config.exists() else {}
    assert isinstance(tree, dict)
    note = json.loads(record.read_text()) if record.exists() else {}
    return {str(name): value for name, value in tree.items()}, note


def _run_file(output_dir: str, tracker: str) -> Path:
    return Path(output_dir, f"{tracker}_run.txt")


def _known_run(output_dir: str, tracker: str) -> str | None:
    file = _run_file(output_dir, tracker)
    return file.read_text().strip() if file.exists() else None


def _remember_run(output_dir: str, tracker: str, run: str) -> None:
    _run_file(output_dir, tracker).write_text(run + "\n")


def _as_uint8(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 of what `put_image` takes: (3, H, W), uint8 or floats in 0..1."""
    image = np.asarray(image).transpose(1, 2, 0)
    return image if image.dtype == np.uint8 else np.rint(255 * image).clip(0, 255).astype(np.uint8)


def _coarser(counts: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The histogram with neighbouring bins joined, where there are too many."""
    joined = -(-len(counts) // _WANDB_BINS)
    first = np.arange(0, len(counts), joined)
    return np.add.reduceat(counts, first), np.append(edges[first], edges[-1])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys with dots and values as texts."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield _mlflow_name(f"{prefix}{name}"), str(value)[:_MLFLOW_LENGTH]


def _mlflow_name(name: str) -> str:
    """The name with characters that MLflow knows."""
    return re.sub(r"[^\w\-./ ]", "_", name)

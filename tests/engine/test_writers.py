"""Writers for experiment trackers: MLflow's own files, and what W&B is called with."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage, EventWriter, TensorboardXWriter

from contrast_d2.engine import DispensableWriter, MetricsWriter, load_config
from contrast_d2.engine import writers as module
from contrast_d2.engine.checks import check_config
from contrast_d2.engine.writers import MlflowWriter, WandbWriter, check_writers, open_writers

CONFIG = str(Path(__file__).parents[2] / "configs/shapes/semfpn_r18_ms_cs_demo.py")
PICTURE = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty one of MLflow, which takes seconds to make."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("alembic")
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a run which begins."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "my_run"
    folder.mkdir()
    (folder / "config.yaml").write_text("train: {max_iter: 7, best: a/b}\nlist: [1, 2]\n")
    (folder / "run.json").write_text(json.dumps({"commit": "abc", "processes": 2}))
    return folder


def put_and_write(writer: EventWriter, folder: Path) -> None:
    """Two steps with metrics; the first with a picture and histograms, written with the second."""
    others = TensorboardXWriter(str(folder))
    with EventStorage(3) as storage:
        storage.put_scalar("loss", 2.5)
        storage.put_scalar("contrast/res2/anchors", 7.0, smoothing_hint=False)
        writer.write()
        others.write()
        storage.step()
        storage.put_scalar("loss", 1.5)
        storage.put_image("dashboard/picture", PICTURE)
        storage.put_image("floats", PICTURE / np.float32(255))
        storage.put_histogram(
            "dashboard/res2/positive_similarity", torch.tensor([0.0, 0.1, 1.0]), 2
        )
        storage.put_histogram("fine", torch.linspace(-1, 1, 5000), 1000)
        storage.step()
        storage.put_scalar("loss", 1.0)
        writer.write()
        others.write()
        writer.write()  # nothing is new
    writer.close()
    others.close()


# --- MLflow itself.


@pytest.fixture
def mlflow_folder(folder: Path, database: Path) -> Path:
    shutil.copy(database, folder)
    return folder


def client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def the_run(folder: Path) -> Any:
    experiment = client(folder).get_experiment_by_name("contrast_d2")
    (run,) = client(folder).search_runs([experiment.experiment_id])
    return run


def test_mlflow_keeps_metrics_pictures_and_histograms(mlflow_folder: Path) -> None:
    put_and_write(MlflowWriter(str(mlflow_folder), resumed=False), mlflow_folder)
    run = the_run(mlflow_folder)
    assert run.info.run_name == "my_run" and run.info.status == "FINISHED"
    history = client(mlflow_folder).get_metric_history(run.info.run_id, "loss")
    # Medians of what there is so far, as in metrics.json.
    assert [(m.step, m.value) for m in history] == [(3, 2.5), (5, 1.5)]
    anchors = client(mlflow_folder).get_metric_history(run.info.run_id, "contrast/res2/anchors")
    assert [(m.step, m.value) for m in anchors] == [(3, 7.0)]
    artifacts = Path(run.info.artifact_uri.removeprefix("file://"))
    assert artifacts.is_relative_to(mlflow_folder / "mlartifacts")
    table = json.loads(
        (artifacts / "histograms/dashboard/res2/positive_similarity/4.json").read_text()
    )
    assert table == {"counts": [2.0, 1.0], "edges": [0.0, 0.5, 1.0]}
    images = [path.name for path in (artifacts / "images").glob("*.png")]
    assert len(images) == 2 and all(re.search(r"step.4\D", name) for name in images)


def test_mlflow_logs_config_and_record_once(mlflow_folder: Path) -> None:
    writer = MlflowWriter(str(mlflow_folder), resumed=False)
    writer.close()
    first = the_run(mlflow_folder)
    assert first.data.params == {
        "train.max_iter": "7",
        "train.best": "a/b",
        "list": "[1, 2]",
        "run.commit": "abc",
        "run.processes": "2",
    }
    artifacts = {x.path for x in client(mlflow_folder).list_artifacts(first.info.run_id)}
    assert artifacts == {"config.yaml", "run.json"}
    # A resumed run goes on in the same one, another training in the mlflow_folder has its own.
    put_and_write(MlflowWriter(str(mlflow_folder), resumed=True), mlflow_folder)
    assert the_run(mlflow_folder).data.metrics["loss"] == 1.5
    MlflowWriter(str(mlflow_folder), resumed=False).close()
    experiment = client(mlflow_folder).get_experiment_by_name("contrast_d2")
    assert len(client(mlflow_folder).search_runs([experiment.experiment_id])) == 2


def test_a_whole_config_can_be_logged(mlflow_folder: Path) -> None:
    from detectron2.config import LazyConfig

    LazyConfig.save(load_config(CONFIG, []), str(mlflow_folder / "config.yaml"))
    MlflowWriter(str(mlflow_folder), resumed=False).close()
    params = the_run(mlflow_folder).data.params
    assert len(params) > 100
    assert params["model._target_"] == "contrast_d2.segmentor.ContrastiveSegmentor"


def test_what_a_tracker_refuses_does_not_end_the_training(
    mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MlflowWriter(str(mlflow_folder), resumed=False)

    def refuse(*_args: Any, **_options: Any) -> None:
        raise ConnectionError("the server is gone")

    monkeypatch.setattr(writer._client, "log_batch", refuse)
    with caplog.at_level("WARNING", "contrast_d2"):
        put_and_write(writer, mlflow_folder)
    assert "the server is gone" in caplog.text


def test_a_server_that_is_not_there_is_told(
    mlflow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://somewhere")
    with pytest.raises(ValueError, match="MLflow does not start.*MLFLOW_TRACKING_URI"):
        MlflowWriter(str(mlflow_folder), resumed=False)


# --- W&B, whose package is too large for a test.


class FakeWandb:
    """The part of wandb that is used; refuses histograms as it does."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0

    def init(self, **options: Any) -> Any:
        self.inits.append(options)
        return SimpleNamespace(id=options["id"] or "new_id", log=self._log, finish=self._finish)

    def _log(self, values: dict[str, Any], step: int) -> None:
        assert not self.rows or step > self.rows[-1][0]  # W&B drops what comes too late
        self.rows.append((step, values))

    def _finish(self) -> None:
        self.finished += 1

    @staticmethod
    def Image(pixels: np.ndarray) -> tuple[str, np.ndarray]:
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        return "image", pixels

    @staticmethod
    def Histogram(np_histogram: tuple[np.ndarray, np.ndarray]) -> tuple[str, Any]:
        counts, edges = np_histogram
        assert len(edges) == len(counts) + 1 and len(counts) <= 512
        return "histogram", np_histogram


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_gets_metrics_pictures_and_histograms(folder: Path, wandb: FakeWandb) -> None:
    put_and_write(WandbWriter(str(folder), resumed=False), folder)
    (options,) = wandb.inits
    assert (options["project"], options["name"], options["id"]) == ("contrast_d2", "my_run", None)
    assert options["config"]["train"] == {"max_iter": 7, "best": "a/b"}
    assert options["config"]["run"] == {"commit": "abc", "processes": 2}
    assert [step for step, _ in wandb.rows] == [3, 4, 5] and wandb.finished == 1
    rows = dict(wandb.rows)
    assert rows[3] == {"loss": 2.5, "contrast/res2/anchors": 7.0} and rows[5] == {"loss": 1.5}
    for name in ("dashboard/picture", "floats"):
        kind, pixels = rows[4][name]
        assert kind == "image" and np.array_equal(pixels, PICTURE.transpose(1, 2, 0))
    kind, (counts, edges) = rows[4]["dashboard/res2/positive_similarity"]
    assert kind == "histogram" and counts.tolist() == [2, 1]
    assert edges.tolist() == pytest.approx([0, 0.5, 1])
    counts, edges = rows[4]["fine"][1]
    assert counts.sum() == 5000 and (edges[0], edges[-1]) == (-1, 1) and len(counts) == 500


def test_wandb_goes_on_in_the_run_it_knows(folder: Path, wandb: FakeWandb) -> None:
    WandbWriter(str(folder), resumed=False)
    WandbWriter(str(folder), resumed=True)
    WandbWriter(str(folder), resumed=False)
    assert [options["id"] for options in wandb.inits] == [None, "new_id", None]
    assert [options["resume"] for options in wandb.inits] == [None, "allow", None]


def test_wandb_without_a_login_is_told(
    folder: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_options: Any) -> None:
        raise FakeWandb.Error("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="no API key.*WANDB_MODE=offline"):
        WandbWriter(str(folder), resumed=False)


# --- The setting.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.writers=[nothing]", r"\['nothing'\]: choose from \['mlflow', 'wandb'\]"),
        ("train.writers=wandb", r"give a list, train.writers=\[wandb\]"),
        ("train.writers=[wandb]", r"not installed: pip install 'contrast_d2\[wandb\]'"),
        ("train.dashboard.period=0", "train.dashboard.period=0: needs at least 1"),
    ],
)
def test_mistakes_are_told_before_the_training(
    override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_config(load_config(CONFIG, [override]), training=True)


def test_the_writers_that_are_asked_for_are_opened(mlflow_folder: Path, wandb: FakeWandb) -> None:
    check_writers([])
    check_config(load_config(CONFIG, ["train.writers=[mlflow]"]), training=True)
    opened = open_writers(["wandb", "mlflow"], str(mlflow_folder), resumed=False)
    assert [type(writer) for writer in opened] == [WandbWriter, MlflowWriter]
    for writer in opened:
        writer.close()


# --- What a training can do without.


class Fails(EventWriter):
    """A writer whose disk or server is gone."""

    def write(self) -> None:
        raise OSError("the disk is gone")

    def close(self) -> None:
        raise ConnectionError("the server is gone")


def test_a_writer_that_fails_ends_no_training(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "contrast_d2"):
        put_and_write(DispensableWriter(Fails()), folder)
    assert "Fails: metrics are lost: the disk is gone" in caplog.text
    assert "Fails does not close: the server is gone" in caplog.text


def test_pictures_do_not_pile_up_for_a_writer_that_fails(folder: Path) -> None:
    hook = MetricsWriter(lambda: [DispensableWriter(Fails())], 1, str(folder))
    with EventStorage(0) as storage:
        hook.trainer = SimpleNamespace(iter=0, max_iter=9, storage=storage, catch_up=int)
        hook.before_train()
        storage.put_image("picture", PICTURE)
        hook.after_step()
        assert not storage._vis_data

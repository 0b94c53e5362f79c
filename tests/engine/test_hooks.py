"""The average of the weights, and metrics that a resume does not change."""

from __future__ import annotations

import itertools
import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase, hooks
from detectron2.utils.events import JSONWriter
from torch import nn

from contrast_d2.engine.hooks import MetricsWriter, WeightAverage

from ..tiny import tiny_contrast, tiny_segmentor
from .test_trainer import images, make


def average_of(model: nn.Module, decay: float) -> WeightAverage:
    """The hook in a training whose steps are not skipped."""
    average = WeightAverage(model, decay)
    average.trainer = SimpleNamespace(skipped=torch.zeros(()))
    return average


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def change(model: nn.Module) -> None:
    with torch.no_grad():
        for x in model.state_dict().values():
            x += torch.rand(x.shape) if x.is_floating_point() else 1


def test_the_average_is_that_of_its_definition() -> None:
    model, decay = network(), 0.7
    average = average_of(model, decay)
    expected: dict[str, torch.Tensor] = {}
    for _ in range(5):
        change(model)
        average.after_step()
        for name, x in model.state_dict().items():
            before = expected.get(name, x).double()
            expected[name] = decay * before + (1 - decay) * x.double()
    counter = "1.num_batches_tracked"
    assert average.average.keys() == expected.keys()
    for name, x in average.average.items():
        if name == counter:
            assert x == 5
        else:
            torch.testing.assert_close(x.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_the_average_stands_in_for_the_weights_and_goes_again() -> None:
    model = network()
    average = average_of(model, 0.9)
    for _ in range(3):
        change(model)
        average.after_step()
    own = {name: x.clone() for name, x in model.state_dict().items()}
    kept = {name: x.clone() for name, x in average.average.items()}
    assert not torch.equal(own["0.weight"], kept["0.weight"])
    with pytest.raises(RuntimeError, match="within"), average.applied():
        assert all(torch.equal(x, kept[name]) for name, x in model.state_dict().items())
        raise RuntimeError("within")
    assert all(torch.equal(x, own[name]) for name, x in model.state_dict().items())
    assert all(torch.equal(x, kept[name]) for name, x in average.average.items())


def test_the_average_continues_from_its_state() -> None:
    model = network()
    averages = [average_of(model, 0.5), average_of(model, 0.5)]
    change(model)
    averages[0].after_step()
    state = {"average": {n: x.clone() for n, x in averages[0].state_dict()["average"].items()}}
    averages[1].load_state_dict(state)
    change(model)
    for average in averages:
        average.after_step()
    assert all(torch.equal(x, averages[1].average[n]) for n, x in averages[0].average.items())


def test_only_what_is_left_at_test_time_is_averaged() -> None:
    model = tiny_segmentor(tiny_contrast())
    average = WeightAverage(model, 0.9)
    average.after_step()
    names = set(average.average)
    assert names == {name for name in model.state_dict() if not name.startswith("contrast.")}
    assert len(names) < len(model.state_dict())


def test_a_decay_out_of_range_is_refused(subtests: pytest.Subtests) -> None:
    for decay in [0.0, 1.0, -0.5, float("nan")]:
        with subtests.test(decay=decay):
            with pytest.raises(ValueError, match="train.ema_decay=.* None for no average"):
                WeightAverage(network(), decay)


# --- Metrics.

LENGTH = 31


class Scores(HookBase):
    """Puts scores now and then, as an evaluation does, at times that are not the writer's."""

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done % 7 == 0:
            self.trainer.storage.put_scalars(**{"score/mIoU": done / 3}, smoothing_hint=False)
        if self.trainer.iter == 1:
            self.trainer.storage.put_scalars(early=1.0)


class Kill(HookBase):
    """Ends the training after an iteration, as a kill right after its checkpoint does."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.state: dict[str, Any] = {}

    def after_step(self) -> None:
        if self.trainer.iter == self.at:
            state = {
                "model": self.trainer.model.state_dict(),
                "trainer": self.trainer.state_dict(),
            }
            self.state = deepcopy(state)
            raise KeyboardInterrupt


def rows(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("time")} for row in found]


def train(folder: Path, state: dict[str, Any] | None, stop_at: int | None) -> dict[str, Any]:
    """Trains, or continues, up to the end or to a kill.

    Returns:
        The state that it was killed in.
    """
    trainer = make(2)
    path = str(folder / "metrics.json")
    kill = Kill(stop_at)
    writer = MetricsWriter(lambda: [JSONWriter(path)], 5, str(folder))
    trainer.register_hooks([hooks.IterationTimer(), Scores(), writer, kill])
    if state:
        trainer.model.load_state_dict(state["model"])
        trainer.load_state_dict(state["trainer"])
    start = trainer.iter + 1 if state else 0
    trainer.data_loader = itertools.islice(images(2), start, None)
    try:
        trainer.train(start, LENGTH)
    except KeyboardInterrupt:
        with open(path, "a") as file:
            file.write('{"iteration": 99')  # a torn row
    return kill.state


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    folder = tmp_path_factory.mktemp("whole")
    train(folder, None, None)
    return rows(folder)


@pytest.mark.parametrize("stops", [(0,), (4,), (5, 6), (6, 13, 14), (9, 10, 11, 27), (29,), (30,)])
def test_a_resumed_run_writes_the_rows_of_a_whole_one(
    stops: tuple[int, ...], whole: list[dict[str, float]], tmp_path: Path
) -> None:
    state: dict[str, Any] = {}
    for stop in (*stops, None):
        state = train(tmp_path, state, stop)
    assert rows(tmp_path) == whole
    assert any("score/mIoU" in row for row in whole)

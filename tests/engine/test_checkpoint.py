"""Checkpoints and the choice of the best one."""

from __future__ import annotations

import logging
import math
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from detectron2.utils import comm
from torch import nn

from contrast_d2.decoders import FCNDecoder
from contrast_d2.engine import BestCheckpointer, Checkpointer
from contrast_d2.engine.checkpoint import find_resumable
from contrast_d2.engine.record import save_inference_weights
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor
from contrast_d2.weights import read_weights

from ..backbones.rows import detectron2_resnet18
from ..helpers import run_processes


def test_save_names_the_last_checkpoint_only_when_told(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    checkpointer = Checkpointer(model, str(tmp_path))
    checkpointer.save("model_0000004", iteration=4)
    checkpointer.save("model_best", is_last=False, iteration=5)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000004.pth")
    other = nn.Linear(2, 2)
    extra = Checkpointer(other, str(tmp_path)).load(checkpointer.get_checkpoint_file())
    assert torch.equal(other.weight, model.weight)
    assert extra["iteration"] == 4


class Average:
    """The state of a training that averages its weights."""

    def __init__(self, value: float) -> None:
        self._average = {"weight": torch.tensor([1.0, value])}

    def state_dict(self) -> dict[str, Any]:
        return {"hooks": {"WeightAverage": {"average": self._average}}}


def test_weights_that_are_not_finite_are_not_written(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for where in ("a weight", "a statistic", "the average"):
        with subtests.test(where=where):
            folder = tmp_path / where
            folder.mkdir()
            model = nn.BatchNorm1d(3)
            average = Average(math.nan if where == "the average" else 1.0)
            checkpointer = Checkpointer(model, str(folder), trainer=average)
            if where != "the average":
                checkpointer.save("model_0000001")
            before = sorted((path.name, path.read_bytes()) for path in folder.iterdir())
            with torch.no_grad():
                if where == "a weight":
                    model.weight[1] = math.nan
                if where == "a statistic":
                    model.running_var[2] = math.inf
            for name in ("model_0000002", "model_best", "model_final"):
                with pytest.raises(FloatingPointError, match=f"not finite, so {name}.pth"):
                    checkpointer.save(name, is_last=name != "model_best")
            if where != "the average":
                with pytest.raises(FloatingPointError, match="model_inference"):
                    save_inference_weights(model, str(folder))
            assert sorted((path.name, path.read_bytes()) for path in folder.iterdir()) == before


# --- What a folder can look like when a run is resumed in it.


class Iteration:
    """A state of a training that is one number."""

    def __init__(self, value: int = -1) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["value"]


def checkpointer_of(folder: Path) -> Checkpointer:
    checkpointer = Checkpointer(nn.Linear(40, 40), str(folder), trainer=Iteration())
    # Not the one of fvcore, which some tests detach from the root.
    checkpointer.logger = logging.getLogger("tests.checkpointer")
    return checkpointer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a run with checkpoints of iterations 1, 3 and 5, and that of its best one."""
    checkpointer = checkpointer_of(tmp_path)
    for iteration in (1, 3, 5):
        checkpointer.checkpointables["trainer"].value = iteration
        checkpointer.save(f"model_{iteration:07d}")
        os.utime(tmp_path / f"model_{iteration:07d}.pth", (iteration, iteration))
    checkpointer.save("model_best", is_last=False)
    return tmp_path


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


class MakesFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


NEWEST = "model_0000005.pth"
TAG = "last_checkpoint"
DAMAGE: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "none": (lambda f: None, 5, ""),
    "a file under a temporary name": (lambda f: (f / f"{NEWEST}.9.tmp").write_bytes(b"x"), 5, ""),
    "the last is missing": (lambda f: (f / NEWEST).unlink(), 3, "there is no such file"),
    "the last is empty": (lambda f: cut(f / NEWEST, 0), 3, "it is empty"),
    "one byte": (lambda f: cut(f / NEWEST, 1), 3, "is damaged"),
    "half": (lambda f: cut(f / NEWEST, 4000), 3, "it is damaged"),
    "all but a byte": (lambda f: cut(f / NEWEST, -1), 3, "it is damaged"),
    "a bit of a weight": (lambda f: flip(f / NEWEST, 4000), 3, "fails its checksum"),
    "no name of the last": (lambda f: (f / TAG).unlink(), 5, f"{TAG} is missing"),
    "an empty name": (lambda f: (f / TAG).write_text(""), 5, f"{TAG} is empty"),
    "a torn name": (
        lambda f: (f / TAG).write_text("model_00"),
        5,
        "model_00: there is no such file",
    ),
    "a folder": (
        lambda f: ((f / TAG).unlink(), (f / TAG).mkdir()),
        5,
        f"{TAG} is no file",
    ),
    "a name outside": (
        lambda f: (f / TAG).write_text("../model_0000001.pth"),
        5,
        "../model_0000001.pth, which is not in its folder",
    ),
    "file times of a copy": (
        lambda f: ((f / TAG).unlink(), os.utime(f / "model_0000001.pth", (9, 9))),
        5,
        f"{TAG} is missing",
    ),
    "an end before the last": (
        lambda f: (
            torch.save(
                torch.load(f / "model_0000003.pth") | {"iteration": 3}, f / "model_final.pth"
            ),
            (f / TAG).unlink(),
        ),
        5,
        f"{TAG} is missing",
    ),
    "bytes for a name": (
        lambda f: (f / TAG).write_bytes(b"\xff\xfe"),
        5,
        "there is no such file",
    ),
    "code": (lambda f: torch.save({"model": MakesFolder(f / "made")}, f / NEWEST), 3, "damaged"),
    "two of three": (
        lambda f: (cut(f / NEWEST, 100), flip(f / "model_0000003.pth", 4000)),
        1,
        "model_0000003.pth cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_resumed_from(
    damage: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    do, expected, said = DAMAGE[damage]
    do(folder)
    checkpointer = checkpointer_of(folder)
    checkpointer.resume_or_load("", resume=True)
    assert not (folder / "made").exists()
    assert checkpointer.checkpointables["trainer"].value == expected
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == bool(said)
    if said:  # names both
        assert said in warnings[0]
        assert str(folder / f"model_{expected:07d}.pth") in warnings[0]


def test_damage_to_all_checkpoints_is_no_new_start(folder: Path) -> None:
    for name in (NEWEST, "model_0000003.pth", "model_0000001.pth"):
        cut(folder / name, 2000)
    with pytest.raises(ValueError, match="000001.pth.*--resume"):
        find_resumable(str(folder))
    for path in folder.glob("model_0*"):
        path.unlink()
    with pytest.raises(ValueError, match=NEWEST):
        find_resumable(str(folder))
    (folder / TAG).unlink()  # no training got as far as a checkpoint
    assert find_resumable(str(folder)) == ""


def test_a_flipped_bit_is_found_or_does_nothing(folder: Path) -> None:
    path = folder / NEWEST
    content = path.read_bytes()
    whole = torch.load(path)
    rng = random.Random(0)
    found = 0
    for _ in range(200):
        flip(path, rng.randrange(len(content)), rng.randrange(8))
        try:
            state = read_weights(path)
        except ValueError:
            found += 1
        else:
            assert all(torch.equal(x, whole["model"][n]) for n, x in state["model"].items())
            assert state["trainer"] == whole["trainer"]
        path.write_bytes(content)
    assert found > 150  # the others are in padding between the parts


def test_what_is_no_state_of_this_training_is_not_resumed_from(folder: Path) -> None:
    torch.save({"model": nn.Linear(40, 40).state_dict()}, folder / NEWEST)
    with pytest.raises(ValueError, match="000005.pth.*trainer"):
        checkpointer_of(folder).resume_or_load("", resume=True)
    (folder / TAG).write_text("model_0000003.pth")
    other = Checkpointer(nn.Linear(40, 30), str(folder), trainer=Iteration())
    other.model.register_buffer("shared", torch.zeros(1))
    checkpointer_of(folder).save("model_0000003")
    with pytest.raises(ValueError, match="holds none of the model's|does not fit the model"):
        other.resume_or_load("", resume=True)


def found_by_all(folder: str) -> tuple[str, str]:
    """On two machines of which the second has an empty folder: before and after all is damaged."""
    here = folder if comm.is_main_process() else f"{folder}/elsewhere"
    found = find_resumable(here)
    comm.synchronize()
    if comm.is_main_process():
        for path in Path(folder).glob("model_0*"):
            cut(path, 10)
    try:
        find_resumable(here)
    except ValueError as error:
        return found, str(error)
    return found, ""


@pytest.mark.slow
def test_all_processes_resume_from_what_the_main_one_finds(folder: Path) -> None:
    answers = run_processes(found_by_all, 2, str(folder))
    assert answers[0] == answers[1]
    assert answers[0][0] == str(folder / NEWEST) and "no checkpoint to resume" in answers[0][1]


# --- detectron2's weights of its own ResNet, pickles of arrays.


def on_detectron2s_resnet() -> ContrastiveSegmentor:
    backbone = detectron2_resnet18()
    return ContrastiveSegmentor(
        backbone=backbone,
        sem_seg_head=FCNDecoder(backbone.output_shape(), num_classes=3, hidden_channels=8),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
        seg_loss=SegLoss(CrossEntropyLoss()),
    )


def caffe2_name(name: str) -> str:
    """Of a weight of detectron2's ResNet, in the files of its model zoo."""
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
    name = name.replace("shortcut", "branch1").replace("conv1.", "branch2a.", "res" in name)
    name = name.replace("conv2.", "branch2b.").replace(".norm", "_bn")
    endings = {"bn.weight": "bn_s", "bn.bias": "bn_b", "running_mean": "rm", "running_var": "riv"}
    for ending, other in {**endings, ".weight": "_w"}.items():
        name = re.sub(rf"{re.escape(ending)}$", other, name)
    return name.replace(".", "_")


@pytest.fixture(params=["torchvision", "Caffe2"])
def imagenet_weights(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict]:
    """A file as detectron2 converts torchvision's, or as its model zoo has them; and its arrays by
    detectron2's names."""
    arrays = {
        name: np.random.rand(*x.shape).astype(np.float32)
        for name, x in detectron2_resnet18().state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    path = tmp_path / "R-18.pkl"
    if request.param == "torchvision":
        # With weights of a classifier that no model of this project has.
        model = {**arrays, "stem.fc.weight": np.zeros((10, 512), np.float32)}
        data = {"model": model, "__author__": "torchvision", "matching_heuristics": True}
    else:
        data = {caffe2_name(name): x for name, x in arrays.items()}
        data["conv1_w_momentum"] = data["conv1_w"]
    path.write_bytes(pickle.dumps(data))
    return path, arrays


def test_detectron2s_imagenet_weights_fill_its_resnet(
    imagenet_weights: tuple[Path, dict], tmp_path: Path
) -> None:
    path, arrays = imagenet_weights
    model = on_detectron2s_resnet()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    checkpointer = Checkpointer(model, str(tmp_path), allow_pickle=True)
    checkpointer.resume_or_load(str(path), resume=True)
    after = model.state_dict()
    for name, array in arrays.items():
        assert torch.equal(after[f"backbone.{name}"], torch.from_numpy(array)), name
    others = {name for name in after if name.removeprefix("backbone.") not in arrays}
    assert all(torch.equal(after[name], before[name]) for name in others)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["R-50.pkl", "resnet.pyth"])
def test_a_pickle_is_read_only_when_allowed(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps({"model": Harmful(tmp_path / "made"), "__author__": "x"}))
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    for load in (checkpointer.check_file, checkpointer.load, checkpointer.load_for_inference):
        with pytest.raises(ValueError, match=f"{name}: .*set train.allow_pickle=True"):
            load(str(path))
    with pytest.raises(ValueError, match="set train.allow_pickle=True"):
        checkpointer.load("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert not (tmp_path / "made").exists()


def test_weights_of_another_architecture_are_no_start(tmp_path: Path) -> None:
    torch.save({"model": {"conv.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    checkpointer = Checkpointer(nn.Linear(2, 2), str(tmp_path / "run"))
    with pytest.raises(ValueError, match="other.pth.*bias"):
        checkpointer.load(str(tmp_path / "other.pth"), checkpointables=[])
    # Some do: those of the same shape are taken, as for a new number of classes.
    torch.save({"model": {"bias": torch.ones(2)}}, tmp_path / "part.pth")
    checkpointer.load(str(tmp_path / "part.pth"), checkpointables=[])
    assert torch.equal(checkpointer.model.bias, torch.ones(2))


# --- The best checkpoint.


class Scores(TrainerBase):
    """A training whose evaluations give fixed scores."""

    def run_step(self) -> None:
        pass


@pytest.mark.parametrize("resume_at", [None, 4])
def test_the_best_is_remembered_over_a_resume(tmp_path: Path, resume_at: int | None) -> None:
    scores = {2: 10.0, 4: 30.0, 6: 20.0, 8: 25.0}

    def trainer() -> tuple[Scores, BestCheckpointer]:
        loop = Scores()
        best = BestCheckpointer(Checkpointer(nn.Linear(1, 1), str(tmp_path)), "sem_seg/mIoU", 2)
        evaluate = hooks.EvalHook(2, lambda: {"sem_seg": {"mIoU": scores[_done(loop)]}})
        loop.register_hooks([evaluate, best])
        return loop, best

    loop, best = trainer()
    if resume_at is not None:
        # The first part ends without the last evaluation, as a killed run does.
        loop.max_iter = 8
        with pytest.raises(KeyboardInterrupt):
            loop.before_step = lambda: _interrupt(loop, resume_at)
            TrainerBase.train(loop, 0, 8)
        state = loop.state_dict()
        loop, best = trainer()
        loop.load_state_dict(state)
        assert best.best == 30.0
    loop.train(resume_at or 0, 8)
    saved = torch.load(tmp_path / "model_best.pth")
    assert best.best == 30.0
    assert saved["iteration"] == 3


def _done(loop: TrainerBase) -> int:
    return min(loop.iter + 1, loop.max_iter)


def _interrupt(loop: TrainerBase, at: int) -> None:
    TrainerBase.before_step(loop)
    if loop.iter == at:
        raise KeyboardInterrupt

"""Checkpoints and the choice of the best one."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from torch import nn

from contrast_d2.decoders import FCNDecoder
from contrast_d2.engine import BestCheckpointer, Checkpointer
from contrast_d2.engine.checkpoint import write_atomically
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor

from ..backbones.rows import detectron2_resnet18


def test_a_failed_write_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half of the new")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(str(path), fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


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
    with pytest.raises(ValueError, match="other.pth holds none of the model's .* such as bias"):
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

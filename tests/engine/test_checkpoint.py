"""Checkpoints and the choice of the best one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from detectron2.engine import TrainerBase, hooks
from torch import nn

from contrast_d2.engine import BestCheckpointer, Checkpointer
from contrast_d2.engine.checkpoint import write_atomically


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

"""The training step: accumulation, clipping, precision, the stop on a loss that is not finite."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator

import pytest
import torch
from detectron2.engine import HookBase, hooks
from torch import nn

from contrast_d2.engine import NonFiniteLossError, Trainer
from contrast_d2.engine.trainer import Batch
from contrast_d2.files import DiskFullError


class TwoLosses(nn.Module):
    """A linear model whose losses are means over the images of a batch."""

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.linear = nn.Linear(4, 3)
        self.dtypes: list[torch.dtype] = []

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        x = torch.stack([image["image"] for image in batch])
        y = self.linear(x)
        self.dtypes.append(y.dtype)
        y = y.float()
        return {
            "loss_sem_seg": self.loss_weight * y.square().mean(),
            "loss_contrast_res2": 0.1 * self.loss_weight * y.abs().mean(),
        }


def images(size: int, seed: int = 0) -> Iterator[Batch]:
    """Endless batches; the stream of images does not depend on the size of a batch."""
    generator = torch.Generator().manual_seed(seed)
    for i in itertools.count():
        yield [
            {"image": torch.randn(4, generator=generator), "file_name": f"image_{size * i + j}.png"}
            for j in range(size)
        ]


def make(batch_size: int, *, loss_weight: float = 1.0, **options) -> Trainer:
    torch.manual_seed(1)
    model = TwoLosses(loss_weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, images(batch_size), optimizer, seed=0, **options)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_accumulated_batches_make_the_step_of_one_large_batch() -> None:
    whole, parts = make(4), make(2, accumulation_steps=2)
    whole.train(0, 3)
    parts.train(0, 3)
    torch.testing.assert_close(weights(whole), weights(parts))
    assert len(parts.model.dtypes) == 6


def test_the_loss_dict_is_stored_and_summed() -> None:
    trainer = make(2)
    trainer.train(0, 1)
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["total_loss"] == pytest.approx(
        latest["loss_sem_seg"] + latest["loss_contrast_res2"]
    )
    assert latest["data_time"] >= 0


def test_statistics_are_averaged_over_the_batches_that_have_them() -> None:
    trainer = make(2, accumulation_steps=3, clip_norm=1.0)
    forward = trainer.model.forward
    values = iter([1.0, math.nan, 4.0])

    def leave_statistics(batch: Batch) -> dict[str, torch.Tensor]:
        trainer.model.statistics = {
            "contrast/res2/anchors": torch.tensor(next(values)),
            "contrast/res2/negative_similarity": torch.tensor(math.nan),
            "contrast/res2/classes": torch.tensor(7),
        }
        return forward(batch)

    trainer.model.forward = leave_statistics
    trainer.train(0, 1)
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["contrast/res2/anchors"] == 2.5
    assert latest["contrast/res2/classes"] == 7
    assert "contrast/res2/negative_similarity" not in latest
    assert set(latest) >= {"loss_sem_seg", "loss_contrast_res2", "total_loss", "grad_norm"}
    assert latest["total_loss"] == pytest.approx(
        latest["loss_sem_seg"] + latest["loss_contrast_res2"]
    )


def test_clipping_bounds_the_step_and_reports_the_norm_before() -> None:
    free, clipped = make(2), make(2, clip_norm=0.01)
    start = weights(free)
    free.train(0, 1)
    clipped.train(0, 1)
    norm = clipped.storage.latest()["grad_norm"][0]
    assert norm == pytest.approx(((weights(free) - start) / 0.1).norm().item(), rel=1e-4)
    assert norm > 0.01
    assert ((weights(clipped) - start) / 0.1).norm().item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("amp_dtype", "dtype"),
    [(None, torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_sets_the_dtype_of_the_products(amp_dtype: str | None, dtype: torch.dtype) -> None:
    # Small enough that the loss scaler of fp16 does not overflow.
    trainer, exact = make(4, amp_dtype=amp_dtype, loss_weight=0.02), make(4, loss_weight=0.02)
    trainer.train(0, 3)
    exact.train(0, 3)
    assert set(trainer.model.dtypes) == {dtype}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    torch.testing.assert_close(weights(trainer), weights(exact), rtol=0.05, atol=0.01)
    assert trainer.state_dict()["scaler"].get("scale") == (65536.0 if amp_dtype == "fp16" else None)


def test_an_overflow_of_scaled_fp16_gradients_skips_the_step_and_goes_on() -> None:
    trainer = make(4, amp_dtype="fp16", loss_weight=30.0, clip_norm=1.0)
    before = weights(trainer)
    trainer.train(0, 1)
    assert torch.equal(weights(trainer), before)
    assert trainer.state_dict()["scaler"]["scale"] == 32768.0
    trainer.train(1, 8)
    assert not torch.equal(weights(trainer), before)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched() -> None:
    trainer = make(2, accumulation_steps=2)
    before = weights(trainer)

    def poisoned() -> Iterator[Batch]:
        for i, batch in enumerate(images(2)):
            if i == 1:
                batch[0]["image"] = torch.full((4,), torch.inf)
            yield batch

    trainer.data_loader = poisoned()
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train(0, 1)
    report = str(caught.value)
    assert "iteration 0" in report
    assert "loss_contrast_res2 = nan" in report and "batch 1 of 2" in report
    assert "image_2.png, image_3.png" in report
    assert "image_0.png" not in report
    assert torch.equal(weights(trainer), before)


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1))

        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"loss_sem_seg": self.x.sqrt().sum()}

    model = Root()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, images(1), optimizer, seed=0, clip_norm=1.0)
    with pytest.raises(NonFiniteLossError, match="gradient's norm is inf.*image_0.png"):
        trainer.train(0, 1)
    assert model.x.item() == 0


def test_the_random_numbers_of_a_step_depend_on_the_iteration_alone() -> None:
    drawn: dict[int, list[float]] = {}

    class Random(TwoLosses):
        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            drawn.setdefault(len(self.dtypes), []).append(torch.rand(()).item())
            return super().forward(batch)

    for start in (0, 2):
        model = Random()
        model.dtypes.extend([torch.float32] * start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.rand(start)  # whatever was drawn before must not matter
        Trainer(model, images(1), optimizer, seed=5).train(start, 4)
    assert len({values[0] for values in drawn.values()}) == 4
    assert drawn[2][0] == drawn[2][1] and drawn[3][0] == drawn[3][1]


def test_bad_settings(subtests: pytest.Subtests) -> None:
    for options, message in [
        ({"amp_dtype": "fp8"}, "train.amp.dtype='fp8'"),
        ({"accumulation_steps": 0}, "train.accumulation_steps=0"),
        ({"clip_norm": 0.0}, "train.clip_norm=0.0"),
    ]:
        with subtests.test(options=options):
            with pytest.raises(ValueError, match=message):
                make(1, **options)


def test_a_resume_with_another_seed_is_refused() -> None:
    state = make(1).state_dict()
    model = TwoLosses()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has seed 0"):
        Trainer(model, images(1), optimizer, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="train.seed=-1"):
        Trainer(model, images(1), optimizer, seed=-1)


def test_a_model_left_in_eval_mode_is_our_bug() -> None:
    trainer = make(1)
    trainer.before_step = trainer.model.eval
    with pytest.raises(RuntimeError, match="eval mode"):
        trainer.train(0, 1)


class Ends(HookBase):
    """Raises an error after an iteration."""

    def __init__(self, at: int, error: Exception) -> None:
        self.at = at
        self.error = error

    def after_step(self) -> None:
        if self.trainer.iter == self.at:
            raise self.error


@pytest.mark.parametrize(
    ("error", "traceback"), [(DiskFullError("no room"), False), (RuntimeError("a defect"), True)]
)
def test_only_a_defect_leaves_a_traceback(error: Exception, traceback: bool) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append
    loop_logger = logging.getLogger("detectron2.engine.train_loop")
    loop_logger.addHandler(handler)
    trainer = make(2)
    trainer.register_hooks([Ends(0, error)])
    try:
        with pytest.raises(type(error)):
            trainer.train(0, 3)
    finally:
        loop_logger.removeHandler(handler)
    assert any(record.exc_info for record in logged) == traceback
    assert not loop_logger.filters


def test_the_last_evaluation_is_that_of_a_finished_training() -> None:
    """It takes minutes, and none of them are for a run that failed in its last iteration."""
    calls: list[int] = []

    def trainer(*more: HookBase) -> Trainer:
        loop = make(2)
        loop.register_hooks([hooks.EvalHook(0, lambda: calls.append(loop.storage.iter)), *more])
        return loop

    with pytest.raises(DiskFullError):
        trainer(Ends(2, DiskFullError("no room"))).train(0, 3)
    assert calls == []
    trainer().train(0, 3)
    # Resumed from the checkpoint of the last iteration there is no step left.
    trainer().train(3, 3)
    assert calls == [3, 3]


def test_the_loss_scaler_is_part_of_what_is_resumed() -> None:
    state = make(2, amp_dtype="fp16").state_dict()
    assert state["scaler"]["scale"] > 1
    with pytest.raises(ValueError, match="was trained with train.amp.dtype=fp16"):
        make(2).load_state_dict(state)
    with pytest.raises(ValueError, match="was trained without train.amp.dtype=fp16"):
        make(2, amp_dtype="fp16").load_state_dict(make(2).state_dict())
    state["scaler"]["scale"] = 128.0
    other = make(2, amp_dtype="fp16")
    other.load_state_dict(state)
    assert other.state_dict()["scaler"]["scale"] == 128.0

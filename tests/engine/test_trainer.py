"""The training step: accumulation, clipping, precision, the stop on a loss that is not finite."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import pytest
import torch
from bench.host_reads import HostReads
from detectron2.engine import HookBase, hooks
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import nn
from torch.optim import SGD, AdamW

import contrast_d2.engine.trainer as trainer_module
from contrast_d2.engine import NonFiniteLossError, Trainer, WeightAverage
from contrast_d2.engine.trainer import MOST_SKIPPED, Batch
from contrast_d2.files import DiskFullError

from ..helpers import HostWaits
from ..tiny import NUM_CLASSES, tiny_contrast, tiny_segmentor

Optimizer = Callable[..., torch.optim.Optimizer]


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


def make(
    batch_size: int, *, loss_weight: float = 1.0, optimizer: Optimizer | None = None, **options
) -> Trainer:
    torch.manual_seed(1)
    model = TwoLosses(loss_weight)
    optimizer = (optimizer or partial(SGD, lr=0.1, momentum=0.9))(model.parameters())
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


def with_root(trainer: Trainer, at: int) -> None:
    """Adds a root at 0 to a loss, whose gradient alone is infinite, in one iteration."""
    forward = trainer.model.forward

    def new_forward(batch: Batch) -> dict[str, torch.Tensor]:
        losses = forward(batch)
        if trainer.iter == at:
            root = (0 * trainer.model.linear.weight).abs().sum().sqrt()
            losses["loss_sem_seg"] = losses["loss_sem_seg"] + root
        return losses

    trainer.model.forward = new_forward


def state_of(trainer: Trainer) -> list[torch.Tensor]:
    """Copies of weights and of the optimizer's state."""
    state = [x for s in trainer.optimizer.state.values() for x in s.values()]
    return [x.detach().clone() for x in [*trainer.model.parameters(), *state]]


class Remembers(HookBase):
    """Keeps copies of weights and state after each iteration."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []

    def after_step(self) -> None:
        self.states.append(state_of(self.trainer))


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd, fused": partial(SGD, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adamw, fused": partial(AdamW, lr=0.1, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"amp_dtype": "bf16"}], ids=str)
def test_a_gradient_that_is_not_finite_stops_before_anything_changes(
    optimizer: Optimizer, options: dict
) -> None:
    """Also in the step after it, which is queued by then, and with decay and momentum."""
    trainer = make(1, optimizer=optimizer, **options)
    with_root(trainer, at=2)
    remembers = Remembers()
    trainer.register_hooks([remembers])
    with pytest.raises(NonFiniteLossError, match="iteration 2:.*norm is (inf|nan).*image_2.png"):
        trainer.train(0, 6)
    assert trainer.iter == 3  # while which is queued the host hears of it
    good = remembers.states[1]
    assert len(good) > 2 and not torch.equal(good[0], remembers.states[0][0])
    assert all(map(torch.equal, remembers.states[2], good))
    assert all(map(torch.equal, state_of(trainer), good))


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_first_step_that_is_skipped_leaves_nothing(
    optimizer: Optimizer, request: pytest.FixtureRequest
) -> None:
    """As it often is in fp16. The momentum of torch's fused SGD would be what memory held."""
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with nan
    request.addfinalizer(partial(torch.use_deterministic_algorithms, False))
    skipping = make(2, optimizer=optimizer, amp_dtype="fp16", loss_weight=0.02)
    with_root(skipping, at=0)
    before = weights(skipping)
    skipping.train(0, 1)
    assert torch.equal(weights(skipping), before)
    skipping.data_loader = images(2)
    skipping.train(1, 5)
    other = make(2, optimizer=optimizer, amp_dtype="fp16", loss_weight=0.02)
    other.train(1, 5)
    torch.testing.assert_close(weights(skipping), weights(other), rtol=1e-3, atol=1e-4)
    assert all(map(torch.Tensor.isfinite, [x.sum() for x in state_of(skipping)]))


def test_a_skipped_step_leaves_the_average_of_the_weights() -> None:
    trainer = make(2, amp_dtype="fp16", loss_weight=0.02)
    with_root(trainer, at=3)
    average = WeightAverage(trainer.model, 0.5)
    seen: list[torch.Tensor] = []

    class Sees(HookBase):
        def after_step(self) -> None:
            seen.append(average.average["linear.weight"].clone())

    trainer.register_hooks([average, Sees()])
    trainer.train(0, 5)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [False, False, True, False]


def test_training_in_fp16_ends_after_many_skips_in_a_row(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(1, amp_dtype="fp16", loss_weight=0.02)
    monkeypatch.setattr(trainer_module.logger, "propagate", True)
    forward, good = trainer.model.forward, weights(trainer)

    def overflows(batch: Batch) -> dict[str, torch.Tensor]:
        losses = forward(batch)
        # All but one in the middle: they have to come in a row.
        factor = 1e30 if trainer.iter != 5 else 1.0
        return {n: x + factor * 0 * x + (x - x.detach()) * factor for n, x in losses.items()}

    trainer.model.forward = overflows
    with caplog.at_level(logging.INFO), pytest.raises(NonFiniteLossError) as caught:
        trainer.train(0, 100)
    assert f"in {MOST_SKIPPED} steps in a row" in str(caught.value)
    assert f"iteration {5 + MOST_SKIPPED}:" in str(caught.value)
    skips = [r for r in caplog.records if "overflows fp16 at a loss scale" in r.message]
    assert len(skips) == 5 + MOST_SKIPPED
    assert "iteration 1:" in skips[1].message and "32768" in skips[1].message
    scales = dict.fromkeys(x for x, _ in trainer.storage.history("loss_scale").values())
    assert list(scales)[:3] == [65536, 32768, 16384]
    assert "grad_norm" in trainer.storage.latest()
    assert not torch.equal(weights(trainer), good)  # by the one step


def test_the_host_reads_a_step_while_the_next_one_is_queued() -> None:
    trainer = make(2)
    forward, known = trainer.model.forward, []

    def looks(batch: Batch) -> dict[str, torch.Tensor]:
        known.append(trainer.storage.latest().get("total_loss", (None, None))[1])
        return forward(batch)

    trainer.model.forward = looks
    trainer.train(0, 4)
    assert known == [None, None, 0, 1]
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 2, 3]
    losses = [x for x, _ in trainer.storage.history("total_loss").values()]
    for stop in range(1, 5):
        shorter = make(2)
        shorter.train(0, stop)
        assert shorter.storage.latest()["total_loss"] == (losses[stop - 1], stop - 1)


@pytest.mark.parametrize("amp_dtype", [None, "bf16", "fp16"])
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_waits_for_nothing(amp_dtype: str | None, clip_norm: float | None) -> None:
    """Trainer, segmentor, losses, contrast, optimizer and hooks, as far as a CPU can tell."""
    model = tiny_segmentor(tiny_contrast())
    batch = [
        {
            "image": torch.randint(0, 256, (3, height, 64), dtype=torch.uint8),
            "sem_seg": torch.randint(0, NUM_CLASSES, (height, 64), dtype=torch.uint8),
        }
        for height in (64, 56)
    ]
    optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    trainer = Trainer(
        model,
        itertools.repeat(batch),
        optimizer,
        seed=0,
        amp_dtype=amp_dtype,
        clip_norm=clip_norm,
        accumulation_steps=2,
    )
    waits = HostReads()

    class Counts(HookBase):
        def before_step(self) -> None:
            waits.__enter__()

    class EndsCount(HookBase):
        def after_step(self) -> None:
            waits.__exit__(None, None, None)

    schedule = hooks.LRScheduler(scheduler=CosineParamScheduler(1.0, 0.5))
    average = WeightAverage(model, 0.9)
    trainer.register_hooks([Counts(), hooks.IterationTimer(), schedule, average, EndsCount()])
    start = model.sem_seg_head.predictor.weight.detach().clone()
    trainer.train(0, 5)
    assert waits.calls == []
    baseline = tiny_segmentor()
    with HostWaits() as copies:  # which sees copies to the device too
        baseline(batch)
    assert copies.calls == []
    assert not torch.equal(model.sem_seg_head.predictor.weight, start)
    trainer.optimizer = SGD(model.parameters(), lr=1e-3)  # and it would be noticed
    trainer.train(0, 1)
    assert waits.calls


def test_a_state_is_not_that_of_a_step_that_failed() -> None:
    """What is written to disk asks for it, and so is not written."""
    trainer = make(1)
    with_root(trainer, at=1)

    class Saves(HookBase):
        def after_step(self) -> None:
            saved.append(self.trainer.state_dict()["iteration"])

    saved: list[int] = []
    trainer.register_hooks([Saves()])
    with pytest.raises(NonFiniteLossError):
        trainer.train(0, 3)
    assert saved == [0]


def test_a_state_takes_the_layout_of_the_weights() -> None:
    """A fused kernel runs over weights and momentum as they lie in memory."""
    results, state = [], {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        optimizer = SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
        trainer = Trainer(model, [], optimizer, seed=0)
        if state:
            trainer.load_state_dict(state)
        for _ in range(2 - len(results)):
            model.weight.grad = (
                torch.arange(108.0).view(4, 3, 3, 3).clone(memory_format=memory_format)
            )
            before = model.weight.detach().clone()
            optimizer.step()
            state = state or deepcopy(trainer.state_dict())
        results.append(model.weight.detach() - before)
    assert results[0].abs().max() > 0.1
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


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

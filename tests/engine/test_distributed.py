"""Two gloo processes take the step of one process with the whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase, create_ddp_model
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from contrast_d2.contrast import BalancedSampler, MultiScaleContrast, MultiScaleProjector
from contrast_d2.decoders import SemSegFPNDecoder
from contrast_d2.engine import NonFiniteLossError, Trainer
from contrast_d2.engine.trainer import Batch
from contrast_d2.losses import CrossEntropyLoss, SegLoss
from contrast_d2.segmentor import ContrastiveSegmentor
from tests.helpers import run_processes


class WithoutBatchNorm(Backbone):
    """Two maps, of strides 4 and 8, that depend on each image alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.down = nn.Conv2d(8, 16, 2, stride=2)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.stem(images).tanh()
        return {"res2": fine, "res3": self.down(fine).tanh()}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {
            "res2": ShapeSpec(channels=8, stride=4),
            "res3": ShapeSpec(channels=16, stride=8),
        }


def build(across_processes: bool) -> ContrastiveSegmentor:
    torch.manual_seed(3)
    backbone = WithoutBatchNorm()
    contrast = MultiScaleContrast(
        MultiScaleProjector({"res2": 8, "res3": 16}, 8, num_hidden=0),
        # So large a least number that every pixel is drawn: the draw is then the same everywhere.
        BalancedSampler(4, min_per_class=1000),
        scale_weights={"res2": 1.0, "res3": 0.5},
        cross_scale=[("res2", "res3", 1.0)],
        weight=1.0,
        across_processes=across_processes,
    )
    return ContrastiveSegmentor(
        backbone=backbone,
        sem_seg_head=SemSegFPNDecoder(
            backbone.output_shape(), num_classes=4, fpn_channels=8, conv_dims=32
        ),
        pixel_mean=[0.5] * 3,
        pixel_std=[1.0] * 3,
        seg_loss=SegLoss(CrossEntropyLoss()),
        contrast=contrast,
    )


def batches(start: int, rank: int, world_size: int) -> Iterator[Batch]:
    """The images of one process. No pixel is ignored, so that means over pixels average alike."""
    for step in itertools.count(start):
        generator = torch.Generator().manual_seed(step)
        batch = [
            {
                "image": torch.rand(3, 32, 32, generator=generator),
                "sem_seg": torch.randint(0, 4, (8, 8), generator=generator)
                .repeat_interleave(4, 0)
                .repeat_interleave(4, 1),
                "file_name": str(i),
            }
            for i in range(4)
        ]
        yield batch[rank::world_size]


def train_two_steps() -> dict[str, Tensor]:
    """Weights and losses after two steps, on however many processes there are."""
    distributed = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    model = build(across_processes=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = Trainer(
        create_ddp_model(model, device_ids=None, broadcast_buffers=False),
        batches(0, rank, world_size),
        optimizer,
        seed=0,
    )
    trainer.train(0, 2)
    losses = {
        name: torch.tensor(value)
        for name, (value, _) in trainer.storage.latest().items()
        if name.startswith("loss")
    }
    return {**model.state_dict(), **losses}


def test_two_processes_equal_one() -> None:
    alone = train_two_steps()
    first, second = run_processes(train_two_steps, 2)
    start = build(across_processes=True).state_dict()
    assert not torch.allclose(start["backbone.stem.weight"], alone["backbone.stem.weight"])
    assert alone["loss_contrast_res2_res3"] > 0
    for name, value in alone.items():
        # fp32, summed in another order
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)
        assert torch.equal(first[name], second[name]), name


def train_with_an_infinite_image() -> dict[str, Any]:
    """What is left of a training in which the second process has one in its second step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    states: list[Tensor] = []

    def poisoned() -> Iterator[Batch]:
        for step, batch in enumerate(batches(0, rank, world_size)):
            if (step, rank) == (1, 1):
                batch[0]["image"].fill_(torch.inf)
            yield batch

    model = build(across_processes=False)

    class Remembers(HookBase):
        def after_step(self) -> None:
            states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, fused=True)
    ddp = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
    trainer = Trainer(ddp, poisoned(), optimizer, seed=0)
    trainer.register_hooks([Remembers()])
    try:
        trainer.train(0, 4)
    except NonFiniteLossError as error:
        return {"weights": torch.stack(states), "report": str(error)}
    return {}


def test_a_loss_that_is_not_finite_stops_all_processes_at_once() -> None:
    first, second = run_processes(train_with_an_infinite_image, 2)
    assert "iteration 1: a loss is not finite on another process" in first["report"]
    assert "iteration 1: the loss is not finite" in second["report"]
    assert torch.equal(first["weights"], second["weights"])
    after_first, after_second = first["weights"]
    assert torch.equal(after_first, after_second) and after_first.isfinite().all()

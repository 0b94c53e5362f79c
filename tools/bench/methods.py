"""Measures what contrast methods add to a training step, from experiment files.

Shape letters: B images, H W an image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .machine import Probes, Say, interleave, milliseconds, multiplies_bf16, ratios, warning
from .scenes import IGNORE_LABEL, Scene, draw_labels
from .workloads import Contender

_AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
PRECISIONS = tuple(_AUTOCAST_DTYPES)


@dataclass(frozen=True)
class MethodStep:
    """A training step of the segmentors of experiment files, on one batch, updates included.

    What stays in memory from step to step (weights, other state and that of the optimizer) counts
    as part of the peak.

    Attributes:
        files: the experiment files by name. They must be of one dataset and crop size.
        scene: B, H, W and the look of generated labels, under random images.
        precision: "fp32", or autocast to "bf16".
        compiled: by `torch.compile`.
        channels_last: weights and maps in that format, as `train.channels_last` has them.
    """

    files: Mapping[str, str]
    scene: Scene
    precision: str = "fp32"
    compiled: bool = False
    channels_last: bool = False

    def contenders(self, device: torch.device, names: Sequence[str]) -> dict[str, Contender]:
        """A training step of each named file's model."""
        batch = self._batch()
        runs = {}
        for name in names:
            model = self.model(name).to(device)
            if self.channels_last:
                model = model.to(memory_format=torch.channels_last)
            run = torch.compile(model) if self.compiled else model
            compute = partial(_training_losses, run, batch, device, self.precision)
            optimizer = _optimizer(self.files[name], model)
            runs[name] = _UpdatingContender(compute, model, optimizer)
        return runs

    def gradient_bytes(self) -> int:
        """Bytes of the outputs: 0 here, where gradients count as part of the step."""
        return 0

    def model(self, name: str) -> nn.Module:
        """The model of a file, past its warm-up."""
        torch.manual_seed(0)
        # Imported here: the measurements of the contrastive step do without detectron2.
        from detectron2.config import instantiate

        return instantiate(experiment(self.files[name]).model).train()

    def _batch(self) -> list[dict[str, Any]]:
        config = experiment(next(iter(self.files.values())))
        scene = self.scene
        generator = torch.Generator().manual_seed(scene.seed)
        size = (scene.batch, 3, scene.height, scene.width)
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        labels = draw_labels(scene)
        labels[labels == IGNORE_LABEL] = config.dataset.ignore_label
        return [
            {"image": image, "sem_seg": label} for image, label in zip(images, labels, strict=True)
        ]


class _UpdatingContender(Contender):
    """A training step with its update.

    Args:
        compute: returns the loss, 0-dim.
        model: whose parameters are updated.
        optimizer: of them.
    """

    def __init__(
        self, compute: Callable[[], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(compute, list(model.parameters()))
        self._model = model
        self._optimizer = optimizer

    def __call__(self) -> Tensor:
        """Forward, backward and update; returns the loss."""
        loss = super().__call__()
        self._optimizer.step()
        return loss

    def settle(self) -> int:
        """Runs once, which makes the optimizer's state; bytes of it and of the model's."""
        self()
        states = self._optimizer.state.values()
        state = [x for each in states for x in each.values() if isinstance(x, Tensor)]
        kept = [*self._model.parameters(), *self._model.buffers(), *state]
        return sum(x.nbytes for x in kept)


def measure_step(
    work: MethodStep,
    device: torch.device,
    *,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measures time, peak memory and parameters.

    Args:
        work: the first of its files is the baseline.
        device: where.
        rounds: how often each method runs, at most.
        most_seconds: about how long is timed, unless that is less than five rounds.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: by file the time of a step (ms), its ratio to the baseline's, peak memory
        beyond inputs (MiB), and parameters in training.

    Raises:
        ValueError: the device emulates products of the step's precision.
    """
    from .worker import peak_mib

    if work.precision == "bf16" and not multiplies_bf16(device):
        raise ValueError(
            f"precision bf16 on {device.type}: it emulates the products, some 100 times slower "
            "than in fp32. Measure fp32."
        )
    names = list(work.files)
    say(f"\na training step of {', '.join(names)}")
    timings = interleave(
        work.contenders(device, names),
        Probes(device),
        device,
        rounds=rounds,
        most_seconds=most_seconds,
    )
    busy = warning(timings)
    if busy:
        say(busy)
    # A process for each: what one leaves in the heap would serve the next.
    memory = {name: peak_mib([(work, [name])], device)[0][name] for name in names}
    methods = {}
    for name, seconds in timings.seconds.items():
        model = work.model(name)
        row = {
            "ms": milliseconds(seconds),
            "times_baseline": ratios(seconds, timings.seconds[names[0]]),
            "peak_mib": memory[name],
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        methods[name] = row
        say(
            f"  {name:32} {row['ms']['median']:9.1f} ms  "
            f"{row['times_baseline']['median']:6.3f} x baseline "
            f"({row['times_baseline']['p10']:.3f}-{row['times_baseline']['p90']:.3f})  "
            f"{row['peak_mib']:8.0f} MiB  {row['parameters'] / 1e6:7.2f} M parameters"
        )
    return {
        "files": dict(work.files),
        "scene": asdict(work.scene),
        "precision": work.precision,
        "compiled": work.compiled,
        "rounds": len(timings.peaks),
        "calls_per_round": timings.calls,
        "cpu_share": timings.cpu_share,
        "methods": methods,
    }


def experiment(path: str) -> Any:
    """The config of an experiment file, with random weights and a contrast past its warm-up."""
    from contrast_d2.backbones import without_starting_weights
    from contrast_d2.engine import load_config

    config = load_config(path)
    config.model = without_starting_weights(config.model)
    # What is measured is a step with contrast.
    if config.model.contrast is not None and "warmup_iters" in config.model.contrast:
        config.model.contrast.warmup_iters = 0
    return config


def _optimizer(path: str, model: nn.Module) -> torch.optim.Optimizer:
    from detectron2.config import instantiate

    optimizer = experiment(path).optimizer
    optimizer.params.model = model
    return instantiate(optimizer)


def _training_losses(
    run: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
    batch: list[dict[str, Any]],
    device: torch.device,
    precision: str,
) -> Tensor:
    dtype = _AUTOCAST_DTYPES[precision]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        losses = run(batch)
    return torch.stack(list(losses.values())).sum()

"""Measures what each contrast method adds to a training step, from experiment files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .machine import Probes, Say, interleave, milliseconds, note, ratios, warning
from .workloads import Contender


@dataclass(frozen=True)
class MethodStep:
    """Forward and backward of the segmentors of experiment files, on one batch of the first one.

    Attributes:
        files: the experiment files by name. They must be of one dataset and crop size.
        weights: checkpoint that all networks start from, "" for random weights. What is wrongly
            predicted, and with it the cost of some methods, depends on them.
    """

    files: Mapping[str, str]
    weights: str = ""

    def contenders(self, device: torch.device, names: Sequence[str]) -> dict[str, Contender]:
        """A training step of each named file's model."""
        batch = self._batch()
        runs = {}
        for name in names:
            model = self.model(name).to(device)
            runs[name] = Contender(
                partial(_training_losses, model, batch), list(model.parameters())
            )
        return runs

    def gradient_bytes(self) -> int:
        """Bytes of the outputs: 0 here, where gradients count as part of the step."""
        return 0

    def model(self, name: str) -> nn.Module:
        """The model of a file, past its warm-up."""
        torch.manual_seed(0)
        # Imported here: the measurements of the contrastive step do without detectron2.
        from detectron2.config import instantiate

        model = instantiate(_config(self.files[name]).model).train()
        if self.weights:
            state = torch.load(self.weights, map_location="cpu", weights_only=True)
            unfit = model.load_state_dict(state.get("model", state), strict=False)
            missing = [key for key in unfit.missing_keys if not key.startswith("contrast.")]
            if missing or unfit.unexpected_keys:
                raise ValueError(
                    f"{self.weights} does not fit {self.files[name]}: "
                    f"{[*missing, *unfit.unexpected_keys][0]}. Give weights of its baseline."
                )
        return model

    def _batch(self) -> list[dict[str, Any]]:
        from detectron2.config import instantiate

        return next(iter(instantiate(_config(next(iter(self.files.values()))).dataloader.train)))


def measure(
    files: Sequence[Path],
    device: torch.device,
    *,
    weights: str,
    rounds: int,
    most_seconds: float,
    say: Say,
) -> dict[str, Any]:
    """Measures time, peak memory, parameters and checkpoint size.

    Args:
        files: experiment files; the first is the baseline.
        device: where.
        weights: as in `MethodStep`.
        rounds: how often each method runs, at most.
        most_seconds: about how long is timed, unless that is less than five rounds.
        say: is told what is found, line by line.

    Returns:
        A tree for JSON: how and where, and by file the time of a step (ms), its ratio to the
        baseline's, peak memory beyond weights and inputs (MiB), parameters in training, and the
        size of the model's part of a checkpoint (MB).
    """
    from .worker import peak_mib

    work = MethodStep({path.stem: str(path) for path in files}, weights)
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
            "checkpoint_mb": _saved_bytes(model.state_dict()) / 1e6,
        }
        methods[name] = row
        say(
            f"  {name:32} {row['ms']['median']:9.1f} ms  "
            f"{row['times_baseline']['median']:6.3f} x baseline "
            f"({row['times_baseline']['p10']:.3f}-{row['times_baseline']['p90']:.3f})  "
            f"{row['peak_mib']:8.0f} MiB  {row['parameters'] / 1e6:7.2f} M parameters  "
            f"{row['checkpoint_mb']:7.1f} MB"
        )
    return {
        **note(device),
        "files": dict(work.files),
        "weights": bool(weights),
        "rounds": len(timings.peaks),
        "calls_per_round": timings.calls,
        "cpu_share": timings.cpu_share,
        "methods": methods,
    }


def _config(path: str) -> Any:
    from contrast_d2.engine import load_config

    config = load_config(path, ["model.backbone.pretrained=False"])
    config.dataloader.train.num_workers = 0
    # What is measured is a step with contrast.
    if config.model.contrast is not None and "warmup_iters" in config.model.contrast:
        config.model.contrast.warmup_iters = 0
    return config


def _training_losses(model: nn.Module, batch: list[dict[str, Any]]) -> Tensor:
    return torch.stack(list(model(batch).values())).sum()


def _saved_bytes(state: Mapping[str, Tensor]) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()

"""A whole training step, and its contrastive part, with dense and with sampled projection.

Shape letters: B images, H W an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .scenes import Scene, draw_labels
from .workloads import Contender

BASELINE = "no contrast"
# Arguments of the preset by the name of the variant.
VARIANTS = {
    "dense": {"projection": "dense", "norm": "batch"},
    "sampled, batch": {"projection": "sampled", "norm": "batch"},
    "sampled, layer": {"projection": "sampled", "norm": "layer"},
}

_CONFIG = Path(__file__).parents[2] / "configs/camvid/fcn_hrnet18_ms_cs_6k.py"


@dataclass(frozen=True)
class TrainingStep:
    """Forward and backward of a segmentor, from images to the gradients of all parameters.

    Attributes:
        scene: B, H, W, the number of classes, and what the labels look like.
        whole: the whole step; False takes the contrastive part alone, projectors and gradients of
            the feature maps included, on features that lie ready.
        backbone: timm's name.
    """

    scene: Scene
    whole: bool
    backbone: str

    def contenders(self, device: torch.device, names: Sequence[str]) -> dict[str, Contender]:
        """The named variants, on one model that lies on the device and shares its weights."""
        contrasts = {name: self._contrast(name).to(device) for name in names if name != BASELINE}
        model = self._model().to(device)
        generator = torch.Generator().manual_seed(0)
        size = (self.scene.batch, 3, self.scene.height, self.scene.width)
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device)
        labels = draw_labels(self.scene).to(device)
        if self.whole:
            batch = [
                {"image": image, "sem_seg": label}
                for image, label in zip(images, labels, strict=True)
            ]
            runs = {
                name: partial(_training_losses, model, contrasts.get(name), batch) for name in names
            }
            shared = list(model.parameters())
        else:
            with torch.no_grad():
                features = model.backbone(images.float())
            features = {name: x.detach().requires_grad_() for name, x in features.items()}
            del model
            runs = {
                name: partial(_contrast_losses, contrasts[name], features, labels) for name in names
            }
            shared = list(features.values())
        return {
            name: Contender(
                run, [*shared, *(contrasts[name].parameters() if name in contrasts else ())]
            )
            for name, run in runs.items()
        }

    def gradient_bytes(self) -> int:
        """Bytes of the outputs: 0 here, where gradients count as part of the step."""
        return 0

    def _contrast(self, name: str) -> nn.Module:
        changes = [f"model.contrast.{key}={value}" for key, value in VARIANTS[name].items()]
        return self._instantiate("contrast", changes)

    def _model(self) -> nn.Module:
        return self._instantiate("", ["model.contrast=None"])

    def _instantiate(self, part: str, changes: Sequence[str]) -> nn.Module:
        torch.manual_seed(0)
        # Imported here: the measurements of the contrastive step do without detectron2.
        from detectron2.config import instantiate

        from contrast_d2.engine import load_config

        config = load_config(
            str(_CONFIG),
            [
                f"model.backbone.name={self.backbone}",
                "model.backbone.pretrained=False",
                f"dataset.num_classes={self.scene.num_classes}",
                *changes,
            ],
        )
        return instantiate(config.model[part] if part else config.model)


def _training_losses(model: nn.Module, contrast: nn.Module | None, batch: list[dict]) -> Tensor:
    model.contrast = contrast
    losses = model(batch)
    model.contrast = None
    return torch.stack(list(losses.values())).sum()


def _contrast_losses(contrast: nn.Module, features: dict[str, Tensor], labels: Tensor) -> Tensor:
    return torch.stack(list(contrast(features, labels).losses.values())).sum()

"""Any map of a segmentor, read off its evaluation.

Shape letters: B images, C channels, K classes, H W the padded size of a batch, h w a feature map.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...contrast import MultiScaleProjector
from ...segmentor import ContrastiveSegmentor
from ...structures import decode

_CONTRAST = "contrast"


class LayerOutput(NamedTuple):
    """What one image gives.

    Attributes:
        features: (C, h, w) map of the layer, fp32, on the CPU.
        logits: (K, h', w') class scores of the decoder, on the CPU.
        padded_size: (H, W) of the network's input, to which the image is filled up to the right
            and below.
    """

    features: Tensor
    logits: Tensor
    padded_size: tuple[int, int]


class LayerTap:
    """Runs a segmentor and hands out one of its maps.

    The layers are the backbone's maps (`res2`, ...), those that the decoder names (`p2`,
    `pre_logits`, ...) and the embeddings of the contrast method's projector: `contrast/res2`, or
    `contrast/<method>/res2` in a sum of methods. Projectors run in evaluation mode, where batch
    norms use their running statistics.

    Args:
        model: a segmentor in evaluation mode.
        layer: name of the map.

    Raises:
        ValueError: the model is in training mode, or has no such projector. A layer of backbone or
            decoder that there is not is told at the first image.
    """

    def __init__(self, model: ContrastiveSegmentor, layer: str) -> None:
        if model.training:
            raise ValueError("the model is in training mode: call its eval() first.")
        self._model = model
        self._layer = layer
        self._feature, self._head = layer, None
        if is_projection(layer):
            heads = projection_heads(model)
            if layer not in heads:
                raise ValueError(_no_layer(layer, heads))
            self._feature = layer.rpartition("/")[2]
            self._head = model.get_submodule(heads[layer])

    @torch.no_grad()
    def __call__(self, sample: dict[str, Any]) -> LayerOutput:
        """Runs one image.

        Args:
            sample: as a mapper gives it, with "image" (3, height, width).

        Raises:
            ValueError: the model has no such layer.
        """
        images = self._model.preprocess_image([sample])
        maps = self._model.backbone(images)
        output = decode(self._model.sem_seg_head, maps)
        maps = {**maps, **output.features}
        if self._feature not in maps:
            raise ValueError(_no_layer(self._layer, [*maps, *projection_heads(self._model)]))
        features = maps[self._feature]
        if self._head is not None:
            features = self._head(features)
        height, width = images.shape[-2:]
        logits = output.logits[0].float().cpu()
        return LayerOutput(features[0].float().cpu(), logits, (height, width))


def is_projection(layer: str) -> bool:
    """Whether a layer is the embedding of a projector, which belongs to the contrast method."""
    return layer.startswith(f"{_CONTRAST}/")


def projection_heads(model: nn.Module) -> dict[str, str]:
    """The layers that a model's projectors give, and the module of each.

    Returns:
        {"contrast/res2": "contrast.projector.heads.res2"}; empty for a baseline.
    """
    contrast = getattr(model, _CONTRAST, None)
    heads = {}
    for path, module in contrast.named_modules() if contrast is not None else ():
        if isinstance(module, MultiScaleProjector):
            # "projector", or "methods.<method>.projector" in a sum.
            method = path.split(".")[1:-1]
            for name in module.heads:
                heads["/".join([_CONTRAST, *method, name])] = f"{_CONTRAST}.{path}.heads.{name}"
    return heads


def _no_layer(layer: str, layers: Any) -> str:
    return f"there is no layer {layer!r}: the model has {', '.join(layers) or 'none of its kind'}."

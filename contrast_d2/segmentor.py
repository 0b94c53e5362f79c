"""The meta-architecture: a segmentation network that trains with a contrast method beside its loss.

Shape letters: B images, K classes, H W the padded size of a batch, h w a feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, SemanticSegmentor
from detectron2.modeling.postprocessing import sem_seg_postprocess
from torch import Tensor, nn

from .losses import SegLoss, upsample
from .registries import CONTRAST_REGISTRY, SEG_LOSS_REGISTRY, build_named
from .structures import SegOutput, decode

__all__ = ["ContrastiveSegmentor", "SegOutput", "inference_state_dict", "is_training_only"]

_TRAINING_PREFIXES = ("contrast.", "seg_loss.")


@META_ARCH_REGISTRY.register()
class ContrastiveSegmentor(SemanticSegmentor):
    """Semantic segmentation trained with an optional contrast method on its features.

    In evaluation the contrast method and its projectors never run: with the same weights, the
    output is that of the model built with `contrast=None`, bit for bit.

    Args:
        backbone: images -> feature maps by name.
        sem_seg_head: a decoder of ours, or a head of detectron2 that has `layers`. Losses of its
            own are not used.
        pixel_mean, pixel_std: per channel, in the units of the input images (0..255).
        seg_loss: (`SegOutput`, int64 labels on the device) -> losses by name.
        contrast: (feature maps, labels, logits) -> `ContrastOutput`, with the labels where the
            batch has them, on the host; None for the baseline.
        ignore_label: label of padding, and of pixels that no loss counts.

    Attributes:
        statistics: 0-dim tensors by name, which the contrast method left of the last training
            batch, for the trainer to log.

    Raises:
        ValueError: a head that gives no logits without losses, or numbers that do not make a mean
            and a deviation per channel.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        seg_loss: SegLoss,
        contrast: nn.Module | None = None,
        ignore_label: int = 255,
    ) -> None:
        super().__init__(
            backbone=backbone,
            sem_seg_head=sem_seg_head,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        if len(pixel_mean) != len(pixel_std) or not all(std > 0 for std in pixel_std):
            raise ValueError(
                f"pixel_mean={list(pixel_mean)}, pixel_std={list(pixel_std)}: needs one of each "
                "per channel, and deviations above 0."
            )
        if not (hasattr(sem_seg_head, "decode") or hasattr(sem_seg_head, "layers")):
            name = type(sem_seg_head).__name__
            raise ValueError(
                f"sem_seg_head={name}: has neither decode(features) nor layers(features). Give it "
                "a subclass with a `layers` that returns the logits, as DeepLabV3HeadWithLayers "
                "is one of detectron2's DeepLabV3Head."
            )
        self.seg_loss = seg_loss
        self.contrast = contrast
        self.ignore_label = ignore_label
        self.statistics: Mapping[str, Tensor] = {}
        # detectron2's own ResNet asks for no padding (0), yet a pyramid on its maps needs strides
        # that are exact, and so do labels at the resolution of a map.
        self._size_divisibility = backbone.size_divisibility or max(
            shape.stride for shape in backbone.output_shape().values()
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """What detectron2 builds, with the loss of MODEL.SEG_LOSS and the method of
        MODEL.CONTRAST."""
        parts = super().from_config(cfg)
        head, model = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL
        labels = {"num_classes": head.NUM_CLASSES, "ignore_label": head.IGNORE_VALUE}
        known = {"dataset": labels, "train": {"max_iter": cfg.SOLVER.MAX_ITER}}
        seg_loss = build_named(SEG_LOSS_REGISTRY, model.SEG_LOSS, "MODEL.SEG_LOSS", known)
        contrast = None
        if model.CONTRAST.NAME:
            known["channels"] = _channels(parts["backbone"], parts["sem_seg_head"])
            contrast = build_named(CONTRAST_REGISTRY, model.CONTRAST, "MODEL.CONTRAST", known)
        return {
            **parts,
            "seg_loss": seg_loss,
            "contrast": contrast,
            "ignore_label": head.IGNORE_VALUE,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]):
        """Runs a batch.

        Args:
            batched_inputs: a dict per image: "image" (3, H, W) in the units of `pixel_mean`; in
                training "sem_seg" (H, W) integer labels, best of one byte; in evaluation
                optionally "height" and "width", the size of the output.

        Returns:
            In training, the losses by name. In evaluation, a dict per image with "sem_seg", the
            (K, height, width) class scores.

        Raises:
            ValueError: in training, an image without labels, or with labels of another size.
        """
        labels = self._stack_labels(batched_inputs) if self.training else None
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images)
        output = decode(self.sem_seg_head, features)
        if labels is None:
            return self._at_output_size(output, images, batched_inputs)

        losses = self.seg_loss(output, labels.to(self.device, non_blocking=True).long())
        if self.contrast is not None:
            # On the host, where its draws are planned while the device is busy.
            contrast = self.contrast(
                {**features, **output.features},
                labels,
                output.logits,
                ignore_label=self.ignore_label,
            )
            losses.update(contrast.losses)
            self.statistics = contrast.statistics
        return losses

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """(B, 3, H, W) normalised images, padded with 0."""
        images = [x["image"] for x in batched_inputs]
        # Bytes travel, and the device makes floats of them.
        stacked = self._stack(images, fill=0).to(self.device, non_blocking=True)
        stacked = (stacked - self.pixel_mean) / self.pixel_std
        for padded, image in zip(stacked, images, strict=True):
            height, width = image.shape[-2:]
            padded[:, height:] = 0
            padded[:, :, width:] = 0
        return stacked

    def _stack_labels(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """(B, H, W) labels, padded as the images are; where they come from, so on the host."""
        for x in batched_inputs:
            if "sem_seg" not in x:
                raise ValueError(
                    f"image {x.get('file_name', '')!r} came without 'sem_seg' labels: training "
                    "needs a mapper with is_train=True."
                )
            if x["sem_seg"].shape != x["image"].shape[-2:]:
                raise ValueError(
                    f"image {x.get('file_name', '')!r} is {tuple(x['image'].shape[-2:])} and its "
                    f"labels are {tuple(x['sem_seg'].shape)}: the mapper must transform both alike."
                )
        labels = [x["sem_seg"] for x in batched_inputs]
        limits = torch.iinfo(labels[0].dtype)
        if not limits.min <= self.ignore_label <= limits.max:  # a negative one among bytes
            labels = [x.long() for x in labels]
        return self._stack(labels, fill=self.ignore_label)

    def _stack(self, tensors: list[Tensor], fill: int) -> Tensor:
        """Stacks (..., H, W) tensors of different sizes, filled up to the right and below.

        As detectron2's `ImageList`, which cannot be compiled: it reads the sizes off tensors. On
        the host the result is in memory from which a GPU can copy while the host goes on.
        """
        first = tensors[0]
        height, width = (
            _round_up(max(x.shape[side] for x in tensors), self._size_divisibility)
            for side in (-2, -1)
        )
        stacked = torch.full(
            (len(tensors), *first.shape[:-2], height, width),
            fill,
            dtype=reduce(torch.promote_types, [x.dtype for x in tensors]),
            device=first.device,
            pin_memory=first.is_cpu and self.device.type == "cuda",
        )
        for place, x in zip(stacked, tensors, strict=True):
            place[..., : x.shape[-2], : x.shape[-1]] = x
        return stacked

    @staticmethod
    def _at_output_size(
        output: SegOutput, images: Tensor, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Tensor]]:
        logits = upsample(output.logits, images.shape[-2:], output.align_corners)
        results = []
        for scores, x in zip(logits, batched_inputs, strict=True):
            size = tuple(x["image"].shape[-2:])
            height, width = x.get("height", size[0]), x.get("width", size[1])
            if (height, width) == size:
                scores = scores[:, :height, :width]  # which resizing to their size would not change
            else:
                scores = sem_seg_postprocess(scores, size, height, width)
            results.append({"sem_seg": scores})
        return results


def inference_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are left at test time: without the contrast method's, and without those of
    a segmentation loss that has parameters.

    They are all the weights of the model that the same config builds with `model.contrast=None`
    and a loss without parameters.
    """
    state = model.state_dict()
    return {name: value for name, value in state.items() if not is_training_only(name)}


def is_training_only(name: str) -> bool:
    """Whether a name of the model's state belongs to the contrast method or to a loss."""
    return name.startswith(_TRAINING_PREFIXES)


@torch.no_grad()
def _channels(backbone: Backbone, head: nn.Module) -> dict[str, int]:
    """Channels of the maps of backbone and head by name; the head is run to see its own."""
    shapes = backbone.output_shape()
    side = max(shape.stride for shape in shapes.values())
    # Two images: norms refuse a single value per channel, also in evaluation.
    maps = {n: torch.zeros(2, s.channels, *[side // s.stride] * 2) for n, s in shapes.items()}
    features = decode(head.eval(), maps).features if hasattr(head, "decode") else {}
    head.train()
    return {name: x.shape[1] for name, x in {**maps, **features}.items()}


def _round_up(size: int, divisibility: int) -> int:
    return -(-size // divisibility) * divisibility

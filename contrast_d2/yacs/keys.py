"""The keys of a yaml config, and the registries whose names may stand in it."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Callable, Collection, Iterator
from types import ModuleType
from typing import Any

from detectron2.config import CfgNode, get_cfg
from fvcore.common.registry import Registry
from torch import nn

from .. import decoders, losses
from ..backbones import TimmBackbone
from ..contrast import (
    PNE,
    Contextrast,
    ContrastMethod,
    ContrastSum,
    MultiScaleContrast,
    PixelContrast,
)
from ..data import build_train_loader, train_augmentations
from ..evaluation import InferenceProtocol, SemSegEvaluator
from ..losses import SegLoss
from .read_keys import flat
from .signatures import section_of

CONTRAST_REGISTRY = Registry("CONTRAST")
CONTRAST_REGISTRY.__doc__ = "Contrast methods: subclasses of `ContrastMethod`, and sums of them."

SEG_LOSS_REGISTRY = Registry("SEG_LOSS")
SEG_LOSS_REGISTRY.__doc__ = "Makers of segmentation losses, (logits, labels) -> scalar."

CONFIG_REGISTRY = Registry("CONFIG")
CONFIG_REGISTRY.__doc__ = """Functions `add_xxx_config(cfg)` that add keys for modules of one's own.

`add_contrast_config` calls them, so that files which `train_net.py` reads may have these keys."""


def _modules(package: ModuleType) -> Iterator[Callable[..., nn.Module]]:
    """What a package exports that is a module, or a function that makes one."""
    for name in package.__all__:
        item = getattr(package, name)
        kind = item if isinstance(item, type) else typing.get_type_hints(item).get("return")
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            yield item


DECODERS = {decoder.__name__: decoder for decoder in _modules(decoders)}
for _method in (MultiScaleContrast, PixelContrast, Contextrast, PNE, ContrastSum):
    CONTRAST_REGISTRY.register(_method)
for _loss in _modules(losses):
    # One takes a decoder's output, the other an object.
    if _loss.__name__ not in ("SegLoss", "LibraryLoss"):
        SEG_LOSS_REGISTRY.register(_loss)

# Arguments whose value the whole config has once; of a projector, the maps decide.
SHARED = {
    "num_classes": "${dataset.num_classes}",
    "ignore_label": "${dataset.ignore_label}",
    "input_shape": "???",
    "in_channels": "???",
}
# Arguments of decoders for which detectron2 has keys.
HEAD_KEYS = {"norm": "NORM", "conv_dims": "CONVS_DIM", "common_stride": "COMMON_STRIDE"}
AUGMENTATION_KEYS = ("crop_size", "max_class_area", "flip", "ignore_label")
LOADER_KEYS = (
    *("dataset", "mapper", "total_batch_size", "seed", "num_workers"),
    *("start_iteration", "accumulation_steps"),
)
EVALUATOR_KEYS = ("dataset_name", "output_dir", "distributed")


def add_contrast_config(cfg: CfgNode) -> None:
    """Adds this project's keys to a config of detectron2, and those of `CONFIG_REGISTRY`.

    Args:
        cfg: of `get_cfg()`; changed in place.
    """
    cfg.MODEL.SYNC_BN = True  # statistics over all GPUs
    cfg.MODEL.CHANNELS_LAST = False
    cfg.MODEL.ALLOW_PICKLE = False  # whether WEIGHTS may be a .pkl file, which can run code
    _add_section(cfg.MODEL, TimmBackbone)
    for decoder in DECODERS.values():
        _add_section(cfg.MODEL.SEM_SEG_HEAD, decoder, without=HEAD_KEYS)
    cfg.MODEL.CONTRAST = CfgNode({"NAME": ""})  # "" is the baseline
    for _, method in CONTRAST_REGISTRY:
        _add_section(cfg.MODEL.CONTRAST, method, base=ContrastMethod)
    cfg.MODEL.SEG_LOSS = section_of(SegLoss)
    cfg.MODEL.SEG_LOSS.MAIN = "CrossEntropyLoss"
    for _, loss in SEG_LOSS_REGISTRY:
        _add_section(cfg.MODEL.SEG_LOSS, loss)

    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.75
    cfg.INPUT.AUGMENTATIONS = section_of(train_augmentations, AUGMENTATION_KEYS)
    cfg.DATALOADER.update(section_of(build_train_loader, LOADER_KEYS))

    cfg.SOLVER.OPTIMIZER = "SGD"  # or "Adam", "AdamW"
    cfg.SOLVER.BETAS = (0.9, 0.999)  # of the latter two
    cfg.SOLVER.HEAD_LR_FACTOR = 1.0  # on BASE_LR, for all but the backbone
    # Settings of all parameters of a name, {name: {"lr" or "weight_decay": value}}
    cfg.SOLVER.OVERRIDES = CfgNode(new_allowed=True)
    cfg.SOLVER.POLY_LR_POWER = 0.9  # with LR_SCHEDULER_NAME: WarmupPolyLR
    cfg.SOLVER.ACCUMULATION_STEPS = 1  # batches per step; IMS_PER_BATCH is divided by it
    cfg.SOLVER.AMP.PRECISION = "fp16"  # or "bf16"
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 2
    cfg.SOLVER.EMA_DECAY = None  # of an average of the weights, which is then evaluated
    cfg.LOG_PERIOD = 20
    cfg.DASHBOARD_PERIOD = 500  # pictures of what the contrast draws; 0 for none
    cfg.WRITERS = []  # besides log, metrics.json and TensorBoard: "wandb", "mlflow"
    cfg.TIMEOUT_MINUTES = 30  # the longest wait of one process for another
    cfg.DETERMINISTIC = False  # the same bits whenever a run is repeated
    cfg.TEST.BEST_METRIC = "sem_seg/mIoU"  # model_best.pth is chosen by it
    cfg.TEST.NUM_WORKERS = 2
    cfg.TEST.INFERENCE = section_of(InferenceProtocol, ("pad_value",))
    cfg.TEST.EVALUATOR = section_of(SemSegEvaluator, EVALUATOR_KEYS)
    for _, add_config in CONFIG_REGISTRY:
        add_config(cfg)


def _add_section(
    parent: CfgNode,
    factory: Callable[..., Any],
    without: Collection[str] = (),
    base: type = nn.Module,
) -> None:
    key = section_name(factory)
    if key in parent:
        raise ValueError(
            f"there is a section {key} already: add the keys to a config once, and give parts of "
            "your own names that differ."
        )
    parent[key] = section_of(factory, [*SHARED, *without], base)


def section_name(factory: Callable[..., Any]) -> str:
    name = re.sub(r"(?<=.)(Backbone|Decoder|Contrast|Loss|_loss)$", "", factory.__name__)
    return name.upper()


def part_sections() -> set[str]:
    """Sections of parts, of which those that the config does not choose have no effect."""
    parts = [("MODEL", [TimmBackbone]), ("MODEL.SEM_SEG_HEAD", DECODERS.values())]
    parts.append(("MODEL.CONTRAST", [method for _, method in CONTRAST_REGISTRY]))
    parts.append(("MODEL.SEG_LOSS", [loss for _, loss in SEG_LOSS_REGISTRY]))
    return {f"{path}.{section_name(part)}" for path, group in parts for part in group}


def find(registry: Registry, name: str) -> Any:
    if name in registry:
        return registry.get(name)
    known = [other for other, _ in registry]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise ValueError(
        f"{name!r} is not in the {registry._name} registry. Did you mean {near[0]!r}? A module of "
        "your own that registers it is imported by --import MODULE."
    )


def changed(cfg: CfgNode, *, also_unknown: bool = False) -> dict[str, Any]:
    """Values that are not at their defaults; on request those of keys that have none, too."""
    default = get_cfg()
    add_contrast_config(default)
    defaults = flat(default)
    return {
        key: value
        for key, value in flat(cfg).items()
        if (value != defaults[key] if key in defaults else also_unknown)
    }

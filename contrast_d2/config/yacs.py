"""detectron2's yaml configs: the keys that are ours, and the LazyConfig tree of an experiment.

    cfg = get_cfg()
    add_contrast_config(cfg)
    cfg.merge_from_file("configs/camvid/semfpn_r18_ms_cs_6k.yaml")
    model = build_model(cfg)        # detectron2's
    tree = tree_from_yacs(cfg)      # what train_net.py takes

Keys that detectron2 has mean what they mean there. What it has no keys for goes into sections that
hold keyword arguments in upper case:

    MODEL.BACKBONE.OPTIONS, MODEL.SEM_SEG_HEAD.OPTIONS    of the backbone and the decoder, if ours
    MODEL.CONTRAST.OPTIONS, MODEL.SEG_LOSS.OPTIONS        of the preset that NAME chooses
    INPUT.AUGMENTATIONS, TEST.INFERENCE, TEST.EVALUATOR   of those parts of the data loading
    TRAIN                                                 keys of configs/common/train.py

What they cannot say, such as another optimizer than SGD, is said in a LazyConfig file.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.config import LazyCall as L
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.solver import build_lr_scheduler
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import SGD

from ..backbones import without_starting_weights
from ..registries import common, did_you_mean, find, plain, set_options

# Keys of detectron2 that may also say what is done here anyway.
_AS_HERE = {
    "DATALOADER.ASPECT_RATIO_GROUPING": False,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "INPUT.MIN_SIZE_TEST": 0,
}
# Of losses that ContrastiveSegmentor replaces, so that it has no effect that heads read them.
_WITHOUT_EFFECT = {"MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", "MODEL.SEM_SEG_HEAD.LOSS_TYPE"}
_FLIPS = {"horizontal": 0.5, "none": 0.0}


def add_contrast_config(cfg: CfgNode) -> None:
    """Adds our keys to a config of detectron2, and those of its DeepLab project.

    Args:
        cfg: of `get_cfg()`; changed in place.
    """
    add_deeplab_config(cfg)
    cfg.MODEL.CONTRAST = CfgNode({"NAME": ""})  # "" is the baseline
    cfg.MODEL.SEG_LOSS = CfgNode({"NAME": "cross_entropy"})
    for part in ("BACKBONE", "SEM_SEG_HEAD", "CONTRAST", "SEG_LOSS"):
        cfg.MODEL[part].OPTIONS = CfgNode(new_allowed=True)
    cfg.INPUT.AUGMENTATIONS = CfgNode(new_allowed=True)
    cfg.TEST.INFERENCE = CfgNode(new_allowed=True)
    cfg.TEST.EVALUATOR = CfgNode(new_allowed=True)
    cfg.TRAIN = CfgNode(new_allowed=True)


def load_yacs(path: str, overrides: Sequence[str] = ()) -> CfgNode:
    """Reads a yaml config of detectron2.

    Args:
        path: of the file.
        overrides: keys and values in turn.

    Raises:
        ValueError: an unknown key, a value of another type than its default, a key without value,
            or a file that cannot be read.
    """
    for text in overrides[::2]:
        if "=" in text:
            raise ValueError(
                f"{text}: {path} is a config of detectron2, whose overrides are KEY VALUE, such as "
                "SOLVER.MAX_ITER 100."
            )
    if len(overrides) % 2:
        raise ValueError(f"{overrides[-1]}: the last override has no value. Write KEY VALUE.")
    cfg = get_cfg()
    add_contrast_config(cfg)
    try:
        values = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
        for key, value in zip(overrides[::2], overrides[1::2], strict=True):
            *sections, last = key.split(".")
            node = values
            for section in sections:
                node = node.setdefault(section, {})
                if not isinstance(node, dict):
                    raise KeyError(key)
            node[last] = _literal(value)
        cfg.merge_from_other_cfg(CfgNode(values))
    except KeyError as error:
        key = error.args[0].rpartition(" ")[2]
        near = did_you_mean(key, flat(cfg))
        raise ValueError(f"--config-file {path}: unknown config key {key}. {near}") from error
    except (
        *(AssertionError, AttributeError, OSError, TypeError, ValueError),
        yaml.YAMLError,
    ) as error:
        reason = " ".join(str(error).split())  # which may take several lines
        raise ValueError(f"--config-file {path} cannot be read: {reason}") from error
    return cfg


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        if text.startswith("{"):
            raise ValueError(f"{text!r}: write it as in Python, {{'res2': 1.0}}.") from None
        return text


class ReadKeys(CfgNode):
    """A copy of a config that notes which of its keys are read.

    Args:
        cfg: the config.
        read: set to which full keys of values are added as they are read.
        prefix: what the full keys start with.
    """

    def __init__(self, cfg: CfgNode, read: set[str], prefix: str = "") -> None:
        super().__init__()
        self.__dict__.update(plain=cfg, read=read, prefix=prefix)
        for key, value in cfg.items():
            if isinstance(value, CfgNode):
                value = ReadKeys(value, read, f"{prefix}{key}.")
            dict.__setitem__(self, key, value)

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if not isinstance(value, CfgNode):
            self.read.add(self.prefix + key)
        return value

    def __iter__(self) -> Iterator[str]:  # also lets dict(...) and ** ask for the items one by one
        return iter(list(super().keys()))

    # Those of a dict would go round __getitem__.
    get, items, values = Mapping.get, Mapping.items, Mapping.values

    def __deepcopy__(self, memo: dict[int, Any]) -> CfgNode:
        self.read.update(self.prefix + key for key in flat(self.plain))
        return copy.deepcopy(self.plain, memo)


def flat(cfg: CfgNode, prefix: str = "") -> dict[str, Any]:
    """All values of a config by full key, sequences as lists."""
    rows: dict[str, Any] = {}
    for key, value in cfg.items():
        inner = isinstance(value, CfgNode)
        rows.update(flat(value, f"{prefix}{key}.") if inner else {prefix + key: plain(value)})
    return rows


def tree_from_yacs(cfg: CfgNode) -> DictConfig:
    """The experiment that a yaml config stands for, with the keys of a LazyConfig file.

    Args:
        cfg: of `get_cfg()` and `add_contrast_config`, with values filled in.

    Raises:
        ValueError: a key that has no effect, a name that is not registered, or a value that cannot
            be had here.
    """
    keys = ReadKeys(cfg, set())
    tree = OmegaConf.create(
        {"train": _train(keys), "dataset": _dataset(keys)}, flags={"allow_objects": True}
    )
    tree.dataloader = _dataloader(keys)
    tree.optimizer = _optimizer(keys.SOLVER)
    tree.lr_multiplier = _lr_multiplier(keys)
    tree.model = L(model_from_yacs)(cfg=plain(cfg), contrast=cfg.MODEL.CONTRAST.NAME or None)
    _check_all_read(cfg, keys.read | _read_by_model(tree.model))
    return tree


def _train(cfg: CfgNode) -> DictConfig:
    device, amp = cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED
    given = {
        "output_dir": cfg.OUTPUT_DIR,
        "init_checkpoint": cfg.MODEL.WEIGHTS,
        "max_iter": cfg.SOLVER.MAX_ITER,
        "eval_period": cfg.TEST.EVAL_PERIOD,
        # detectron2's default; a machine without a GPU trains on its CPU.
        "device": "cpu" if device == "cuda" and not torch.cuda.is_available() else device,
        "seed": max(cfg.SEED, 0),  # detectron2's -1 is for a run that cannot be repeated
        "cudnn_benchmark": cfg.CUDNN_BENCHMARK,
    }
    nested = {"checkpointer": {"period": cfg.SOLVER.CHECKPOINT_PERIOD}, "amp": {"enabled": amp}}
    if amp:
        nested["amp"]["dtype"] = "fp16"  # detectron2's
    train: Any = OmegaConf.merge(common("train", "train"), given, nested)
    set_options(train, cfg.TRAIN, "TRAIN", given)
    return train


def _dataset(cfg: CfgNode) -> dict[str, Any]:
    train, test, head = cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.SEM_SEG_HEAD
    if not train:
        raise ValueError("DATASETS.TRAIN is empty: name a registered dataset.")
    if len(test) != 1:
        raise ValueError(f"DATASETS.TEST={test}: name one dataset, on which a run is evaluated.")
    labels = {"num_classes": head.NUM_CLASSES, "ignore_label": head.IGNORE_VALUE}
    return {"train": train[0] if len(train) == 1 else list(train), "test": test[0], **labels}


def _dataloader(cfg: CfgNode) -> DictConfig:
    crop, flip = cfg.INPUT.CROP, cfg.INPUT.RANDOM_FLIP
    if not crop.ENABLED or crop.TYPE != "absolute":
        raise ValueError(
            f"INPUT.CROP.ENABLED={crop.ENABLED}, TYPE={crop.TYPE!r}: training needs crops of one "
            "size. Set ENABLED True, TYPE absolute and SIZE to (height, width) in pixels."
        )
    if flip not in _FLIPS:
        raise ValueError(f"INPUT.RANDOM_FLIP={flip!r}: choose 'horizontal' or 'none'.")
    loaders = common("data/base", "dataloader")
    train, mapper = loaders.train, loaders.train.mapper
    train.total_batch_size = cfg.SOLVER.IMS_PER_BATCH
    train.num_workers = cfg.DATALOADER.NUM_WORKERS
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        train.repeat_threshold = cfg.DATALOADER.REPEAT_THRESHOLD
    if len(cfg.DATASETS.TRAIN) > 1:  # which agree in all that a mapper takes from one
        mapper.dataset_name = "${dataset.train.0}"
    mapper.image_format = loaders.test.mapper.image_format = cfg.INPUT.FORMAT
    area = crop.SINGLE_CATEGORY_MAX_AREA
    given = {"crop_size": list(crop.SIZE), "max_class_area": area, "flip": _FLIPS[flip]}
    mapper.augmentations.update(given)
    set_options(mapper.augmentations, cfg.INPUT.AUGMENTATIONS, "INPUT.AUGMENTATIONS", given)
    loaders.inference.pad_value = list(cfg.MODEL.PIXEL_MEAN)
    set_options(loaders.inference, cfg.TEST.INFERENCE, "TEST.INFERENCE", ("pad_value",))
    set_options(loaders.evaluator, cfg.TEST.EVALUATOR, "TEST.EVALUATOR")
    return loaders


def _optimizer(solver: CfgNode) -> DictConfig:
    """As detectron2's `build_optimizer`."""
    sgd = common("optim", "sgd")
    sgd.update(lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    sgd.update(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)
    sgd.params.update(
        base_lr="${optimizer.lr}",
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return sgd


def _lr_multiplier(cfg: CfgNode) -> DictConfig:
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":  # which is of detectron2's DeepLab project
        schedule_from_yacs(cfg, solver.MAX_ITER)  # reads its keys, and says what is wrong with them
        return L(schedule_from_yacs)(cfg=plain(cfg.plain), max_iter="${train.max_iter}")
    poly = common("optim", "lr_multiplier")
    poly.update(power=solver.POLY_LR_POWER)
    poly.update(warmup_iters=solver.WARMUP_ITERS, warmup_factor=solver.WARMUP_FACTOR)
    return poly


def schedule_from_yacs(cfg: Mapping[str, Any], max_iter: int) -> ParamScheduler:
    """The schedule of detectron2's `build_lr_scheduler`, without the optimizer.

    Args:
        cfg: all keys of the config.
        max_iter: replaces SOLVER.MAX_ITER.
    """
    node = _as_node(cfg)
    node.SOLVER.MAX_ITER = max_iter
    return build_lr_scheduler(node, SGD([nn.Parameter(torch.zeros(1))], lr=1.0))._multiplier  # pyright: ignore[reportAttributeAccessIssue]


def model_from_yacs(cfg: Mapping[str, Any], contrast: str | None) -> nn.Module:
    """Builds a model as detectron2's `build_model` does, and leaves it on the CPU.

    Args:
        cfg: all keys of the config.
        contrast: replaces MODEL.CONTRAST.NAME; None for no contrast.

    Raises:
        ValueError: a name is not registered, or a part refuses its settings.
    """
    node = _as_node(cfg)
    node.MODEL.CONTRAST.NAME = contrast or ""
    find(BACKBONE_REGISTRY, node.MODEL.BACKBONE.NAME)
    find(SEM_SEG_HEADS_REGISTRY, node.MODEL.SEM_SEG_HEAD.NAME)
    return find(META_ARCH_REGISTRY, node.MODEL.META_ARCHITECTURE)(node)


def _as_node(cfg: Mapping[str, Any]) -> CfgNode:
    if isinstance(cfg, CfgNode):
        return cfg
    return CfgNode(OmegaConf.to_container(cfg) if isinstance(cfg, DictConfig) else cfg)


def _read_by_model(model: DictConfig) -> set[str]:
    """The keys that a model reads: it is built without memory and without starting weights."""
    read: set[str] = set()
    cfg = ReadKeys(_as_node(without_starting_weights(model).cfg), read)
    try:
        with torch.device("meta"):
            model_from_yacs(cfg, model.contrast)
    except (NotImplementedError, RuntimeError):  # a builder that looks at values
        model_from_yacs(cfg, model.contrast)
    is_ours = cfg.MODEL.META_ARCHITECTURE == "ContrastiveSegmentor"
    return read - _WITHOUT_EFFECT if is_ours else read


def _check_all_read(cfg: CfgNode, read: set[str]) -> None:
    """Raises where a key that is not at its default has no effect on the tree."""
    default = get_cfg()
    add_contrast_config(default)
    defaults = flat(default)
    off = () if cfg.MODEL.CONTRAST.NAME else ("MODEL.CONTRAST.OPTIONS.",)
    settings = ", ".join(
        f"{key}={value!r}"
        for key, value in flat(cfg).items()
        if value not in (defaults.get(key), _AS_HERE.get(key, defaults.get(key)))
        and key not in read
        and not key.startswith(off)
    )
    if settings:
        raise ValueError(
            f"{settings}: not read with these settings. Leave keys without effect at their "
            "defaults; what detectron2 has no keys for is in docs/configs.md."
        )

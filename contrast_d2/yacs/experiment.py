"""The whole experiment that a yaml config stands for."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig, OmegaConf
from torch.optim import SGD, Adam, AdamW

from ..data import SemSegMapper, build_test_loader, build_train_loader, train_augmentations
from ..evaluation import InferenceProtocol, SemSegEvaluator
from ..solver import optimizer_params, poly_schedule
from .keys import SHARED, changed, part_sections
from .model import labels_of, model_tree
from .read_keys import ReadKeys, flat
from .signatures import ENABLED, call_of

# Keys of detectron2 that may also say what is done here anyway.
_AS_HERE = {
    "DATALOADER.ASPECT_RATIO_GROUPING": False,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "INPUT.MIN_SIZE_TEST": 0,
}
_FLIPS = {"horizontal": 0.5, "none": 0.0}
# What to set instead of keys of detectron2 that mean nothing here.
_INSTEAD = {
    "INPUT.M": "Training images are scaled by factors, INPUT.AUGMENTATIONS.SCALE, and test images "
    "as TEST.INFERENCE says.",
    "TEST.AUG": "Views of test images are TEST.INFERENCE.SCALES and FLIP.",
    "SOLVER.STEPS": "Steps need LR_SCHEDULER_NAME WarmupMultiStepLR.",
    "MODEL.BACKBONE.FREEZE_AT": "TimmBackbone's is MODEL.TIMM.FREEZE_AT.",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": "Losses are weighed in MODEL.SEG_LOSS.",
}


def tree_from_yacs(cfg: CfgNode) -> DictConfig:
    """The experiment that a yaml config stands for, with the keys of a LazyConfig file.

    Args:
        cfg: of `get_cfg()` and `add_contrast_config`, with values filled in.

    Raises:
        ValueError: a key that has no effect, a name that is not registered, or a value that cannot
            be had here.
    """
    keys = ReadKeys(cfg, set())
    _check_device(keys.MODEL.DEVICE)
    tree = OmegaConf.create(
        {"train": _train(keys), "dataset": _dataset(keys)}, flags={"allow_objects": True}
    )
    tree.dataloader = _dataloader(keys)
    tree.optimizer = _optimizer(keys)
    tree.lr_multiplier = _lr_multiplier(keys)
    tree.model = model_tree(keys, tree.dataset)
    _check_all_read(keys)
    return tree


def _check_device(device: str) -> None:
    if device != "cuda" and (device != "cpu" or torch.cuda.is_available()):
        raise ValueError(
            f"MODEL.DEVICE={device!r}: leave it out. Every process takes a GPU where there is one; "
            "CUDA_VISIBLE_DEVICES says which it may see."
        )


def _train(cfg: CfgNode) -> dict[str, Any]:
    clip, precision = cfg.SOLVER.CLIP_GRADIENTS, "fp32"
    if clip.ENABLED and (clip.CLIP_TYPE, clip.NORM_TYPE) != ("full_model", 2.0):
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE={clip.CLIP_TYPE!r}, NORM_TYPE={clip.NORM_TYPE}: "
            "gradients are clipped by the norm of all of them together. Set CLIP_TYPE full_model "
            "and NORM_TYPE 2.0."
        )
    if cfg.SOLVER.AMP.ENABLED:
        precision = cfg.SOLVER.AMP.PRECISION
    return {
        "output_dir": cfg.OUTPUT_DIR,
        "init_checkpoint": cfg.MODEL.WEIGHTS,
        "allow_pickle": cfg.MODEL.ALLOW_PICKLE,
        "channels_last": cfg.MODEL.CHANNELS_LAST,
        "max_iter": cfg.SOLVER.MAX_ITER,
        "seed": max(cfg.SEED, 0),  # detectron2's -1 is for a run that cannot be repeated
        "precision": precision,
        "accumulation_steps": cfg.SOLVER.ACCUMULATION_STEPS,
        "clip_norm": clip.CLIP_VALUE if clip.ENABLED else None,
        "ema_decay": cfg.SOLVER.EMA_DECAY,
        "sync_bn": cfg.MODEL.SYNC_BN,
        "cudnn_benchmark": cfg.CUDNN_BENCHMARK,
        "timeout_minutes": cfg.TIMEOUT_MINUTES,
        "deterministic": cfg.DETERMINISTIC,
        "checkpoint_period": cfg.SOLVER.CHECKPOINT_PERIOD,
        "checkpoints_to_keep": cfg.SOLVER.CHECKPOINTS_TO_KEEP,
        "eval_period": cfg.TEST.EVAL_PERIOD,
        "log_period": cfg.LOG_PERIOD,
        "dashboard_period": cfg.DASHBOARD_PERIOD,
        "writers": list(cfg.WRITERS),
        "best_metric": cfg.TEST.BEST_METRIC,
    }


def _dataset(cfg: CfgNode) -> dict[str, Any]:
    train, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    if not train:
        raise ValueError("DATASETS.TRAIN is empty: name a registered dataset.")
    if len(test) != 1:
        raise ValueError(f"DATASETS.TEST={test}: name one dataset, on which a run is evaluated.")
    return {
        "train": train[0] if len(train) == 1 else train,
        "test": test[0],
        **labels_of(cfg),
    }


def _dataloader(cfg: CfgNode) -> dict[str, Any]:
    several = len(cfg.DATASETS.TRAIN) > 1  # which then agree in all that a mapper takes from one
    train_mapper = L(SemSegMapper)(
        dataset_name="${dataset.train.0}" if several else "${dataset.train}",
        augmentations=_augmentations(cfg),
        is_train=True,
        image_format=cfg.INPUT.FORMAT,
    )
    loader = dict(
        dataset="${dataset.train}",
        mapper=train_mapper,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed="${train.seed}",
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        start_iteration=0,
        accumulation_steps="${train.accumulation_steps}",
    )
    evaluator = dict(
        dataset_name="${dataset.test}",
        output_dir="${train.output_dir}/inference/${dataset.test}",
        distributed=True,
    )
    pad_value = {"pad_value": "${model.pixel_mean}"}
    return {
        "train": call_of(build_train_loader, cfg.DATALOADER, "DATALOADER", loader),
        "test": L(build_test_loader)(
            dataset="${dataset.test}",
            mapper=L(SemSegMapper)(
                dataset_name="${dataset.test}", is_train=False, image_format=cfg.INPUT.FORMAT
            ),
            num_workers=cfg.TEST.NUM_WORKERS,
        ),
        "inference": call_of(InferenceProtocol, cfg.TEST.INFERENCE, "TEST.INFERENCE", pad_value),
        "evaluator": call_of(SemSegEvaluator, cfg.TEST.EVALUATOR, "TEST.EVALUATOR", evaluator),
    }


def _augmentations(cfg: CfgNode) -> DictConfig:
    crop, flip = cfg.INPUT.CROP, cfg.INPUT.RANDOM_FLIP
    if not crop.ENABLED or crop.TYPE != "absolute":
        raise ValueError(
            f"INPUT.CROP.ENABLED={crop.ENABLED}, TYPE={crop.TYPE!r}: training needs crops of one "
            "size. Set ENABLED True, TYPE absolute and SIZE to (height, width) in pixels."
        )
    if flip not in _FLIPS:
        raise ValueError(f"INPUT.RANDOM_FLIP={flip!r}: choose 'horizontal' or 'none'.")
    given = {
        "crop_size": crop.SIZE,
        "max_class_area": crop.SINGLE_CATEGORY_MAX_AREA,
        "flip": _FLIPS[flip],
        "ignore_label": SHARED["ignore_label"],
    }
    return call_of(train_augmentations, cfg.INPUT.AUGMENTATIONS, "INPUT.AUGMENTATIONS", given)


def _optimizer(cfg: CfgNode) -> DictConfig:
    solver = cfg.SOLVER
    overrides = {name: dict(values) for name, values in solver.OVERRIDES.items()}
    options = dict(
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides=overrides or None,
    )
    lr, factor = "${optimizer.lr}", solver.HEAD_LR_FACTOR
    if factor != 1:
        params = L(optimizer_params)(base_lr=lr, head_lr_factor=factor, **options)
    else:
        # A factor on the rate of biases needs to know that of the others.
        lr = None if solver.BIAS_LR_FACTOR == 1 else lr
        params = L(get_default_optimizer_params)(base_lr=lr, **options)
    shared = dict(params=params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    if solver.OPTIMIZER == "SGD":
        return L(SGD)(momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **shared)
    if solver.OPTIMIZER in ("Adam", "AdamW"):
        return L(Adam if solver.OPTIMIZER == "Adam" else AdamW)(betas=solver.BETAS, **shared)
    raise ValueError(f"SOLVER.OPTIMIZER={solver.OPTIMIZER!r}: choose 'SGD', 'Adam' or 'AdamW'.")


def _lr_multiplier(cfg: CfgNode) -> DictConfig:
    solver, name = cfg.SOLVER, cfg.SOLVER.LR_SCHEDULER_NAME
    if name == "WarmupPolyLR":
        return L(poly_schedule)(
            max_iter="${train.max_iter}",
            power=solver.POLY_LR_POWER,
            warmup_iters=solver.WARMUP_ITERS,
            warmup_factor=solver.WARMUP_FACTOR,
        )
    if name == "WarmupMultiStepLR":
        steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
        decay = L(MultiStepParamScheduler)(
            values=[solver.GAMMA**k for k in range(len(steps) + 1)],
            milestones=steps,
            num_updates="${train.max_iter}",
        )
    elif name == "WarmupCosineLR":
        decay = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
    else:
        raise ValueError(
            f"SOLVER.LR_SCHEDULER_NAME={name!r}: choose 'WarmupPolyLR', 'WarmupMultiStepLR' or "
            "'WarmupCosineLR'."
        )
    return L(WarmupParamScheduler)(
        scheduler=decay,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_length=min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        warmup_method=solver.WARMUP_METHOD,
    )


def _check_all_read(keys: ReadKeys) -> None:
    """Raises where a key that is not at its default has no effect on the tree.

    It may stand in the section of a part that is not chosen, or is not ENABLED.
    """
    switches = {key: on for key, on in flat(keys.plain).items() if key.endswith(f".{ENABLED}")}
    off = tuple(key.removesuffix(ENABLED) for key, on in switches.items() if not on)
    parts = tuple(f"{section}." for section in part_sections())
    unread = {
        key: value
        for key, value in changed(keys.plain).items()
        if key not in keys.read
        and not key.startswith(parts)
        and not (key.startswith(off) and key not in switches)
        and not (key in _AS_HERE and value == _AS_HERE[key])
    }
    if unread:
        settings = ", ".join(f"{key}={value!r}" for key, value in unread.items())
        hints = [hint for key, hint in _INSTEAD.items() if any(k.startswith(key) for k in unread)]
        hints.append("Leave keys without effect at their defaults.")
        raise ValueError(f"{settings}: not read with these settings. {' '.join(hints)}")

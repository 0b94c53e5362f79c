"""What an experiment's config stands for: model, optimizer, evaluation, trained network."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import instantiate
from detectron2.evaluation import DatasetEvaluator, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import log_every_n_seconds
from omegaconf import DictConfig, OmegaConf
from timm.layers import convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from ..backbones import without_starting_weights
from ..evaluation import InferenceProtocol
from ..segmentor import ContrastiveSegmentor
from .checkpoint import Checkpointer
from .checks import check_best_metric
from .trainer import Batch, autocast

logger = logging.getLogger(__name__)


def build_model(cfg: DictConfig, *, starting_weights: bool = True) -> nn.Module:
    """Builds the config's model, on `train.device`.

    Args:
        cfg: whole config.
        starting_weights: load what its backbone starts a training from; not if a checkpoint will
            replace it, so that neither network nor file is needed.
    """
    config = cfg.model if starting_weights else without_starting_weights(cfg.model)
    device = checked_device(cfg.train.device)
    model = instantiate(config).to(device)
    if not isinstance(model, ContrastiveSegmentor):
        model.register_forward_pre_hook(_with_long_labels)
    if cfg.train.sync_bn and comm.get_world_size() > 1:
        if device.type == "cpu":
            logger.warning("train.sync_bn needs GPUs: each process has its own batch statistics.")
        else:
            # torch's own conversion loses the activation in timm's fused norm layers
            model = convert_sync_batchnorm(model)
    if cfg.train.channels_last:
        # A convolution gives its output the format of its weights, whatever that of its input is:
        # no image or feature map has to be converted.
        model = model.to(memory_format=torch.channels_last)
    return model


def _with_long_labels(_model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The batch with int64 labels, which the losses of detectron2's own models need."""
    return (
        [x | {"sem_seg": x["sem_seg"].long()} if "sem_seg" in x else x for x in inputs[0]],
        *inputs[1:],
    )


def load_trained(
    cfg: DictConfig, weights: str, *, device: str | None = None, keep_contrast: bool = False
) -> nn.Module:
    """Builds a config's network with the weights of a checkpoint, in evaluation mode.

    Averaged weights are taken where the training averaged them. Neither a dataset, nor a network
    connection, nor the file that the backbone started from is needed.

    Args:
        cfg: of an experiment file, or of a run's config.yaml.
        weights: a checkpoint, of the training or of its end.
        device: "cuda", "cuda:1", "cpu"; None takes a GPU where there is one.
        keep_contrast: build the contrast method too, whose projectors are no part of a prediction.

    Raises:
        ValueError: the checkpoint is missing, damaged, or of another model, or there is no such
            device.
    """
    target = checked_device(device)
    config = without_starting_weights(cfg.model)
    if "contrast" in config and not keep_contrast:
        config.contrast = None
    model = instantiate(config)
    allow_pickle = bool(OmegaConf.select(cfg, "train.allow_pickle"))
    Checkpointer(model, allow_pickle=allow_pickle).load_for_inference(weights)
    if OmegaConf.select(cfg, "train.channels_last"):
        model = model.to(memory_format=torch.channels_last)
    return model.to(target).eval()


def checked_device(name: str | None) -> torch.device:
    """The device of a name, or a GPU where there is one if it is None.

    Raises:
        ValueError: there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device {name} cannot be used ({reason}): try cpu.") from error
    return device


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the config's optimizer, on the parameters of a model.

    Raises:
        ValueError: PyTorch refuses one of its settings.
    """
    config = copy.deepcopy(cfg.optimizer)  # the config itself is saved, and holds no model
    config.params.model = model
    betas = config.get("betas")
    if betas is not None and len(betas) != 2:
        raise ValueError(f"optimizer.betas={list(betas)}: give two, as in [0.9, 0.999].")
    try:
        return instantiate(config)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}. Change the keys of `optimizer`.") from error


def build_evaluation(
    cfg: DictConfig, *, training: bool = False
) -> Callable[[nn.Module], dict[str, Any]]:
    """Prepares the evaluation on the config's test set, all processes together.

    The test protocol is `cfg.dataloader.inference`; a config without one runs the model as it is.
    The network computes in the precision of the training, `cfg.train.amp`.

    Args:
        cfg: whole config.
        training: whether a training follows, which chooses its best weights by a metric.

    Returns:
        model -> {"sem_seg": {"mIoU": percent, ...}} on the main process, {} on others.

    Raises:
        ValueError: the dataset is missing, a setting of protocol or precision is out of range, or
            there is no such metric.
    """
    protocol = instantiate(cfg.dataloader.get("inference")) or InferenceProtocol()
    evaluator, loader = instantiate(cfg.dataloader.evaluator), instantiate(cfg.dataloader.test)
    if training:
        check_best_metric(cfg.train.best_metric, evaluator)
    device, amp = checked_device(cfg.train.device), cfg.train.amp
    precision = autocast(device, amp.dtype if amp.enabled else None)
    logger.info("Evaluation with %s", protocol)

    def evaluate(model: nn.Module) -> dict[str, Any]:
        training = model.training
        if comm.get_world_size() > 1:
            # Batch norm statistics may differ between processes: a checkpoint holds the first's.
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
        try:
            results = _evaluate(protocol(model.eval()), loader, evaluator, precision)
        finally:
            model.train(training)
        if comm.is_main_process():
            print_csv_format(results)
        return results or {}

    return evaluate


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    evaluator: DatasetEvaluator,
    precision: torch.autocast,
) -> dict[str, Any] | None:
    """detectron2's `inference_on_dataset`, which waits for the GPU at every image to time it."""
    evaluator.reset()
    start, images = time.perf_counter(), 0
    failure: Exception | None = None
    try:
        for inputs in loader:
            with precision:
                outputs = model(inputs)
            evaluator.process(inputs, outputs)
            images += len(inputs)
            log_every_n_seconds(
                logging.INFO, f"Evaluation: {images} images so far", n=30, name=__name__
            )
    except Exception as error:  # of which other processes must not wait for this one's counts
        failure = error
    failures = [text for text in comm.all_gather(None if failure is None else str(failure)) if text]
    if failure is not None:
        raise failure
    if failures:
        raise ValueError(failures[0])
    results = evaluator.evaluate()
    logger.info("Evaluated %d images in %.0f s", images, time.perf_counter() - start)
    return results

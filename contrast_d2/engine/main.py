"""What `train_net.py` does: set up, then train or evaluate."""

from __future__ import annotations

import argparse
import copy
import glob
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import create_ddp_model, default_writers, hooks
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.events import EventWriter
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from timm.layers import convert_sync_batchnorm  # pyright: ignore[reportPrivateImportUsage]
from torch import nn

from ..backbones import without_starting_weights
from ..evaluation import InferenceProtocol
from ..segmentor import inference_state_dict
from .checkpoint import Checkpointer, find_resumable, training_checkpoints
from .checks import check_classes, check_crop, check_training
from .config import import_modules, load_config
from .dashboard import Dashboard
from .determinism import compute_deterministically
from .files import stop_when_disk_is_full, write_atomically
from .hooks import BestCheckpointer, MetricsWriter, WeightAverage
from .record import record_run
from .trainer import Batch, NonFiniteLossError, Trainer
from .writers import open_writers

logger = logging.getLogger(__name__)


def main(args: argparse.Namespace) -> None:
    """Runs one process of a job.

    Args:
        args: of `argument_parser`.

    Raises:
        SystemExit: with one line, for a mistake in the config, the data or the command line.
    """
    try:
        import_modules(args.imports)  # a process that was spawned knows none of them yet
        cfg = load_config(args.config_file, args.opts)
        check_classes(cfg)  # a class count that is read off the dataset fails from here on
        if not args.eval_only:
            check_training(cfg.train)
        set_up(cfg, args)
        if args.eval_only:
            evaluate_checkpoint(cfg)
        else:
            train(cfg, resume=args.resume)
    except (ValueError, NonFiniteLossError) as error:
        logger.debug("stopped by:", exc_info=True)
        raise SystemExit(f"error: {_message(error)}") from error


def set_up(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Opens the log in the output folder and notes the environment; seeds."""
    output_dir = cfg.train.output_dir
    if comm.is_main_process():
        try:
            PathManager.mkdirs(output_dir)
        except OSError as error:
            raise ValueError(f"train.output_dir={output_dir} cannot be made: {error}.") from error
        if not (os.path.isdir(output_dir) and os.access(output_dir, os.W_OK)):
            raise ValueError(
                f"train.output_dir={output_dir} cannot be written: name a folder of your own."
            )
    comm.synchronize()
    rank = comm.get_rank()
    # Lines that do not fit on a full disk are lost; their tracebacks would hide the error's own.
    logging.raiseExceptions = False
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    setup_logger(output_dir, distributed_rank=rank, name="contrast_d2", abbrev_name="c_d2")
    setup_logger(output_dir, distributed_rank=rank)
    for name in ("fvcore", "contrast_d2", "detectron2"):
        for handler in logging.getLogger(name).handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.setLevel(logging.INFO)  # details go to the file
    logger.info("Process %d of %d on %s", rank, comm.get_world_size(), device())
    logger.info("Environment:\n%s", collect_env_info())
    logger.info("Command line: %s", args)
    torch.manual_seed(max(cfg.train.seed, 0))
    torch.backends.cudnn.benchmark = cfg.train.cudnn_benchmark and not args.eval_only
    if cfg.train.get("deterministic"):  # which configs saved by earlier versions lack
        compute_deterministically()


def _message(error: Exception) -> str:
    """What an error says, without the traceback that a data worker wraps it in."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].removeprefix(f"{type(error).__name__}: ")
    return text


def device() -> torch.device:
    """This process's GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def build_model(cfg: DictConfig, *, starting_weights: bool = True) -> nn.Module:
    """The config's model, on this process's device.

    Args:
        cfg: whole config.
        starting_weights: load what its backbone starts a training from; not if a checkpoint will
            replace it, so that neither network nor file is needed.
    """
    config = cfg.model if starting_weights else without_starting_weights(cfg.model)
    model = instantiate(config).to(device())
    if cfg.train.sync_bn and comm.get_world_size() > 1:
        if device().type == "cpu":
            logger.warning("train.sync_bn needs GPUs: each process has its own batch statistics.")
        else:
            # torch's own conversion loses the activation in timm's fused norm layers
            model = convert_sync_batchnorm(model)
    if cfg.train.channels_last:
        # A convolution gives its output the format of its weights, whatever that of its input is:
        # no image or feature map has to be converted.
        model = model.to(memory_format=torch.channels_last)
    return model


def train(cfg: DictConfig, *, resume: bool) -> dict[str, Any]:
    """Trains, evaluates, and leaves checkpoints and metrics in `cfg.train.output_dir`.

    Args:
        cfg: whole config.
        resume: continue from the folder's last checkpoint, if it has one.

    Returns:
        The results of the last evaluation, on the main process.
    """
    options = cfg.train
    saved = copy.deepcopy(cfg)  # without the objects that are put into it
    evaluate = build_evaluation(cfg)  # before the training that would be lost without it
    last = find_resumable(options.output_dir) if resume else ""
    model = build_model(cfg, starting_weights=not last)
    logger.info("Model:\n%s", model)
    check_crop(OmegaConf.select(cfg, "dataloader.train.mapper.augmentations.crop_size"), model)
    schedule = instantiate(cfg.lr_multiplier)
    # For its mistakes, and used unless the run is resumed.
    from_start = build_train_batches(cfg, 0)
    optimizer = build_optimizer(cfg, model)
    ddp_options = {} if device().type == "cuda" else {"device_ids": None}
    trainer = Trainer(
        create_ddp_model(model, broadcast_buffers=False, **ddp_options),
        optimizer,
        lambda start: build_train_batches(cfg, start) if start else from_start,
        seed=options.seed,
        precision=options.precision,
        accumulation_steps=options.accumulation_steps,
        clip_norm=options.clip_norm,
    )
    checkpointer = Checkpointer(
        model, options.output_dir, allow_pickle=options.allow_pickle, trainer=trainer
    )
    if not last:
        checkpointer.load(options.init_checkpoint, checkpointables=[])
    decay = options.get("ema_decay")  # which configs that earlier versions saved do not have
    average = None if decay is None else WeightAverage(model, decay)
    evaluated = nullcontext if average is None else average.applied
    is_main = comm.is_main_process()
    if is_main:
        _remove_half_written(options.output_dir)
        if not last:
            _put_earlier_run_aside(options.output_dir)
        with stop_when_disk_is_full(options.output_dir):
            LazyConfig.save(saved, os.path.join(options.output_dir, "config.yaml"))
            if not last:
                record_run(options.output_dir)
    results: dict[str, Any] = {}

    def evaluate_now() -> dict[str, Any]:
        with evaluated():
            results.update(evaluate(model))
        return results

    periodic = hooks.PeriodicCheckpointer(
        checkpointer, options.checkpoint_period, max_to_keep=options.checkpoints_to_keep
    )

    # The order matters to a killed run: a checkpoint is written once the evaluation, the choice of
    # the best and the metrics of its iteration are done, so that what follows it has not happened.
    def build_writers() -> list[EventWriter]:
        if not is_main:
            return []
        # Before that of TensorBoard, which takes the pictures out of the storage.
        trackers = open_writers(options.get("writers", []), options.output_dir, resumed=bool(last))
        return [*trackers, *default_writers(options.output_dir, options.max_iter)]

    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=schedule),
            average,
            hooks.EvalHook(options.eval_period, evaluate_now),
            BestCheckpointer(checkpointer, options.best_metric, options.eval_period, evaluated),
            build_dashboard(cfg, model) if is_main else None,
            MetricsWriter(build_writers, options.log_period, options.output_dir),
            periodic if is_main else None,
        ]
    )
    if last:
        checkpointer.resume(last)
        periodic.recent_checkpoints = _checkpoints_until(trainer.iter, options.output_dir)
    comm.synchronize()
    trainer.train(trainer.iter + 1 if last else 0, options.max_iter)
    if is_main:
        path = os.path.join(options.output_dir, "model_inference.pth")
        with evaluated():
            state = {"model": inference_state_dict(model)}
            write_atomically(path, lambda file: torch.save(state, file))
        logger.info("Weights without the contrast method: %s", path)
    return results


def build_dashboard(cfg: DictConfig, model: nn.Module) -> Dashboard | None:
    """The hook that shows what the contrast does; None where there is none, or it is not asked for.

    Args:
        cfg: whole config.
        model: a `ContrastiveSegmentor`.
    """
    period = cfg.train.get("dashboard_period", 0)  # which configs saved by earlier versions lack
    contrast = getattr(model, "contrast", None)
    if period == 0 or contrast is None:
        return None
    train_sets = cfg.dataset.train
    name = train_sets if isinstance(train_sets, str) else train_sets[0]
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper.image_format")
    return Dashboard(
        contrast,
        period,
        cfg.train.output_dir,
        MetadataCatalog.get(name).stuff_classes,
        image_format=mapper or "RGB",
    )


def build_optimizer(cfg: DictConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The config's optimizer, on the parameters of a model.

    Raises:
        ValueError: PyTorch refuses one of its settings.
    """
    cfg.optimizer.params.model = model
    try:
        return instantiate(cfg.optimizer)
    except ValueError as error:
        raise ValueError(f"optimizer: {error}. Change the keys of `optimizer`.") from error


def build_train_batches(cfg: DictConfig, start_iteration: int) -> Iterable[Batch]:
    """This process's training batches from an iteration on."""
    cfg.dataloader.train.start_iteration = start_iteration
    return instantiate(cfg.dataloader.train)


def build_evaluation(cfg: DictConfig) -> Callable[[nn.Module], dict[str, Any]]:
    """Prepares the evaluation on the config's test set, all processes together.

    The test protocol is `cfg.dataloader.inference`; a config without one runs the model as it is.

    Returns:
        model -> {"sem_seg": {"mIoU": percent, ...}} on the main process, {} on others.

    Raises:
        ValueError: the dataset is not there, or a setting of the protocol is out of range.
    """
    protocol = instantiate(cfg.dataloader.get("inference")) or InferenceProtocol()
    evaluator, loader = instantiate(cfg.dataloader.evaluator), instantiate(cfg.dataloader.test)
    logger.info("Evaluation with %s", protocol)
    return lambda model: _evaluate(model, protocol, loader, evaluator)


def _evaluate(
    model: nn.Module,
    protocol: Callable[[nn.Module], nn.Module],
    loader: Iterable[Batch],
    evaluator: DatasetEvaluator,
) -> dict[str, Any]:
    training = model.training
    if comm.get_world_size() > 1:
        # Batch norm statistics may differ between processes: those that a checkpoint holds count.
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    results = inference_on_dataset(protocol(model.eval()), loader, evaluator)
    model.train(training)
    if comm.is_main_process():
        print_csv_format(results)
    return results or {}


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates the weights of `train.init_checkpoint`, or else the run's own final ones.

    Raises:
        ValueError: there are no weights, or they are of another model.
    """
    model = build_model(cfg, starting_weights=False)
    checkpointer = Checkpointer(model, cfg.train.output_dir, allow_pickle=cfg.train.allow_pickle)
    path = cfg.train.init_checkpoint or checkpointer.get_checkpoint_file()
    if not path:
        raise ValueError(
            f"nothing to evaluate: {cfg.train.output_dir} has no checkpoint. Name one with "
            "train.init_checkpoint=FILE, or the run's folder with train.output_dir=FOLDER."
        )
    evaluate = build_evaluation(cfg)
    checkpointer.load_for_inference(path)
    return evaluate(model)


def _remove_half_written(output_dir: str) -> None:
    """Removes what a killed run left under temporary names."""
    for path in glob.glob(os.path.join(glob.escape(output_dir), "*.tmp")):
        os.unlink(path)


def _put_earlier_run_aside(output_dir: str) -> None:
    """Renames what another run has left in the folder, for a `--resume` not to continue that one.

    `model_best.pth` and `model_inference.pth` stay until the new run writes its own.
    """
    names = [os.path.join(output_dir, name) for name in ("metrics.json", "last_checkpoint")]
    paths = [*filter(os.path.exists, names), *training_checkpoints(output_dir)]
    for path in paths:
        os.replace(path, path + ".old")
    if paths:
        logger.warning("of an earlier run, and now ending in .old: %s", ", ".join(paths))


def _checkpoints_until(iteration: int, output_dir: str) -> list[str]:
    """The run's periodic checkpoints, oldest first: `checkpoints_to_keep` counts them on a resume.

    Later ones, which a kill can leave before they are named as the last, will be written again.
    """
    numbered = re.compile(r".*model_(\d{7})\.pth")
    matches = map(numbered.fullmatch, training_checkpoints(output_dir))
    return [match[0] for match in matches if match and int(match[1]) <= iteration]

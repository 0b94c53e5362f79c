#!/usr/bin/env python
"""Trains or evaluates the model of an experiment file.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py
    [--num-gpus N] [--resume] [--eval-only] [--import MODULE] [key=value ...]

The file may also be a yaml config of detectron2, with overrides KEY VALUE ... Several processes and
machines, and torchrun: docs/distributed.md.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)
warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=DeprecationWarning)

# ruff: noqa: E402
import torch
from detectron2.config import instantiate
from detectron2.engine import create_ddp_model, default_writers, hooks, launch
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from contrast_d2.engine import (
    BestCheckpointer,
    Checkpointer,
    MetricsWriter,
    PeriodicCheckpointer,
    Trainer,
    WeightAverage,
    argument_parser,
    begin_run,
    build_evaluation,
    build_model,
    build_optimizer,
    check_config,
    check_crop,
    check_launch,
    compute_deterministically,
    find_resumable,
    import_modules,
    join_torchrun,
    last_checkpoint,
    load_config,
    load_trained,
    one_line_errors,
    open_log,
    open_writers,
    run_process,
    save_inference_weights,
    tell_failure,
    under_torchrun,
)

logger = logging.getLogger("contrast_d2")


def do_test(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates the weights of `train.init_checkpoint`, or else the run's own last ones."""
    evaluate = build_evaluation(cfg)
    weights = cfg.train.init_checkpoint or last_checkpoint(cfg.train.output_dir)
    return evaluate(load_trained(cfg, weights, device=cfg.train.device))


def do_train(cfg: DictConfig, *, resume: bool) -> dict[str, Any]:
    """Trains, evaluates, and leaves checkpoints and metrics in `train.output_dir`."""
    options, output_dir = cfg.train, cfg.train.output_dir
    # What can be wrong with an experiment is wrong in these lines, before anything is written.
    evaluate = build_evaluation(cfg)
    last = find_resumable(output_dir) if resume else ""
    model = build_model(cfg, starting_weights=not last)
    check_crop(cfg, model)
    data_loader = instantiate(cfg.dataloader.train)
    trainer = Trainer(
        create_ddp_model(model, **ddp_options(cfg)),
        data_loader,
        build_optimizer(cfg, model),
        seed=options.seed,
        amp_dtype=options.amp.dtype if options.amp.enabled else None,
        accumulation_steps=options.accumulation_steps,
        clip_norm=options.clip_norm,
        log_period=options.log_period,
    )
    checkpointer = Checkpointer(
        model, output_dir, allow_pickle=options.allow_pickle, trainer=trainer
    )
    average = None if options.ema_decay is None else WeightAverage(model, options.ema_decay)
    averaged = nullcontext if average is None else average.applied
    results: dict[str, Any] = {}

    def test() -> dict[str, Any]:
        trainer.catch_up()
        with averaged():
            results.update(evaluate(model))
        return results

    def writers() -> list[Any]:
        # Trackers come before TensorBoard, which takes the pictures out of the storage.
        trackers = open_writers(options.writers, output_dir, resumed=bool(last))
        return [*trackers, *default_writers(output_dir, options.max_iter)]

    is_main = comm.is_main_process()
    # A checkpoint comes last: the evaluation, the choice of the best and the metrics of its
    # iteration are done by then, and what follows it has not happened for a run that resumes.
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            average,
            hooks.EvalHook(options.eval_period, test),
            BestCheckpointer(checkpointer, options.best_metric, options.eval_period, averaged),
            instantiate(options.dashboard) if is_main else None,
            MetricsWriter(writers if is_main else list, options.log_period, output_dir),
            PeriodicCheckpointer(checkpointer, **options.checkpointer) if is_main else None,
        ]
    )
    start = 0
    if last:
        checkpointer.resume(last)
        start = trainer.iter + 1
    else:
        checkpointer.load(options.init_checkpoint, checkpointables=[])
    data_loader.start_at(start)

    logger.info("Model:\n%s", model)
    if is_main:
        begin_run(cfg, resumed=bool(last))
    comm.synchronize()
    trainer.train(start, options.max_iter)
    if is_main:
        with averaged():
            save_inference_weights(model, output_dir)
    return results


def ddp_options(cfg: DictConfig) -> dict[str, Any]:
    """What DistributedDataParallel is given: on a CPU no device ids, which detectron2 adds."""
    on_gpu = torch.device(cfg.train.device).type == "cuda"
    return {**cfg.train.ddp} if on_gpu else {**cfg.train.ddp, "device_ids": None}


def setup(args: argparse.Namespace) -> DictConfig:
    """Reads and checks the config, opens the log in the output folder, seeds."""
    import_modules(args.imports)  # a process that was spawned knows none of them yet
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg, training=not args.eval_only)
    open_log(cfg.train.output_dir, args)
    torch.manual_seed(cfg.train.seed)
    torch.backends.cudnn.benchmark = cfg.train.cudnn_benchmark and not args.eval_only
    if cfg.train.deterministic:
        compute_deterministically()
    return cfg


def main(args: argparse.Namespace) -> None:
    """One process of a job."""
    with one_line_errors():
        cfg = setup(args)
        if args.eval_only:
            do_test(cfg)
        else:
            do_train(cfg, resume=args.resume)


def start(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, timeout: timedelta):
    """Runs a function in all processes of a job: torchrun's, or those of detectron2's `launch`."""
    if under_torchrun():
        join_torchrun(main, args, timeout=timeout)
        return
    try:
        launch(
            run_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args),
            timeout=timeout,
        )
    except (ProcessExitedException, ProcessRaisedException) as error:
        sys.exit(tell_failure(error))


def run() -> None:
    args = argument_parser().parse_args()
    with one_line_errors():  # before processes start
        check_launch(args)
        import_modules(args.imports)
        cfg = load_config(args.config_file, args.opts)
    start(main, args, timedelta(minutes=cfg.train.timeout_minutes))


if __name__ == "__main__":
    run()

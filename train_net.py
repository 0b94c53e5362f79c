#!/usr/bin/env python
"""Trains or evaluates the model of an experiment file.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py
    [--num-gpus N] [--resume] [--eval-only] [--import MODULE] [key=value ...]

The file may also be a yaml config of detectron2, with overrides KEY VALUE ... Several processes and
machines, and torchrun: docs/distributed.md.
"""

import argparse
import logging
import signal
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
import contrast_d2  # noqa: F401  # isort: skip  (which says how torch's threads are to wait)
import torch
from detectron2.config import instantiate
from detectron2.engine import create_ddp_model, default_writers, hooks, launch
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from contrast_d2.engine import (
    STOPPED,
    AfterCheckpoint,
    BestCheckpointer,
    Checkpointer,
    DispensableWriter,
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
    check_labels,
    check_launch,
    check_ranges,
    check_same_experiment,
    compute_deterministically,
    find_resumable,
    import_modules,
    join_torchrun,
    last_checkpoint,
    load_config,
    load_trained,
    make_folder,
    one_line_errors,
    open_log,
    open_writers,
    owned,
    passing_on_signals,
    plain_config,
    run_process,
    save_inference_weights,
    stopping_on_signals,
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
    evaluate = build_evaluation(cfg, training=True)
    last = find_resumable(output_dir) if resume else ""
    if last:
        check_same_experiment(cfg, last)
    model = build_model(cfg, starting_weights=not last)
    check_crop(cfg, model)
    check_labels(cfg)
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
        model,
        output_dir,
        allow_pickle=options.allow_pickle,
        config=plain_config(cfg),
        trainer=trainer,
    )
    average = None if options.ema_decay is None else WeightAverage(model, options.ema_decay)
    averaged = nullcontext if average is None else average.applied
    results: dict[str, Any] = {}
    failures: list[str] = []  # of the last evaluation

    def test() -> dict[str, Any]:
        trainer.catch_up()
        results.clear()
        failures.clear()
        try:
            with averaged():
                results.update(evaluate(model))
        except FloatingPointError:  # of the weights themselves
            raise
        except Exception as error:
            logger.warning("the evaluation failed, and the training goes on: %s", error)
            logger.debug("it failed by:", exc_info=True)
            failures.append(str(error))
        return results

    def writers() -> list[Any]:
        # Trackers come before TensorBoard, which takes the pictures out of the storage.
        trackers = open_writers(options.writers, output_dir, resumed=bool(last))
        *own, tensorboard = default_writers(output_dir, options.max_iter)
        return [*map(DispensableWriter, trackers), *own, DispensableWriter(tensorboard)]

    is_main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            average,
            instantiate(options.dashboard) if is_main else None,
            PeriodicCheckpointer(checkpointer, **options.checkpointer) if is_main else None,
            # What follows cannot cost training: a run that resumes makes up for it.
            AfterCheckpoint(),
            hooks.EvalHook(options.eval_period, test),
            BestCheckpointer(checkpointer, options.best_metric, options.eval_period, averaged),
            MetricsWriter(writers if is_main else list, options.log_period, output_dir),
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
        begin_run(cfg, start)
    comm.synchronize()
    with stopping_on_signals(trainer.request_stop):
        trainer.train(start, options.max_iter)
    if is_main:
        with averaged():
            save_inference_weights(model, output_dir)
    if failures:
        raise ValueError(
            f"the training is complete and its weights are saved, but the last evaluation failed: "
            f"{failures[0]} When that is put right, run the command with --eval-only."
        )
    return results


def ddp_options(cfg: DictConfig) -> dict[str, Any]:
    """What DistributedDataParallel is given: on a CPU no device ids, which detectron2 adds."""
    on_gpu = torch.device(cfg.train.device).type == "cuda"
    return {**cfg.train.ddp} if on_gpu else {**cfg.train.ddp, "device_ids": None}


def read(args: argparse.Namespace) -> DictConfig:
    """Reads and checks the config, and makes its folder."""
    import_modules(args.imports)  # a process that was spawned knows none of them yet
    cfg = load_config(args.config_file, args.opts)
    check_config(cfg, training=not args.eval_only)
    make_folder(cfg.train.output_dir)
    return cfg


def set_up(cfg: DictConfig, args: argparse.Namespace) -> None:
    """Opens the log in the output folder, seeds."""
    open_log(cfg.train.output_dir, args)
    torch.manual_seed(cfg.train.seed)
    torch.backends.cudnn.benchmark = cfg.train.cudnn_benchmark and not args.eval_only
    if cfg.train.deterministic:
        compute_deterministically()


def main(args: argparse.Namespace) -> None:
    """One process of a job."""
    with one_line_errors():
        cfg = read(args)
        if args.eval_only:
            set_up(cfg, args)
            do_test(cfg)
            return
        with owned(cfg.train.output_dir):
            set_up(cfg, args)
            do_train(cfg, resume=args.resume)


def start(main: Callable[[argparse.Namespace], None], args: argparse.Namespace, timeout: timedelta):
    """Runs a function in all processes of a job: torchrun's, or those of detectron2's `launch`."""
    if under_torchrun():
        join_torchrun(main, args, timeout=timeout)
        return
    several = args.num_gpus * args.num_machines > 1
    try:
        with passing_on_signals() if several else nullcontext():
            launch(
                run_process,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
                timeout=timeout,
            )
    except ProcessExitedException as error:
        sys.exit(STOPPED if error.exit_code == STOPPED else tell_failure(error))
    except ProcessRaisedException as error:
        sys.exit(tell_failure(error))


def run() -> None:
    args = argument_parser().parse_args()
    with one_line_errors():  # before processes start
        check_launch(args)
        import_modules(args.imports)
        cfg = load_config(args.config_file, args.opts)
        check_ranges(cfg)
    try:
        start(main, args, timedelta(minutes=cfg.train.timeout_minutes))
    except KeyboardInterrupt:  # before the training, or the second one
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    run()

"""Training and evaluation jobs: config, launch, trainer, checkpoints."""

from ..config.loading import argument_parser, import_modules, load_config
from .build import build_evaluation, build_model, build_optimizer, load_trained
from .checkpoint import Checkpointer, find_resumable, last_checkpoint
from .checks import (
    check_classes,
    check_config,
    check_crop,
    check_labels,
    check_ranges,
    one_line_errors,
)
from .determinism import compute_deterministically
from .experiment import check_same_experiment, plain_config
from .hooks import BestCheckpointer, MetricsWriter, PeriodicCheckpointer, WeightAverage
from .launch import check_launch, join_torchrun, run_process, tell_failure, under_torchrun
from .ownership import owned
from .record import begin_run, make_folder, open_log, save_inference_weights
from .stopping import STOPPED, AfterCheckpoint, passing_on_signals, stopping_on_signals
from .trainer import NonFiniteLossError, Trainer
from .writers import DispensableWriter, open_writers

__all__ = [
    "STOPPED",
    "AfterCheckpoint",
    "BestCheckpointer",
    "Checkpointer",
    "DispensableWriter",
    "MetricsWriter",
    "NonFiniteLossError",
    "PeriodicCheckpointer",
    "Trainer",
    "WeightAverage",
    "argument_parser",
    "begin_run",
    "build_evaluation",
    "build_model",
    "build_optimizer",
    "check_classes",
    "check_config",
    "check_crop",
    "check_labels",
    "check_launch",
    "check_ranges",
    "check_same_experiment",
    "compute_deterministically",
    "find_resumable",
    "import_modules",
    "join_torchrun",
    "last_checkpoint",
    "load_config",
    "load_trained",
    "one_line_errors",
    "make_folder",
    "open_log",
    "open_writers",
    "owned",
    "passing_on_signals",
    "plain_config",
    "run_process",
    "save_inference_weights",
    "stopping_on_signals",
    "tell_failure",
    "under_torchrun",
]

"""Training and evaluation jobs: config, launch, trainer, checkpoints."""

from .checkpoint import Checkpointer
from .config import argument_parser, import_modules, load_config
from .failures import ProcessFailedError
from .hooks import BestCheckpointer
from .launch import launch
from .main import main
from .trainer import NonFiniteLossError, Trainer

__all__ = [
    "BestCheckpointer",
    "Checkpointer",
    "NonFiniteLossError",
    "ProcessFailedError",
    "Trainer",
    "argument_parser",
    "import_modules",
    "launch",
    "load_config",
    "main",
]

"""Training and evaluation jobs: config, launch, trainer, checkpoints."""

from .checkpoint import Checkpointer
from .config import load_config
from .hooks import BestCheckpointer
from .launch import launch
from .main import main
from .trainer import NonFiniteLossError, Trainer

__all__ = [
    "BestCheckpointer",
    "Checkpointer",
    "NonFiniteLossError",
    "Trainer",
    "launch",
    "load_config",
    "main",
]

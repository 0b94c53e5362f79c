"""Computations that give the same bits whenever they are repeated on a machine."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

_CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
# The sizes with which cuBLAS is deterministic also on several streams.
_WORKSPACES = (":4096:8", ":16:8")


def compute_deterministically() -> None:
    """Makes every later computation of this process deterministic, or fail.

    Operations take their deterministic algorithm, which may be slower; one that has none raises a
    RuntimeError that names it. Call it before anything runs on a GPU: cuBLAS reads its setting
    from the environment when it starts.

    Raises:
        ValueError: the environment holds a setting with which cuBLAS is not deterministic.
    """
    workspace = os.environ.setdefault(_CUBLAS_WORKSPACE, _WORKSPACES[0])
    if workspace not in _WORKSPACES:
        raise ValueError(
            f"train.deterministic=True with {_CUBLAS_WORKSPACE}={workspace} in the environment: "
            f"unset it, or set it to one of {', '.join(_WORKSPACES)}."
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    # It would choose algorithms by how long they took.
    torch.backends.cudnn.benchmark = False
    logger.info("Deterministic algorithms only")

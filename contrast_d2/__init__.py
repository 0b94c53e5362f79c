"""Supervised contrastive learning for semantic segmentation, on detectron2.

Importing the package fills detectron2's registries: backbones, semantic heads, the
meta-architecture and the datasets. `contrast_d2.contrast` does without detectron2.
"""

import os
import warnings
from importlib.util import find_spec

# Before torch is imported, which starts its threads so: while they wait for work they otherwise
# keep the cores from other programs, and these from them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# ruff: noqa: E402
from .config.model_zoo import get_config

__all__ = ["__version__", "get_config"]
__version__ = "0.1.0"

if find_spec("detectron2") is not None:
    with warnings.catch_warnings():
        # detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
        warnings.filterwarnings("ignore", message=".*torch.jit.script.*")
        from . import backbones, data, decoders, segmentor  # noqa: F401
        from .config.yacs import add_contrast_config  # noqa: F401

    __all__ += ["add_contrast_config"]

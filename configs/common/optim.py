"""Optimizers, and the polynomial decay of the learning rate."""

from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from torch.optim import SGD, AdamW

from contrast_d2.solver import poly_schedule

sgd = L(SGD)(
    params=L(get_default_optimizer_params)(),  # the model is filled in by the trainer
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
)

adamw = L(AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=6e-5,
    betas=(0.9, 0.999),
    weight_decay=0.01,
)

lr_multiplier = L(poly_schedule)(
    max_iter="${train.max_iter}", power=0.9, warmup_iters=0, warmup_factor=1e-3
)

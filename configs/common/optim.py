"""Optimizers and learning-rate schedules.

Experiment files take them by the names that a config has, `optimizer` and `lr_multiplier`:

    from ..common.optim import poly as lr_multiplier, sgd as optimizer

With `fused` a step that is not finite is skipped on the GPU; without, the host waits for the GPU in
every step to decide it.
"""

from copy import deepcopy

from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import StepWithFixedGammaParamScheduler
from torch.optim import SGD, Adam, AdamW

from contrast_d2.config.solver import optimizer_params, poly_schedule

sgd = L(SGD)(
    params=L(get_default_optimizer_params)(),  # the model is filled in by the trainer
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    fused=True,
)

# Decoder and projectors learn ten times as fast as the backbone.
sgd_fast_head = deepcopy(sgd)
sgd_fast_head.params = L(optimizer_params)(base_lr="${..lr}", head_lr_factor=10.0)
sgd_fast_head.lr = 1e-3
sgd_fast_head.weight_decay = 1e-4

# Neither norms nor the position biases of Swin are decayed.
adamw = L(AdamW)(
    params=L(get_default_optimizer_params)(
        weight_decay_norm=0.0,
        overrides={"relative_position_bias_table": {"weight_decay": 0.0}},
    ),
    lr=6e-5,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    fused=True,
)

adam = L(Adam)(params=L(get_default_optimizer_params)(), lr=1e-4, fused=True)

lr_multiplier = L(poly_schedule)(
    max_iter="${train.max_iter}", power=0.9, warmup_iters=0, warmup_factor=1e-3
)

# Of mmsegmentation's trainings of convolutional networks, which end at a rate of 1e-4: the share is
# that of a base rate of 0.01.
poly_to_minimum = deepcopy(lr_multiplier)
poly_to_minimum.min_factor = 0.01

# Of Swin's trainings.
linear_after_warmup = L(poly_schedule)(
    max_iter="${train.max_iter}", power=1.0, warmup_iters=1500, warmup_factor=1e-6
)

# 2 % less after each of 50 equal parts of the training, such as epochs.
two_percent_less = L(StepWithFixedGammaParamScheduler)(
    base_value=1.0, gamma=0.98, num_decays=49, num_updates="${train.max_iter}"
)

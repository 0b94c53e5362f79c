"""Settings of the training loop; experiment files change what differs.

The first ones are those of detectron2's own `configs/common/train.py`.
"""

import torch
from detectron2.config import LazyCall as L

from contrast_d2.studio.dashboard import Dashboard

train = dict(
    output_dir="output",
    # Weights to start from; with --eval-only, those to evaluate.
    init_checkpoint="",
    max_iter=6000,
    # Autocast to "bf16", or to "fp16" with a loss scaler; in evaluations too.
    amp=dict(enabled=False, dtype="bf16"),
    # Arguments of DistributedDataParallel.
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    # In iterations; the last `max_to_keep` checkpoints stay, None keeps all.
    checkpointer=dict(period=500, max_to_keep=2),
    # In iterations; 0 evaluates at the end only.
    eval_period=500,
    log_period=20,
    device="cuda" if torch.cuda.is_available() else "cpu",
    # From here on, ours.
    # Seed of everything random: order, augmentation, initial weights, sampled pixels.
    seed=0,
    # Whether init_checkpoint may be a .pkl file, as detectron2's ImageNet weights are: reading one
    # runs the code it holds.
    allow_pickle=False,
    # Keys that --resume may change, of those that it would refuse: e.g. ["optimizer.lr"].
    resume_changes=[],
    # Batches per optimizer step; total_batch_size is divided by it.
    accumulation_steps=1,
    # Largest norm of the gradient; None for no clipping.
    clip_norm=None,
    # Moving average of the weights, to be evaluated and left as the best and the final weights in
    # their place, e.g. 0.999, which spans about 1,000 iterations; None for none.
    ema_decay=None,
    # Batch norm statistics over all GPUs.
    sync_bn=True,
    # The longest that a process waits for another one before the job is given up.
    timeout_minutes=30,
    cudnn_benchmark=True,
    # The same bits whenever a run is repeated on a machine, at some cost in time on GPUs. An
    # operation without a deterministic algorithm then raises an error.
    deterministic=False,
    # Weights and feature maps in the memory format that tensor cores take; results to rounding.
    channels_last="${train.amp.enabled}",
    # Pictures of what the contrast samples, for TensorBoard and in output_dir/dashboard, every so
    # many iterations; None for none.
    dashboard=L(Dashboard)(
        period=500,
        output_dir="${train.output_dir}",
        dataset="${dataset.train}",
        image_format="${oc.select:dataloader.train.mapper.image_format,RGB}",
    ),
    # Besides log, metrics.json and TensorBoard: "wandb", "mlflow".
    writers=[],
    # What model_best.pth is chosen by.
    best_metric="sem_seg/mIoU",
)

"""CaDIS, task 1, OCR on ResNet-50, baseline: 86.40 mIoU (Test videos of CaDIS of Pissas et al.,
MICCAI 2021). Four GPUs; the paper does not state how many.

python train_net.py --config-file configs/cadis/ocr_r50_base_task1_50ep.py --num-gpus 4
"""

from .ocr_r50_base_task2_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

dataset.train = "cadis_task1_sem_seg_train"
dataset.test = "cadis_task1_sem_seg_val"
train.max_iter = 22_200
train.eval_period = 888
train.checkpointer.period = 888
train.output_dir = "output/cadis/ocr_r50_base_task1_50ep"

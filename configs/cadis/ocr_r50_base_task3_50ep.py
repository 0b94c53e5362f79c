"""CaDIS, task 3, OCR on ResNet-50, baseline: 77.77 mIoU on the validation videos, 90.59 of
anatomies, 72.96 of tools, 71.44 of rare classes (Table 4(b) of Pissas et al., ECCV 2022); 71.94
mIoU (Test videos of CaDIS of Pissas et al., MICCAI 2021). Four GPUs; the paper does not state how
many.

python train_net.py --config-file configs/cadis/ocr_r50_base_task3_50ep.py --num-gpus 4
"""

from .ocr_r50_base_task2_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

dataset.train = "cadis_task3_sem_seg_train"
dataset.test = "cadis_task3_sem_seg_val"
train.max_iter = 30_750
train.eval_period = 1230
train.checkpointer.period = 1230
train.output_dir = "output/cadis/ocr_r50_base_task3_50ep"

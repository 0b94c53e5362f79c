"""CaDIS, task 3, OCR on ResNet-50, baseline: 77.77 mIoU on the validation videos (Table 4(b) of
Pissas et al., ECCV 2022). The paper does not state how many GPUs; ours: four.

python train_net.py --config-file configs/cadis/ocr_r50_base_task3_50ep.py --num-gpus 4

The recipe is that of task 2; with the repeated images an epoch has about 4,920 images.
"""

from .ocr_r50_base_task2_50ep import dataloader, dataset, lr_multiplier, model, optimizer, train

dataset.train = "cadis_task3_sem_seg_train"
dataset.test = "cadis_task3_sem_seg_val"
train.max_iter = 30_750
train.eval_period = 1230
train.checkpointer.period = 1230
train.output_dir = "output/cadis/ocr_r50_base_task3_50ep"

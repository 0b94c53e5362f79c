"""Cityscapes, OCR on HRNetV2-W48, baseline, trained on both splits: 82.5 mIoU on the test set,
61.7 iIoU, 92.1 IoU of categories, 81.6 iIoU of categories (Yuan et al., ECCV 2020, as cited in
Table 5(b) of Pissas et al., ECCV 2022). Four GPUs.

python train_net.py --config-file configs/cityscapes/ocr_hrnet48_base_120k_trainval.py --num-gpus 4

Trained on the 3,475 images of both splits, so that the evaluation during training, on one of them,
says nothing; the number is the test server's. The paper states no schedule of its own for this;
ours is that of the training split. Its author says that this baseline was not trained.
"""

from .ocr_hrnet48_base_120k import dataloader, dataset, lr_multiplier, model, optimizer, train

dataset.train = ["cityscapes_fine_sem_seg_train", "cityscapes_fine_sem_seg_val"]
dataloader.train.mapper.dataset_name = "${dataset.train.0}"
train.output_dir = "output/cityscapes/ocr_hrnet48_base_120k_trainval"

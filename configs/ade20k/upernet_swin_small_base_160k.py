"""ADE20K, UPerNet on Swin-S, baseline: 81 million parameters, 48.1 mIoU, 49.2 mIoU with
multi-scale testing (Table 4(a) of Pissas et al., ECCV 2022). Four GPUs; as on Cityscapes, for the
paper does not state how many.

python train_net.py --config-file configs/ade20k/upernet_swin_small_base_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]
"""

from .upernet_swin_tiny_base_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.name = "swin_small_patch4_window7_224"
train.output_dir = "output/ade20k/upernet_swin_small_base_160k"

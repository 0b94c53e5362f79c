"""ADE20K, UPerNet on Swin-L, baseline: 234 million parameters, 52.0 mIoU, 53.5 mIoU with
multi-scale testing (Liu et al., ICCV 2021, as cited in Tables 4(a) and 8 of Pissas et al., ECCV
2022). Four GPUs; as on Cityscapes, for the paper does not state how many.

python train_net.py --config-file configs/ade20k/upernet_swin_large_base_160k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75]

Pretrained on ImageNet-22k. The paper did not train this model; crop and schedule are those of the
smaller ones.
"""

from .upernet_swin_tiny_base_160k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.name = "swin_large_patch4_window7_224.ms_in22k"
train.output_dir = "output/ade20k/upernet_swin_large_base_160k"

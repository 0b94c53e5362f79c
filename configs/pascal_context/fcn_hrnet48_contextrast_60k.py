"""PASCAL-Context, HRNetV2-W48, Contextrast: 52.91 mIoU with multi-scale testing (Sung et al., CVPR
2024, as cited in Table III of Sung et al., arXiv 2608.22679). Four GPUs; the paper does not state
how many.

python train_net.py --config-file configs/pascal_context/fcn_hrnet48_contextrast_60k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Preset `contextrast`: temperature 0.1 and a share of 0.5 of the deepest mean are ours, for the paper
has none.
"""

from ..common.contrast.contextrast import contextrast as _contrast
from .fcn_hrnet48_base_60k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/pascal_context/fcn_hrnet48_contextrast_60k"

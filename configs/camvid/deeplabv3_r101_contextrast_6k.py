"""CamVid, DeepLabV3 on ResNet-101, Contextrast: 79.98 mIoU with multi-scale testing (Sung et al.,
CVPR 2024, as cited in Table III of Sung et al., arXiv 2608.22679). Four GPUs; the paper does not
state how many.

python train_net.py --config-file configs/camvid/deeplabv3_r101_contextrast_6k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.75,1.0,1.25,1.5,1.75,2.0]

Preset `contextrast`: temperature 0.1 and a share of 0.5 of the deepest mean are ours, for the paper
has none. Whether the paper has these images of 480x360 or the 960x720 ones, it does not state. The
stem of three convolutions, 512 channels and the auxiliary head are mmsegmentation's, and alike in
the release of Wang et al., ICCV 2021.
"""

from ..common.contrast.contextrast import contextrast as _contrast
from .deeplabv3_r101_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _contrast
train.output_dir = "output/camvid/deeplabv3_r101_contextrast_6k"

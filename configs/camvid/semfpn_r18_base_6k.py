"""CamVid, Semantic FPN on ResNet-18, baseline. One GPU.

python train_net.py --config-file configs/camvid/semfpn_r18_base_6k.py

Batch 16, 360x480 crops, 6k iterations and learning rate 0.02 are the CamVid schedule of Sung et
al., CVPR 2024. No paper reports this model on CamVid.
"""

from ..common.data.camvid import dataloader, dataset
from ..common.models.semfpn import model
from ..common.optim import lr_multiplier
from ..common.optim import sgd as optimizer
from ..common.train import train

optimizer.lr = 0.02
train.max_iter = 6000
train.output_dir = "output/camvid/semfpn_r18_base_6k"

"""CamVid on a CPU: Semantic FPN on ResNet-18 from scratch, small crops, baseline.

python train_net.py --config-file configs/camvid/semfpn_r18_base_cpu.py
"""

from .semfpn_r18_base_6k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.backbone.pretrained = False
model.sem_seg_head.fpn_channels = 64
model.sem_seg_head.conv_dims = 64
dataloader.train.mapper.augmentations.crop_size = (128, 160)
dataloader.train.mapper.augmentations.scale = (0.35, 1.0)
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = 1
dataloader.test.num_workers = 1
optimizer.lr = 0.02
train.max_iter = 1500
train.eval_period = 500
train.output_dir = "output/camvid/semfpn_r18_base_cpu"

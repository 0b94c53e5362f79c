"""CamVid on a CPU: multi- and cross-scale contrast, sampled projection with layer norms.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_sampled_layer_cpu.py
"""

from .semfpn_r18_ms_cs_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast.projection = "sampled"
model.contrast.norm = "layer"
train.output_dir = "output/camvid/semfpn_r18_ms_cs_sampled_layer_cpu"

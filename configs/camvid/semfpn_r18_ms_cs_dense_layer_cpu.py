"""CamVid on a CPU: multi- and cross-scale contrast, dense projection with layer norms.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_dense_layer_cpu.py
"""

from .semfpn_r18_ms_cs_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast.projector.norm = "layer"
train.output_dir = "output/camvid/semfpn_r18_ms_cs_dense_layer_cpu"

"""CamVid on a CPU: multi- and cross-scale contrast, sampled projection, batch norms
with the statistics of the drawn pixels.

python train_net.py --config-file configs/camvid/semfpn_r18_ms_cs_sampled_draw_cpu.py
"""

from .semfpn_r18_ms_cs_cpu import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast.projection = "sampled"
train.output_dir = "output/camvid/semfpn_r18_ms_cs_sampled_draw_cpu"

"""CamVid, HRNetV2-W48, pixel contrast with a memory of regions and pixels: no number known. Four
GPUs; no script is shipped.

python train_net.py --config-file configs/camvid/fcn_hrnet48_pixel_memory_40k.py --num-gpus 4

Tested at several scales, its weights go with
--eval-only train.init_checkpoint=FILE dataloader.inference.flip=True
dataloader.inference.scales=[0.5,0.75,1.0,1.25,1.5,1.75,2.0]

Preset `pixel_memory_semi_hard`: the paper's memory and pairs; the weight of 0.1 and a warm-up of
3000 iterations are the release's for this dataset. Void is ignored; in the release it is a twelfth
class. A temperature of 0.07 is the release's for this dataset; the paper has 0.1.
"""

from ..common.contrast.pixel import pixel_memory_semi_hard as _pixel_memory
from ..common.contrast.taps import joined as _joined
from ..common.contrast.taps import tap as _tap
from .fcn_hrnet48_base_40k import dataloader, dataset, lr_multiplier, model, optimizer, train

model.contrast = _tap(_pixel_memory, "concat", _joined("concat"))
model.contrast.temperature = 0.07
model.contrast.warmup_iters = 3000
model.contrast.memory.regions_per_class = 367  # training images
model.contrast.memory.pixels_per_class = 3670
train.output_dir = "output/camvid/fcn_hrnet48_pixel_memory_40k"

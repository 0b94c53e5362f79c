"""Weights of the classes in the cross entropy, for `model.seg_loss.main.class_weights`."""

# In the order of the classes, from road to bicycle: rare ones weigh more. Of the release of Pissas
# et al., ECCV 2022.
cityscapes = [
    *(0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023),
    *(0.9539, 0.9843, 1.1116, 0.9037, 1.0865, 1.0955, 1.0865, 1.1529, 1.0507),
]

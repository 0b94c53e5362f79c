"""A trained network as a function from one image to its class ids.

Shape letters: K classes, H W the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ..data import SemSegMapper
from ..data.classes import distinct_colors
from ..data.datasets import check_registered
from ..data.labels import LabelMap
from ..engine import load_config
from ..engine.build import load_trained
from ..evaluation import InferenceProtocol


class Predictor:
    """Predicts images as the evaluation does: the mapper's sizes, then the test protocol.

    Args:
        model: what gives the class scores, in evaluation mode.
        mapper: of the test set, for its augmentations and the order of its channels.
        dataset_name: a registered dataset, for names and colours. None of its files is read.

    Attributes:
        class_names: K names.
        class_colors: K RGB triples in 0..255.
        label_map: of the dataset's label files.
    """

    def __init__(self, model: nn.Module, mapper: SemSegMapper, dataset_name: str) -> None:
        metadata = MetadataCatalog.get(dataset_name)
        self.model = model
        self.mapper = mapper
        self.dataset_name = dataset_name
        self.class_names: list[str] = list(metadata.stuff_classes)
        colors = metadata.get("stuff_colors") or distinct_colors(len(self.class_names))
        self.class_colors: list[Sequence[int]] = list(colors)
        self.label_map: LabelMap = mapper.label_map

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Predicts one image.

        Args:
            image: (H, W, 3) uint8, RGB.

        Returns:
            (H, W) uint8, contiguous class ids in 0..K-1.
        """
        height, width = image.shape[:2]
        sample = T.AugInput(image)
        self.mapper.augmentations(sample)
        pixels: Any = sample.image
        if self.mapper.image_format == "BGR":
            pixels = pixels[:, :, ::-1]
        # np.array copies: frames and augmentations may be read-only or negatively strided views.
        tensor = torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
        (output,) = self.model([{"image": tensor, "height": height, "width": width}])
        scores_KHW: Tensor = output["sem_seg"]
        return scores_KHW.argmax(dim=0).to(torch.uint8).cpu().numpy()


def load_predictor(
    config_file: str, weights: str, overrides: Sequence[str] = (), *, device: str | None = None
) -> Predictor:
    """Builds the network of an experiment file with the weights of a checkpoint.

    Neither the dataset's files nor a network connection are needed.

    Args:
        config_file: an experiment file, or the config.yaml of a run.
        weights: a checkpoint, of the training or of its end; "" for `train.init_checkpoint`.
        overrides: changes to the config, as `load_config` takes them.
        device: "cuda", "cuda:1", "cpu"; None takes a GPU where there is one.

    Raises:
        ValueError: a file is missing or does not fit the others, the dataset is not registered or
            has another number of classes, or there is no such device.
    """
    cfg = load_config(config_file, overrides)
    name, mapper = _test_data(cfg, config_file)
    weights = weights or OmegaConf.select(cfg, "train.init_checkpoint")
    if not weights:
        raise ValueError("no weights: name a checkpoint, here or as train.init_checkpoint.")
    protocol: Any = (
        instantiate(OmegaConf.select(cfg, "dataloader.inference")) or InferenceProtocol()
    )
    return Predictor(protocol(load_trained(cfg, weights, device=device)).eval(), mapper, name)


def _test_data(cfg: DictConfig, config_file: str) -> tuple[str, SemSegMapper]:
    """The name of the config's test set, and its mapper."""
    test: Any = OmegaConf.select(cfg, "dataloader.test")
    if test is None or "mapper" not in test or "dataset" not in test:
        raise ValueError(f"{config_file} has no dataloader.test with a dataset and a mapper.")
    name = test.dataset
    check_registered(name)
    classes = len(MetadataCatalog.get(name).stuff_classes)
    expected = OmegaConf.select(cfg, "dataset.num_classes")
    if expected is not None and expected != classes:
        raise ValueError(
            f"dataset.num_classes={expected}, but {name} has {classes} classes: name the dataset "
            "that the network was trained on with dataset.test=NAME."
        )
    if "cache_dir" in test.mapper:
        test.mapper.cache_dir = None
    mapper: Any = instantiate(test.mapper)
    return name, mapper

"""Networks of a config and a checkpoint, as `tools/demo.py` takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T

from contrast_d2.data.datasets import register_folder
from contrast_d2.deploy.predictor import load_predictor
from contrast_d2.engine import load_config
from contrast_d2.evaluation import InferenceProtocol

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs/shapes/semfpn_r18_ms_cs_demo.py")


def save(tmp_path: Path, overrides: list[str]) -> str:
    """A checkpoint of a training with its contrast method, of random weights."""
    torch.manual_seed(1)
    model = instantiate(load_config(CONFIG, overrides).model)
    path = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict(), "iteration": 7}, path)
    return str(path)


def test_predicts_what_the_evaluation_scores(tmp_path: Path) -> None:
    protocol = {"scales": [0.5, 1.25], "flip": True}
    overrides = [
        *SMALL_NETWORK,
        *(f"dataloader.inference.{key}={value}" for key, value in protocol.items()),
        "dataloader.test.mapper.image_format=BGR",
    ]
    weights = save(tmp_path, overrides)
    predictor = load_predictor(CONFIG, weights, overrides, device="cpu")

    cfg = load_config(CONFIG, overrides)
    loader = instantiate(cfg.dataloader.test)
    model = instantiate(cfg.model).eval()
    model.load_state_dict(torch.load(weights)["model"])
    (sample,) = [loader.dataset[3]]
    with torch.no_grad():
        scores = InferenceProtocol(**protocol)(model)([sample])[0]["sem_seg"]
    rgb = sample["image"].numpy().transpose(1, 2, 0)[:, :, ::-1]
    found = predictor(rgb)
    assert found.dtype == np.uint8
    assert len(np.unique(found)) > 1
    assert (found == scores.argmax(dim=0).numpy()).all()
    # Neither the mirror nor the other order of channels has the same scores.
    assert (predictor(rgb[:, :, ::-1]) != found).any()
    assert not predictor.model.training


def test_sizes_of_the_mapper_are_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load_predictor(CONFIG, save(tmp_path, SMALL_NETWORK), SMALL_NETWORK, device="cpu")
    predictor.mapper.augmentations = T.AugmentationList([T.Resize((64, 96))])
    seen = []
    model = predictor.model
    monkeypatch.setattr(
        predictor, "model", lambda inputs: seen.append(inputs[0]["image"].shape) or model(inputs)
    )
    assert predictor(np.zeros((40, 50, 3), dtype=np.uint8)).shape == (40, 50)
    assert seen == [(3, 64, 96)]


def test_needs_no_file_of_the_dataset_and_no_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    weights = save(tmp_path, SMALL_NETWORK)
    camvid = str(ROOT / "configs/camvid/semfpn_r18_base_6k.py")
    more = [*SMALL_NETWORK, "model.sem_seg_head.num_classes=9", "dataset.num_classes=9"]
    with pytest.raises(ValueError, match="camvid_sem_seg_val has 11 classes"):
        load_predictor(camvid, weights, more)
    more = [
        *SMALL_NETWORK,
        "model.backbone.pretrained=True",
        "model.backbone.weights_file=none.pth",
    ]
    predictor = load_predictor(CONFIG, weights, more, device="cpu")
    assert predictor.class_names == MetadataCatalog.get("shapes_sem_seg_val").stuff_classes


def test_a_dataset_without_colours_gets_some(tmp_path: Path) -> None:
    weights = save(tmp_path, SMALL_NETWORK)
    names = [f"thing {i}" for i in range(9)]
    MetadataCatalog.get("colourless").set(stuff_classes=names, ignore_label=255)
    DatasetCatalog.register("colourless", list)
    try:
        overrides = [*SMALL_NETWORK, "dataset.test=colourless"]
        predictor = load_predictor(CONFIG, weights, overrides, device="cpu")
    finally:
        DatasetCatalog.remove("colourless")
        MetadataCatalog.remove("colourless")
    assert predictor.class_names == names
    assert len({tuple(color) for color in predictor.class_colors}) == 9


def test_a_folder_of_ones_own_gives_the_classes(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "images/val").mkdir(parents=True)
    classes = ", ".join(f'"class {i}"' for i in range(9))
    (folder / "dataset.json").write_text(f'{{"classes": [{classes}]}}')
    (name,) = register_folder(str(folder), "predicted_folder")
    overrides = [*SMALL_NETWORK, f"dataset.test={name}"]
    predictor = load_predictor(CONFIG, save(tmp_path, SMALL_NETWORK), overrides, device="cpu")
    assert predictor.class_names[8] == "class 8"


def test_mistakes_are_named(tmp_path: Path) -> None:
    weights = save(tmp_path, SMALL_NETWORK)
    for device in ("cuda:77", "toaster"):
        with pytest.raises(ValueError, match=f"device {device} cannot be used .*try cpu"):
            load_predictor(CONFIG, weights, SMALL_NETWORK, device=device)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_predictor(CONFIG, weights, [*SMALL_NETWORK, "model.sem_seg_head.conv_dims=64"])
    with pytest.raises(ValueError, match="has no dataloader.test"):
        path = tmp_path / "bare.yaml"
        path.write_text("{model: {}, dataset: {}, train: {}, dataloader: {test: {dataset: x}}}\n")
        load_predictor(str(path), weights)

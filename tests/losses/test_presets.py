"""The presets of configs/common/losses.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import OmegaConf

from contrast_d2.losses import AdaptiveAffinityLoss, CrossEntropyLoss
from contrast_d2.structures import SegOutput

from .rows import NUM_CLASSES, mixed_labels

FILE = Path(__file__).parents[2] / "configs" / "common" / "losses.py"
IGNORE_LABEL = 9
PRESETS = [
    *("aaf", "cross_entropy", "cross_entropy_lovasz", "dice", "focal", "lovasz", "ohem"),
    *("rmi", "rmi_max"),
]


def test_every_preset_is_tested() -> None:
    public = [name for name in LazyConfig.load(str(FILE)) if not name.startswith("_")]
    assert sorted(public) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_trains_both_outputs_and_follows_the_dataset(name: str) -> None:
    if name in ("dice", "focal"):
        pytest.importorskip("segmentation_models_pytorch", reason="needs the extra `losses`")
    dataset = {"num_classes": NUM_CLASSES, "ignore_label": IGNORE_LABEL}
    cfg = OmegaConf.create(
        {
            "dataset": dataset,
            "train": {"max_iter": 9},
            "seg_loss": LazyConfig.load(str(FILE))[name],
        },
        flags={"allow_objects": True},
    )
    loss = instantiate(cfg.seg_loss)
    ignored = {m.ignore_label for m in loss.modules() if hasattr(m, "ignore_label")}
    assert ignored == {IGNORE_LABEL} and loss.aux_weight == 0.4
    if name in ("aaf", "rmi", "rmi_max"):
        assert isinstance(loss.aux, CrossEntropyLoss)
    else:
        assert loss.aux is loss.main

    labels = mixed_labels(2, 32, 40)
    labels[labels == 255] = IGNORE_LABEL
    logits = [torch.randn(2, NUM_CLASSES, 8, 10, requires_grad=True) for _ in range(2)]
    losses = loss(SegOutput(*logits, {}), labels)
    assert set(losses) == {"loss_sem_seg", "loss_aux"}
    sum(losses.values()).backward()
    assert all(x.grad.any() and x.grad.isfinite().all() for x in logits)
    assert all(p.grad.any() for p in loss.parameters())
    assert bool(list(loss.parameters())) == (name == "aaf")


def test_aaf_is_as_in_the_paper() -> None:
    # Ke et al., ECCV 2018.
    main = LazyConfig.load(str(FILE)).aaf.main
    assert main.losses.affinity["_target_"] is AdaptiveAffinityLoss
    assert tuple(main.losses.affinity.kernel_sizes) == (3, 5, 7)
    assert (main.losses.affinity.margin, main.losses.affinity.decay) == (3.0, 10.0)

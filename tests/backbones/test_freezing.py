"""Stages that do not train, and parameters that no map depends on."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import ResNet
from detectron2.modeling.backbone import BasicStem
from detectron2.solver.build import get_default_optimizer_params
from timm.layers import DropPath, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from contrast_d2.backbones import TimmBackbone

from .rows import TIMM_ROWS, Row, wake_residuals

HRNET = "hrnet_w18_small"
SWIN = "swin_tiny_patch4_window7_224"
# The parts of timm's models that are frozen, after the first, the second ... stage.
STAGES = [
    ("resnet18", ["conv1 bn1", "layer1", "layer2", "layer3", "layer4"]),
    (SWIN, ["patch_embed", "layers_0", "layers_1", "layers_2", "layers_3"]),
    ("convnext_atto", ["stem_0 stem_1", "stages_0", "stages_1", "stages_2", "stages_3"]),
    (
        HRNET,
        [
            "conv1 bn1 conv2 bn2",
            "layer1",
            "transition1 stage2",
            "transition2 stage3",
            "transition3 stage4",
        ],
    ),
]


def test_stages_are_counted_as_in_detectron2(subtests: pytest.Subtests) -> None:
    for freeze_at in [0, 1, 2, 5]:
        for name, stages in STAGES:
            with subtests.test(freeze_at=freeze_at, name=name, stages=stages):
                with torch.device("meta"):
                    model = TimmBackbone(name, freeze_at=freeze_at).model
                expected = set(" ".join(stages[:freeze_at]).split())
                found = {
                    n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad
                }
                assert found == expected
                assert all(
                    not p.requires_grad for part in found for p in getattr(model, part).parameters()
                )


def test_detectron2_freezes_the_same_of_a_resnet() -> None:
    theirs = ResNet(BasicStem(norm="BN"), ResNet.make_default_stages(18, norm="BN"), freeze_at=3)
    with torch.device("meta"):
        ours = TimmBackbone("resnet18", freeze_at=3)
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", HRNET])
def test_frozen_stages_are_the_same_after_a_step(name: str) -> None:
    backbone = TimmBackbone(name, freeze_at=2)
    wake_residuals(backbone)
    before = {n: x.clone() for n, x in backbone.state_dict().items()}
    optimizer = torch.optim.SGD(
        get_default_optimizer_params(backbone, weight_decay=0.1), lr=0.1, momentum=0.9
    )
    found = backbone.eval().train()(torch.randn(2, 3, 64, 64))
    sum(x.sum() for x in found.values()).backward()
    optimizer.step()
    after = backbone.state_dict()
    frozen = {n for n, p in backbone.named_parameters() if not p.requires_grad}
    statistics = {
        f"{n}.running_mean"
        for n, m in backbone.named_modules()
        if isinstance(m, _BatchNorm) and f"{n}.weight" in frozen
    }
    assert len(frozen) > len(statistics) > 1
    assert all(torch.equal(after[n], before[n]) for n in frozen | statistics)
    others = {n for n in after if n.endswith("running_mean")} - statistics
    assert others and not any(torch.equal(after[n], before[n]) for n in others)
    # A run goes on with the optimizer's state.
    again = torch.optim.SGD(get_default_optimizer_params(backbone), lr=0.1, momentum=0.9)
    again.load_state_dict(optimizer.state_dict())


def test_frozen_norms_stay_so_when_the_others_are_synchronised() -> None:
    backbone = convert_sync_batchnorm(TimmBackbone("resnet18", freeze_at=2)).train()
    norms = {n: m.training for n, m in backbone.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert len(norms) == 20
    assert {n for n, training in norms.items() if not training} == {
        n for n in norms if n.startswith(("model.bn1", "model.layer1"))
    }


def test_no_path_is_dropped_in_a_frozen_stage() -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(SWIN, freeze_at=3, drop_path_rate=0.5).train()
    paths = {n.split(".")[1]: m for n, m in backbone.named_modules() if isinstance(m, DropPath)}
    dropping = {stage for stage, path in paths.items() if path.training}
    assert dropping == {"layers_2", "layers_3"}


@pytest.mark.parametrize("row", TIMM_ROWS, ids=[row.name for row in TIMM_ROWS])
def test_what_trains_of_a_subset_gets_a_gradient(row: Row) -> None:
    backbone = row.build(out_features=["res3"])
    wake_residuals(backbone)
    found = backbone.train()(torch.randn(2, 3, 64, 64))
    sum((x * torch.randn_like(x)).sum() for x in found.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_unused_branches_of_hrnet_do_not_train() -> None:
    with torch.device("meta"):
        model = TimmBackbone(HRNET, out_features=["res2"]).model
    still = {n for n, p in model.named_parameters() if not p.requires_grad}
    # Of the last module's fusion, all that does not lead to the finest branch.
    assert {n[: len("stage4.0.fuse_layers.0.")] for n in still} == {
        f"stage4.0.fuse_layers.{branch}." for branch in (1, 2, 3)
    }


def test_mistakes_are_told_in_one_line(subtests: pytest.Subtests) -> None:
    for arguments, message in [
        ({"name": "resnet18", "freeze_at": 6}, "freeze_at=6: choose 0 for none"),
        ({"name": "resnet18", "freeze_at": -1}, "freeze_at=-1: choose 0 for none"),
        ({"name": "twins_svt_small", "freeze_at": 1}, "only be frozen together, with freeze_at=2"),
    ]:
        with subtests.test(arguments=arguments):
            with pytest.raises(ValueError, match=message) as error, torch.device("meta"):
                TimmBackbone(**arguments)
            assert "\n" not in str(error.value)

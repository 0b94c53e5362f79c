"""Weights from a local file."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from contrast_d2.backbones import TimmBackbone

SWIN = "swin_tiny_patch4_window7_224"
NAMES = ["resnet18", "hrnet_w18_small", SWIN, "convnext_atto", "mobilenetv3_small_100", "pvt_v2_b0"]


def random_state(name: str, **options) -> dict[str, Tensor]:
    """Weights of the whole classifier."""
    torch.manual_seed(5)
    with torch.device("meta"):
        shapes = timm.create_model(name, **options).state_dict()
    return {
        key: torch.rand(x.shape) if x.is_floating_point() else torch.tensor(7)
        for key, x in shapes.items()
    }


def in_order(state: dict[str, Tensor], backbone: TimmBackbone) -> bool:
    """Whether all of the backbone's tensors are the file's, in the file's order."""
    own, theirs = backbone.model.state_dict().values(), iter(state.values())
    return all(any(torch.equal(x, other) for other in theirs) for x in own)


@pytest.mark.parametrize("name", NAMES)
def test_a_classifiers_checkpoint_is_loaded_without_its_classifier(
    name: str, tmp_path: Path
) -> None:
    state = random_state(name, num_classes=10)
    torch.save(state, tmp_path / "weights.pth")
    backbone = TimmBackbone(name, pretrained=True, weights_file=str(tmp_path / "weights.pth"))
    assert in_order(state, backbone)


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_what_training_programs_save(key: str, tmp_path: Path) -> None:
    state = random_state("resnet18")
    # torchvision's old files have no counters; DistributedDataParallel adds a prefix.
    old = {f"module.{k}": x for k, x in state.items() if not k.endswith("num_batches_tracked")}
    path = tmp_path / "weights.pth"
    torch.save({key: old, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    backbone = TimmBackbone("resnet18", weights_file=str(path))
    assert torch.equal(backbone.model.conv1.weight, state["conv1.weight"])
    assert torch.equal(backbone.model.layer4[1].bn2.running_var, state["layer4.1.bn2.running_var"])


def test_safetensors(tmp_path: Path) -> None:
    state = random_state("resnet18")
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    backbone = TimmBackbone("resnet18", weights_file=str(tmp_path / "weights.safetensors"))
    assert in_order(state, backbone)


def test_swin_as_its_authors_name_it(tmp_path: Path) -> None:
    """They count the merging of patches to the stage before, and save masks and indices."""
    state = random_state(SWIN)

    def official(key: str) -> str:
        key = re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key
        )
        return key.replace("head.fc", "head")

    theirs = {official(key): x for key, x in state.items()}
    theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"model": theirs}, tmp_path / "swin.pth")
    backbone = TimmBackbone(SWIN, weights_file=str(tmp_path / "swin.pth"))
    for stage in (1, 2, 3):
        found = backbone.model.get_parameter(f"layers_{stage}.downsample.reduction.weight")
        assert torch.equal(found, state[f"layers.{stage}.downsample.reduction.weight"])


def change_missing(state: dict[str, Tensor]) -> None:
    del state["layer1.0.conv1.weight"], state["bn1.running_mean"]


def change_unknown(state: dict[str, Tensor]) -> None:
    state.update({f"layer5.{i}.weight": torch.zeros(1) for i in range(9)})


def change_shape(state: dict[str, Tensor]) -> None:
    state["conv1.weight"] = torch.zeros(64, 4, 7, 7)


def change_type(state: dict[str, Tensor]) -> None:
    state["conv1.weight"] = "a text"


def test_what_does_not_fit_is_named(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for change, message in [
        (
            change_missing,
            r"2 of the weights are missing \(bn1.running_mean, layer1.0.conv1.weight\)\.",
        ),
        (
            change_unknown,
            r"9 of the weights are unknown \(layer5.0.weight, .*, layer5.2.weight, \.\.\.\)\.",
        ),
        (
            change_shape,
            r"1 of the weights has another shape \(conv1.weight is \(64, 4, 7, 7\) there and "
            r"\(64, 3, 7, 7\) here\)\.",
        ),
        (change_type, r"another shape \(conv1.weight is str there"),
    ]:
        with subtests.test(change=change):
            state = random_state("resnet18")
            change(state)
            path = tmp_path / "weights.pth"
            torch.save(state, path)
            with pytest.raises(ValueError, match=message) as error:
                TimmBackbone("resnet18", weights_file=str(path))
            assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet34", SWIN, "convnext_atto"])
def test_another_models_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    torch.save(random_state("resnet18"), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=f"weights.pth does not fit {name}: .*missing"):
        TimmBackbone(name, weights_file=str(tmp_path / "weights.pth"))


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_code_of_a_file_runs(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({**random_state("resnet18"), "x": Harmful(tmp_path / "made")}, path)
    with pytest.raises(ValueError, match="weights.pth cannot be read as a checkpoint") as error:
        TimmBackbone("resnet18", weights_file=str(path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "made").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, content in [
        ("a.pth", b""),
        ("a.pth", b"text"),
        ("a.safetensors", b"text"),
        ("list.pth", None),
    ]:
        with subtests.test(name=name):
            path = tmp_path / name
            if content is None:
                torch.save([torch.zeros(1)], path)
            else:
                path.write_bytes(content)
            with pytest.raises(
                ValueError, match=f"{name} (cannot be read as|holds a list)"
            ) as error:
                TimmBackbone("resnet18", weights_file=str(path))
            assert "\n" not in str(error.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="weights_file=no/such.pth"):
        TimmBackbone("resnet18", weights_file="no/such.pth")

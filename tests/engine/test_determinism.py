"""Runs that can be repeated bit for bit, and what they may not call for that."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from contrast_d2.engine.determinism import compute_deterministically

from ..decoders.test_decoders import ROWS, Row
from ..losses.rows import LOSSES, NUM_CLASSES, OF_THE_LIBRARY, mixed_labels

ROOT = Path(__file__).parents[2]
METHODS = (
    "base",
    "ms_cs",
    "ms_cs_sampled_draw",
    "pixel",
    "pixel_memory",
    "pixel_memory_semi_hard",
    "contextrast",
    "pne",
)

# Those that `torch.use_deterministic_algorithms` refuses on a GPU, whatever their arguments. The
# gradient of bilinear interpolation is not among them: F.interpolate then computes it otherwise.
REFUSED = {
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "_ctc_loss_backward",
    "adaptive_max_pool2d_backward",
    "avg_pool3d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "histc",
    "kthvalue",
    "max_unpool2d",
    "max_unpool3d",
    "put",
    "put_",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "upsample_bicubic2d_backward",
    "upsample_linear1d_backward",
    "upsample_trilinear3d_backward",
}


class Refusals(TorchDispatchMode):
    """Records the calls that have no deterministic algorithm on a GPU, gradients included."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: set[str] = set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        weighted = name == "bincount" and (len(args) > 1 or kwargs.get("weights") is not None)
        with_places = name == "median" and func._overloadname == "dim"
        reduced = name.startswith("nll_loss") and args[4 if "backward" in name else 3]
        if name in REFUSED or weighted or with_places or reduced:
            self.calls.add(name)
        self.count += 1
        return func(*args, **kwargs)


def test_the_record_sees_what_torch_refuses(subtests: pytest.Subtests) -> None:
    for step, name in [
        (lambda x: F.adaptive_avg_pool2d(x, 3).sum(), "_adaptive_avg_pool2d_backward"),
        (lambda x: F.cross_entropy(x, x.new_zeros(2, 8, 8).long()), "nll_loss2d_forward"),
        (lambda x: x * torch.bincount(torch.tensor([1]), torch.ones(1)).sum(), "bincount"),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect").sum(), "reflection_pad2d_backward"),
    ]:
        with subtests.test(step=step, name=name):
            with Refusals() as refusals:
                step(torch.rand(2, 3, 8, 8, requires_grad=True)).sum().backward()
            assert name in refusals.calls


@pytest.mark.parametrize("method", METHODS)
def test_methods_have_deterministic_steps(method: str) -> None:
    cfg = LazyConfig.load(str(ROOT / f"configs/camvid/semfpn_r18_{method}_cpu.py"))
    cfg.dataset.num_classes = 4
    if "memory" in method:
        cfg.model.contrast.warmup_iters = 0
    model = instantiate(cfg.model).train()
    batch = [random_sample() for _ in range(2)]
    with Refusals() as refusals:
        for _ in range(2):  # a memory bank is empty in the first step
            losses = model(batch)
            sum(losses.values()).backward()
    assert ("loss_contrast" in "".join(losses)) == (method != "base")
    assert refusals.count > 500 and not refusals.calls


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_decoders_have_deterministic_steps(row: Row) -> None:
    decoder = row.build(row.shapes).train()
    features = {
        name: torch.rand(2, shape.channels, 128 // shape.stride, 128 // shape.stride)
        for name, shape in row.shapes.items()
    }
    with Refusals() as refusals:
        out = decoder.decode(features)
        sum(x.sum() for x in (out.logits, out.aux_logits) if x is not None).backward()
    assert refusals.count > 10 and not refusals.calls


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in OF_THE_LIBRARY])
def test_losses_have_deterministic_steps(name: str) -> None:
    logits = torch.randn(2, NUM_CLASSES, 16, 16, requires_grad=True)
    with Refusals() as refusals:
        LOSSES[name]()(logits, mixed_labels(2, 16, 16)).backward()
    assert refusals.count > 5 and not refusals.calls


def random_sample() -> dict[str, Any]:
    """An image of blocks of classes, so that maps of all strides have several."""
    labels = torch.randint(0, 4, (4, 4)).repeat_interleave(32, 0).repeat_interleave(32, 1)
    return {"image": torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8), "sem_seg": labels}


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark = before


def test_everything_is_set(restored: None) -> None:
    torch.backends.cudnn.benchmark = True
    compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_setting_of_the_environment_is_kept_or_refused(
    restored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    compute_deterministically()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:0:0.*unset it"):
        compute_deterministically()


@pytest.mark.slow
def test_a_run_is_repeated_bit_for_bit(tmp_path: Path) -> None:
    """With other numbers of workers, which finish their samples in another order."""
    weights = [
        train(tmp_path / str(workers), f"dataloader.train.num_workers={workers}")
        for workers in (2, 3)
    ]
    assert weights[0] == weights[1]
    log = (tmp_path / "2/log.txt").read_text()
    assert "Deterministic algorithms only" in log


def train(output_dir: Path, *extra: str) -> str:
    """Trains with the memory bank for some steps: a hash of the weights."""
    overrides = [
        "train.deterministic=True",
        "model.sem_seg_head.fpn_channels=16",
        "model.sem_seg_head.conv_dims=32",
        "model.contrast.warmup_iters=0",
        "dataloader.train.mapper.augmentations.crop_size=[64,64]",
        "dataloader.train.total_batch_size=4",
        "dataloader.test.num_workers=0",
        "train.max_iter=4",
        f"train.output_dir={output_dir}",
    ]
    config = "configs/shapes/semfpn_r18_pixel_memory_demo.py"
    result = subprocess.run(
        [sys.executable, "train_net.py", "--config-file", config, *overrides, *extra],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    digest = hashlib.sha256()
    state = torch.load(output_dir / "model_final.pth", weights_only=True)["model"]
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()

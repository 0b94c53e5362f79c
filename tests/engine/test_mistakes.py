"""What a user gets wrong is told in one line, with its value, before anything is written.

A row is what is given and what the line says. Everything runs in this process, through the
command's own entry.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIG = "configs/shapes/semfpn_r18_ms_cs_demo.py"
QUICK = [
    "train.max_iter=1",
    "train.eval_period=0",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
]
Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture(autouse=True)
def _loggers() -> Iterator[None]:
    """Takes back what `set_up` does to the loggers of the process."""
    names = ("fvcore", "contrast_d2", "detectron2")
    before = [(log, log.level, log.propagate) for log in map(logging.getLogger, names)]
    raising = logging.raiseExceptions
    yield
    logging.raiseExceptions = raising
    for log, level, propagate in before:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        log.setLevel(level)
        log.propagate = propagate


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs train_net.py; gives its exit status and the lines of its errors."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    import train_net

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["train_net.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            train_net.run()
        status, printed = stop.value.code, capsys.readouterr().err
        if isinstance(status, str):  # which the interpreter prints
            status, printed = 1, f"{printed}{status}\n"
        assert "Traceback" not in printed
        return status, [line for line in printed.splitlines() if "error: " in line]

    return run


def written(folder: Path) -> list[str]:
    """Files of a run but for its log."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return [name for name in names if name != "log.txt"]


CONTRAST = "model.contrast"
CROP = "dataloader.train.mapper.augmentations.crop_size"
OVERRIDES = [
    # Keys.
    ("train.max_iters=3", "unknown config key train.max_iters. Did you mean train.max_iter?"),
    ("model.contrast.typo.x=1", "unknown config key model.contrast.typo.x. Did you mean"),
    ("optimizer.momentum=0.9", "unknown config key optimizer.momentum. Did you mean"),
    ("train.max_iter.x=1", "cannot set train.max_iter.x: train.max_iter is the value 1"),
    (f"{CONTRAST}.cross_scale.7=1", "cannot set model.contrast.cross_scale.7: "),
    ("train.max_iter", "cannot read the override 'train.max_iter'"),
    ("~train.seed", "the override '~train.seed' is not of the form key=value."),
    # Types.
    ("train.max_iter=abc", "train.max_iter='abc': needs a number."),
    ("train.max_iter=2.5", "lr_multiplier.max_iter=2.5: needs a whole number."),
    ("train.seed=abc", "train.seed='abc': needs a number."),
    ("train.allow_pickle=1", "train.allow_pickle=1: needs True or False."),
    ("train=5", "train=5: needs keys and values, or None."),
    ("dataset.train=5", "dataset.train=5: needs a text."),
    (f"{CONTRAST}=5", "model.contrast=5: needs keys and values, or None."),
    (f"{CONTRAST}.temperature=abc", "model.contrast.temperature='abc': needs a number."),
    (f"{CONTRAST}.cross_scale=5", "model.contrast.cross_scale=5: needs a list."),
    (f"{CONTRAST}.sampler=None", "model.contrast.sampler=None: needs a BalancedSampler"),
    (f"{CONTRAST}.sampler.max_anchors=100.5", "max_anchors=100.5: needs a whole number."),
    (f"{CONTRAST}.negatives=other", "negatives='other': needs a BoundaryNegatives"),
    (f"{CONTRAST}.projection=sparse", "needs one of ['dense', 'sampled']."),
    ("model.backbone=None", "model.backbone=None: needs a Backbone"),
    (f"{CROP}=64", "crop_size=64: needs a list."),
    (f"{CROP}=[64]", "crop_size must be (height, width), two positive integers, got [64]"),
    ("optimizer.params.base_lr=abc", "optimizer.params.base_lr='abc': needs a number or None."),
    # Classes and datasets.
    ("dataset.num_classes=5", "dataset.num_classes=5, but shapes_sem_seg_train has 9 classes"),
    ("model.sem_seg_head.num_classes=5", "model.sem_seg_head.num_classes=5, but dataset.num_cl"),
    (f"{CONTRAST}.sampler.num_classes=5", "model.contrast.sampler.num_classes=5, but dataset.nu"),
    ("dataset.test=shapes_sem_seg_vla", "did you mean shapes_sem_seg_val"),
    ("dataset.train=nope", "Dataset 'nope' is not registered"),
    # The training loop.
    ("train.max_iter=0", "train.max_iter=0: needs at least 1."),
    ("train.checkpointer.period=0", "train.checkpointer.period=0: needs at least 1."),
    (
        "train.checkpointer.max_to_keep=0",
        "train.checkpointer.max_to_keep=0: needs at least 1.",
    ),
    ("train.eval_period=-1", "train.eval_period=-1: needs at least 0."),
    ("train.log_period=0", "train.log_period=0: needs at least 1."),
    ("train.amp={enabled:True,dtype:fp8}", "train.amp.dtype='fp8': choose one of ['bf16', 'fp16']"),
    ("train.accumulation_steps=0", "train.accumulation_steps=0: needs at least 1."),
    ("train.accumulation_steps=3", "total_batch_size 8 must be a positive multiple of 3"),
    ("train.clip_norm=-1", "train.clip_norm=-1: must be above 0, or None for no clipping."),
    ("train.ema_decay=2", "train.ema_decay=2: must lie between 0 and 1"),
    ("dataloader.train.total_batch_size=0", "total_batch_size 0 must be a positive multiple"),
    ("dataloader.test.num_workers=-1", "num_workers option should be non-negative"),
    ("optimizer.lr=-1", "optimizer: Invalid learning rate: -1. Change the keys of `optimizer`."),
    ("optimizer.betas=[2,0.9]", "optimizer: Invalid beta parameter at index 0: 2."),
    ("lr_multiplier.power=-1", "power=-1: must be above 0."),
    ("lr_multiplier.warmup_iters=-1", "warmup_iters=-1: must be 0 or more and below max_iter=1."),
    (f"{CROP}=[16,16]", "crop_size=[16, 16]: a side is below 32, the stride of res5"),
    (f"{CROP}=[64,0]", "crop_size"),
    # The model.
    ("model.backbone.name=resnet1888", "has no model 'resnet1888'. Did you mean 'resnet18'?"),
    ("model.backbone.out_features=[res2,res9]", "out_features=['res2', 'res9']: resnet18 has"),
    ("model.backbone.output_stride=3", "resnet18 cannot have output_stride=3"),
    ("model.backbone.weights_file=no.pth", "weights_file=no.pth: there is no such file."),
    ("model.sem_seg_head.norm=XX", "norm='XX': choose one of ('', 'BN'"),
    ("model.pixel_mean=[1.0]", "pixel_mean=[1.0], pixel_std="),
    ("model.pixel_std=[0,0,0]", "pixel_std=[0, 0, 0]: needs one of each"),
    # The contrast.
    (f"{CONTRAST}.temperature=0", "temperature=0: must be above 0."),
    (f"{CONTRAST}.weight=-1", "weight=-1: must be 0 or more."),
    (f"{CONTRAST}.scale_weights.res2=-1", "scale_weights['res2']=-1: must be 0 or more."),
    (f"{CONTRAST}.scale_weights={{res9:1.0}}", "no projector for feature map 'res9'"),
    (f"{CONTRAST}.cross_scale=[[res2,res9,1.0]]", "no projector for feature map 'res9'"),
    (f"{CONTRAST}.cross_scale=[[res2,res2,1.0]]", "cross_scale pairs 'res2' with itself"),
    (f"{CONTRAST}.sampler.max_anchors=0", "max_anchors=0 cannot give two anchors"),
    (f"{CONTRAST}.sampler.max_anchors=-5", "max_anchors=-5 cannot give two anchors"),
    (f"{CONTRAST}.sampler.min_pixels=0", "min_pixels=0: a class that is drawn has at least 1."),
    (f"{CONTRAST}.projector.embed_dim=0", "Projector(embed_dim=0): needs at least 1."),
    # The output folder.
    ("train.output_dir=README.md", "train.output_dir=README.md cannot be written"),
    ("train.output_dir=README.md/run", "train.output_dir=README.md/run cannot be made"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[row[0] for row in OVERRIDES])
def test_settings(run: Run, tmp_path: Path, override: str, message: str) -> None:
    quick = [text for text in QUICK if text.partition("=")[0] != override.partition("=")[0]]
    status, lines = run("--config-file", CONFIG, f"train.output_dir={tmp_path}", *quick, override)
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not written(tmp_path)


FLAGS = [
    (["--num-gpus", "0"], 1, "--num-gpus 0: needs at least 1."),
    (["--num-gpus", "-1"], 1, "--num-gpus -1: needs at least 1."),
    (["--machine-rank", "3"], 1, "--machine-rank 3 with --num-machines 1: ranks count from 0"),
    (["--num-machines", "2"], 1, "--dist-url auto finds a port on one machine only"),
    (["--num-machines", "2", "--dist-url", "bogus"], 1, "--dist-url bogus: write tcp://HOST:PORT"),
    (["--import", "nope.py"], 1, "--import nope.py: there is no such module"),
    (["--eval-only"], 1, "no weights: "),
    (["--num-gpus", "x"], 2, "argument --num-gpus: invalid int value: 'x'"),
    (["--no-such-flag"], 2, "unrecognized arguments: --no-such-flag"),
]


@pytest.mark.parametrize(("flags", "expected", "message"), FLAGS, ids=lambda x: str(x)[:40])
def test_flags(run: Run, tmp_path: Path, flags: list[str], expected: int, message: str) -> None:
    status, lines = run("--config-file", CONFIG, *flags, f"train.output_dir={tmp_path}", *QUICK)
    assert status == expected
    assert len(lines) == 1 and message in lines[0]
    assert not written(tmp_path)


FILES = [
    ("none.py", None, "none.py: there is no such file."),
    ("text.txt", "x = 1", "text.txt: an experiment file ends in .py or .yaml."),
    ("object.yaml", "model: !!python/object/apply:os.mkdir [made]", "holds objects, which can ru"),
    (
        "object_d2.yaml",
        "MODEL: !!python/object/apply:os.mkdir [made]",
        "object_d2.yaml cannot be r",
    ),
    ("torn.yaml", "MODEL: [", "torn.yaml is not valid yaml: "),
    ("empty.yaml", "", "empty.yaml holds no keys."),
    ("list.yaml", "- 1", "list.yaml holds no keys."),
    ("part.yaml", "x: 1", "part.yaml has no model: name the config.yaml of a run"),
    ("key.yaml", "MODEL:\n  NOPE: 1", "unknown config key MODEL.NOPE. Did you mean"),
    ("type.yaml", "SOLVER:\n  MAX_ITER: abc", "(40000 vs. abc) for config key: SOLVER.MAX_ITER"),
    ("base.yaml", "_BASE_: none.yaml", "base.yaml cannot be read: [Errno 2]"),
]


@pytest.mark.parametrize(("name", "text", "message"), FILES, ids=[row[0] for row in FILES])
def test_config_files(run: Run, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text.replace("made", str(tmp_path / "made")))
    status, lines = run("--config-file", str(tmp_path / name))
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "made").exists()


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def make_weights(path: Path) -> None:
    """Writes the file that its name says."""
    whole = {"model": {"other.weight": torch.zeros(100, 100)}}
    harmful = {"model": Harmful(path.parent / "made")}
    if path.stem == "code":
        torch.save(harmful, path)
    elif path.stem == "code_old":
        torch.save(harmful, path, _use_new_zipfile_serialization=False)
    elif path.stem == "code_plain" or path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(harmful))
    elif path.stem == "empty":
        path.touch()
    elif path.stem == "folder":
        path.mkdir()
    elif path.stem == "list":
        torch.save([1, 2], path)
    elif path.suffix == ".safetensors":
        path.write_text("no header")
    elif path.stem == "flipped":
        torch.save(whole, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        torch.save(whole, path)
        if path.stem == "torn":
            os.truncate(path, 3000)


WEIGHTS = [
    ("code.pth", "it holds objects, which can run code"),
    ("code_old.pth", "it holds objects, which can run code"),
    ("code_plain.pth", "it holds objects, which can run code"),
    ("code.pkl", "reading a pickle runs the code that it holds"),
    ("empty.pth", "empty.pth cannot be read as a checkpoint (it is empty)"),
    ("torn.pth", "torn.pth cannot be read as a checkpoint (it is damaged"),
    ("flipped.pth", "fails its checksum"),
    ("broken.safetensors", "cannot be read as a checkpoint (it is damaged"),
    ("list.pth", "list.pth holds a list and not a dict of weights"),
    ("folder.pth", "folder.pth: there is no such file."),
    ("other.pth", "other.pth holds none of the model's weights, such as"),
]


@pytest.mark.parametrize(("name", "message"), WEIGHTS, ids=[row[0] for row in WEIGHTS])
def test_weights(run: Run, tmp_path: Path, name: str, message: str) -> None:
    make_weights(tmp_path / name)
    output_dir = f"train.output_dir={tmp_path / 'run'}"
    status, lines = run(
        "--config-file", CONFIG, output_dir, *QUICK, f"train.init_checkpoint={tmp_path / name}"
    )
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not written(tmp_path / "run")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["code.pth", "torn.pth", "flipped.pth", "broken.safetensors"])
def test_weights_of_the_backbone(run: Run, tmp_path: Path, name: str) -> None:
    make_weights(tmp_path / name)
    output_dir = f"train.output_dir={tmp_path / 'run'}"
    weights = f"model.backbone.weights_file={tmp_path / name}"
    status, lines = run("--config-file", CONFIG, output_dir, *QUICK, weights)
    assert status == 1
    assert len(lines) == 1 and f"{name} cannot be read as a checkpoint" in lines[0]
    assert "weights_only=False" not in lines[0]
    assert not (tmp_path / "made").exists()


def make_folder(root: Path) -> None:
    """A sound dataset in a folder, with one image for each split."""
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / split / "a.png")
        labels = np.zeros((64, 96), dtype=np.uint8)
        labels[:32] = 1
        Image.fromarray(labels).save(root / "annotations" / split / "a.png")


def _damage(root: Path, fault: str) -> None:
    image, label = root / "images/train/a.png", root / "annotations/train/a.png"
    if fault == "description":
        (root / "dataset.json").write_text("{")
    elif fault == "image":
        image.write_bytes(image.read_bytes()[:200])
    elif fault == "label":
        label.write_bytes(b"no image")
    elif fault == "pair":
        label.unlink()
    elif fault == "empty":
        image.unlink()
        label.unlink()
    elif fault == "size":
        Image.fromarray(np.zeros((60, 90), dtype=np.uint8)).save(label)
    elif fault == "mode":
        Image.fromarray(np.zeros((64, 96, 3), dtype=np.uint8)).save(label)
    elif fault == "range":
        Image.fromarray(np.full((64, 96), 7, dtype=np.uint8)).save(label)


DATA = [
    ("description", "dataset.json"),
    ("image", "images/train/a.png"),
    ("label", "annotations/train/a.png"),
    ("pair", "annotations/train"),
    ("empty", "images/train"),
    ("size", "a.png"),
    ("mode", "annotations/train/a.png"),
    ("range", "annotations/train/a.png"),
]


@pytest.mark.parametrize(("fault", "message"), DATA, ids=[row[0] for row in DATA])
def test_data(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    name = f"mistake_{fault}"
    root = tmp_path / name
    make_folder(root)
    (root / "dataset.json").write_text('{"classes": ["road", "car"]}')
    _damage(root, fault)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    experiment = tmp_path / "experiment.py"
    experiment.write_text(
        f"""
from detectron2.config import LazyConfig

globals().update(LazyConfig.load({str(ROOT / CONFIG)!r}))
dataset.train, dataset.test = "{name}_sem_seg_train", "{name}_sem_seg_val"
dataset.num_classes = 2
"""
    )
    output_dir = tmp_path / "run"
    status, lines = run(
        *("--config-file", str(experiment), f"train.output_dir={output_dir}", *QUICK),
        "dataloader.train.total_batch_size=1",
    )
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_mistake_leaves_an_earlier_run_as_it_was(run: Run, tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.json", "run.json"):
        (tmp_path / name).write_text("of the earlier run")
    output_dir = f"train.output_dir={tmp_path}"
    status, _ = run("--config-file", CONFIG, output_dir, *QUICK, "optimizer.lr=-1")
    assert status == 1
    for name in ("config.yaml", "metrics.json", "run.json"):
        assert (tmp_path / name).read_text() == "of the earlier run"


def test_an_error_of_ours_keeps_its_traceback(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(
        sys, "argv", ["train_net.py", "--config-file", CONFIG, f"train.output_dir={tmp_path}"]
    )
    import train_net

    monkeypatch.setattr(train_net, "build_model", fail)
    with pytest.raises(KeyError, match="a bug"):
        train_net.run()

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
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from contrast_d2.engine import build_model, load_config

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]
CONFIG = "configs/shapes/semfpn_r18_ms_cs_demo.py"
QUICK = [
    "train.max_iter=1",
    "train.eval_period=0",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
]
Run = Callable[..., tuple[int, list[str]]]


@contextmanager
def loggers_kept() -> Iterator[None]:
    """Takes back what `set_up` does to the loggers of the process."""
    names = ("fvcore", "contrast_d2", "detectron2")
    before = [(log, log.level, log.propagate) for log in map(logging.getLogger, names)]
    raising = logging.raiseExceptions
    try:
        yield
    finally:
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
        with loggers_kept(), pytest.raises(SystemExit) as stop:
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
# What is overridden, and the names and values that the line has to hold.
OVERRIDES = [
    # Keys.
    ("train.max_iters=3", "train.max_iters", "train.max_iter?"),
    ("model.contrast.typo.x=1", "model.contrast.typo.x", "?"),
    ("optimizer.momentum=0.9", "optimizer.momentum", "?"),
    ("train.max_iter.x=1", "train.max_iter.x", "value 1"),
    (f"{CONTRAST}.cross_scale.7=1", "model.contrast.cross_scale.7"),
    ("train.max_iter", "'train.max_iter'"),
    ("~train.seed", "'~train.seed'", "key=value"),
    # Types.
    ("train.max_iter=abc", "train.max_iter='abc'", "number"),
    ("train.max_iter=2.5", "max_iter=2.5", "whole number"),
    ("train.seed=abc", "train.seed='abc'", "number"),
    ("train.allow_pickle=1", "train.allow_pickle=1", "True", "False"),
    ("train=5", "train=5", "keys", "None"),
    ("dataset.train=5", "dataset.train=5", "text"),
    (f"{CONTRAST}=5", "model.contrast=5", "keys", "None"),
    (f"{CONTRAST}.temperature=abc", "model.contrast.temperature='abc'", "number"),
    (f"{CONTRAST}.cross_scale=5", "model.contrast.cross_scale=5", "list"),
    (f"{CONTRAST}.channels=None", "model.contrast.channels=None"),
    (f"{CONTRAST}.max_anchors=100.5", "max_anchors=100.5", "whole number"),
    (f"{CONTRAST}.negatives=other", "negatives='other'", "Sampler"),
    (f"{CONTRAST}.projection=sparse", "'sparse'", "'dense'", "'sampled'"),
    ("model.backbone=None", "model.backbone=None", "Backbone"),
    (f"{CROP}=64", "crop_size=64", "list"),
    (f"{CROP}=[64]", "crop_size", "height", "width", "[64]"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]", "two"),
    ("optimizer.params.base_lr=abc", "optimizer.params.base_lr='abc'", "number", "None"),
    # Classes and datasets.
    ("dataset.num_classes=5", "dataset.num_classes=5", "shapes_sem_seg_train", "9"),
    ("model.sem_seg_head.num_classes=5", "model.sem_seg_head.num_classes=5", "num_classes"),
    (f"{CONTRAST}.num_classes=5", "model.contrast.num_classes=5", "num_classes"),
    ("dataset.test=shapes_sem_seg_vla", "shapes_sem_seg_vla", "shapes_sem_seg_val"),
    ("dataset.train=nope", "'nope'"),
    # The training loop.
    ("train.max_iter=0", "train.max_iter=0", "1"),
    ("train.checkpointer.period=0", "train.checkpointer.period=0", "1"),
    ("train.checkpointer.max_to_keep=0", "train.checkpointer.max_to_keep=0", "1"),
    ("train.eval_period=-1", "train.eval_period=-1", "0"),
    ("train.log_period=0", "train.log_period=0", "1"),
    ("train.amp={enabled:True,dtype:fp8}", "train.amp.dtype='fp8'", "'bf16'", "'fp16'"),
    ("train.accumulation_steps=0", "train.accumulation_steps=0", "1"),
    ("train.accumulation_steps=3", "total_batch_size 8", "multiple of 3"),
    ("train.clip_norm=-1", "train.clip_norm=-1", "0", "None"),
    ("train.ema_decay=2", "train.ema_decay=2", "0", "1"),
    ("dataloader.train.total_batch_size=0", "total_batch_size 0"),
    ("dataloader.test.num_workers=-1", "num_workers"),
    ("optimizer.lr=-1", "optimizer", "rate: -1"),
    ("optimizer.betas=[2,0.9]", "optimizer", "beta", "2"),
    ("lr_multiplier.power=-1", "power=-1", "0"),
    ("lr_multiplier.warmup_iters=-1", "warmup_iters=-1", "0", "max_iter=1"),
    (f"{CROP}=[16,16]", "crop_size=[16, 16]", "32", "res5"),
    (f"{CROP}=[64,0]", "crop_size", "64, 0"),
    ("train.timeout_minutes=inf", "train.timeout_minutes=inf", "525600"),
    ("train.timeout_minutes=nan", "train.timeout_minutes=nan", "525600"),
    (f"train.seed={2**64}", f"train.seed={2**64}", f"{2**64 - 1}"),
    ("train.best_metric=sem_seg/mIuO", "train.best_metric=sem_seg/mIuO", "sem_seg/mIoU?"),
    ("train.resume_changes=lr", "train.resume_changes", "list"),
    # The model.
    ("model.backbone.name=resnet1888", "'resnet1888'", "'resnet18'"),
    ("model.backbone.out_features=[res2,res9]", "out_features=['res2', 'res9']", "resnet18"),
    ("model.backbone.output_stride=3", "resnet18", "output_stride=3"),
    ("model.backbone.weights_file=no.pth", "weights_file=no.pth"),
    ("model.sem_seg_head.norm=XX", "norm='XX'", "'BN'"),
    ("model.sem_seg_head.conv_dims=16", "conv_dims=16", "32"),
    ("model.pixel_mean=[1.0]", "pixel_mean=[1.0]", "pixel_std="),
    ("model.pixel_std=[0,0,0]", "pixel_std=[0, 0, 0]"),
    # The contrast.
    (f"{CONTRAST}.temperature=0", "temperature=0", "above 0"),
    (f"{CONTRAST}.weight=-1", "weight=-1"),
    (f"{CONTRAST}.scale_weights.res2=-1", "res2=-1"),
    (f"{CONTRAST}.scale_weights={{res9:1.0}}", "'res9'", "projector"),
    (f"{CONTRAST}.cross_scale=[[res2,res9,1.0]]", "'res9'", "projector"),
    (f"{CONTRAST}.cross_scale=[[res2,res2,1.0]]", "cross_scale", "'res2'"),
    (f"{CONTRAST}.max_anchors=0", "max_anchors=0"),
    (f"{CONTRAST}.max_anchors=-5", "max_anchors=-5"),
    (f"{CONTRAST}.min_per_class=-1", "min_per_class=-1", "0"),
    (f"{CONTRAST}.embed_dim=0", "embed_dim=0", "1"),
    # The output folder.
    ("train.output_dir=README.md", "train.output_dir=README.md"),
    ("train.output_dir=README.md/run", "train.output_dir=README.md/run"),
]


def check(found: tuple[int, list[str]], *words: str) -> None:
    """The run ended with one line, which holds all of these."""
    status, lines = found
    assert status == 1 and len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert not [word for word in words if word not in lines[0]], lines[0]


def test_settings(run: Run, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for number, (override, *words) in enumerate(OVERRIDES):
        folder = tmp_path / str(number)
        quick = [text for text in QUICK if text.partition("=")[0] != override.partition("=")[0]]
        with subtests.test(override=override):
            check(
                run("--config-file", CONFIG, f"train.output_dir={folder}", *quick, override), *words
            )
            assert not written(folder)


FLAGS = [
    (["--num-gpus", "0"], 1, "--num-gpus 0", "1"),
    (["--num-gpus", "-1"], 1, "--num-gpus -1", "1"),
    (["--machine-rank", "3"], 1, "--machine-rank 3", "--num-machines 1"),
    (["--num-machines", "2"], 1, "--dist-url auto"),
    (["--num-machines", "2", "--dist-url", "bogus"], 1, "--dist-url bogus", "tcp://HOST:PORT"),
    (["--import", "nope.py"], 1, "--import nope.py"),
    (["--eval-only"], 1, "weights"),
    (["--num-gpus", "x"], 2, "--num-gpus", "'x'"),
    (["--no-such-flag"], 2, "--no-such-flag"),
]


def test_flags(run: Run, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for flags, expected, *words in FLAGS:
        with subtests.test(flags=flags):
            status, lines = run(
                *("--config-file", CONFIG, *flags, f"train.output_dir={tmp_path}", *QUICK)
            )
            assert status == expected and len(lines) == 1
            assert not [word for word in words if word not in lines[0]], lines[0]
            assert not written(tmp_path)


FILES = [
    ("none.py", None, "none.py"),
    ("text.txt", "x = 1", "text.txt", ".py", ".yaml"),
    ("object.yaml", "model: !!python/object/apply:os.mkdir [made]", "object.yaml", "objects"),
    ("object_d2.yaml", "MODEL: !!python/object/apply:os.mkdir [made]", "object_d2.yaml"),
    ("torn.yaml", "MODEL: [", "torn.yaml", "yaml"),
    ("empty.yaml", "", "empty.yaml", "keys"),
    ("list.yaml", "- 1", "list.yaml", "keys"),
    ("part.yaml", "x: 1", "part.yaml", "model", "config.yaml"),
    ("key.yaml", "MODEL:\n  NOPE: 1", "MODEL.NOPE"),
    ("type.yaml", "SOLVER:\n  MAX_ITER: abc", "SOLVER.MAX_ITER", "abc"),
    ("base.yaml", "_BASE_: none.yaml", "base.yaml", "none.yaml"),
]


def test_config_files(run: Run, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, text, *words in FILES:
        with subtests.test(name):
            if text is not None:
                (tmp_path / name).write_text(text.replace("made", str(tmp_path / "made")))
            check(run("--config-file", str(tmp_path / name)), *words)
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
    ("code.pth", "objects", "code"),
    ("code_old.pth", "objects", "code"),
    ("code_plain.pth", "objects", "code"),
    ("code.pkl", "pickle", "code"),
    ("empty.pth", "empty.pth"),
    ("torn.pth", "torn.pth", "damaged"),
    ("flipped.pth", "flipped.pth", "checksum"),
    ("broken.safetensors", "broken.safetensors", "damaged"),
    ("list.pth", "list.pth", "list", "dict"),
    ("folder.pth", "folder.pth"),
    ("other.pth", "other.pth", "weights"),
]


def test_weights(run: Run, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, *words in WEIGHTS:
        with subtests.test(name):
            make_weights(tmp_path / name)
            settings = (f"train.output_dir={tmp_path / 'run'}", *QUICK)
            start = f"train.init_checkpoint={tmp_path / name}"
            check(run("--config-file", CONFIG, *settings, start), *words)
            assert not written(tmp_path / "run")
            assert not (tmp_path / "made").exists()


def test_weights_of_the_backbone(run: Run, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name in ("code.pth", "torn.pth", "flipped.pth", "broken.safetensors"):
        with subtests.test(name):
            make_weights(tmp_path / name)
            settings = (f"train.output_dir={tmp_path / 'run'}", *QUICK)
            weights = f"model.backbone.weights_file={tmp_path / name}"
            found = run("--config-file", CONFIG, *settings, weights)
            check(found, name)
            assert "weights_only=False" not in found[1][0]  # what torch says would be harmful
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
    elif fault == "void":
        Image.fromarray(np.full((64, 96), 255, dtype=np.uint8)).save(label)
    elif fault == "test":
        Image.fromarray(np.full((64, 96), 7, dtype=np.uint8)).save(root / "annotations/val/a.png")


DATA = {
    "description": "dataset.json",
    "image": "images/train/a.png",
    "label": "annotations/train/a.png",
    "pair": "annotations/train",
    "empty": "images/train",
    "size": "a.png",
    "mode": "annotations/train/a.png",
    "range": "annotations/train/a.png",
    "void": "annotations/train/a.png",
    "test": "annotations/val/a.png",
}


def test_data(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for fault, place in DATA.items():
        name = f"mistake_{fault}"
        root = tmp_path / name
        make_folder(root)
        (root / "dataset.json").write_text('{"classes": ["road", "car"]}')
        _damage(root, fault)
        experiment = tmp_path / f"{fault}.py"
        experiment.write_text(
            f"""
from detectron2.config import LazyConfig

globals().update(LazyConfig.load({str(ROOT / CONFIG)!r}))
dataset.train, dataset.test = "{name}_sem_seg_train", "{name}_sem_seg_val"
dataset.num_classes = 2
"""
        )
        settings = (f"train.output_dir={tmp_path / f'run_{fault}'}", *QUICK)
        with subtests.test(fault):
            one = "dataloader.train.total_batch_size=1"
            check(run("--config-file", str(experiment), *settings, one), place)


def test_a_batch_of_one_value(run: Run, tmp_path: Path) -> None:
    one = ["dataloader.train.total_batch_size=1", f"{CROP}=[32,32]", *SMALL_NETWORK[:1]]
    check(
        run("--config-file", CONFIG, f"train.output_dir={tmp_path}", *QUICK, *one),
        *("total_batch_size=1", "crop_size=[32, 32]", "batch norm"),
    )
    assert not written(tmp_path)


def test_a_mistake_leaves_an_earlier_run_as_it_was(run: Run, tmp_path: Path) -> None:
    for name in ("config.yaml", "metrics.json", "run.json"):
        (tmp_path / name).write_text("of the earlier run")
    output_dir = f"train.output_dir={tmp_path}"
    status, _ = run("--config-file", CONFIG, output_dir, *QUICK, "optimizer.lr=-1")
    assert status == 1
    for name in ("config.yaml", "metrics.json", "run.json"):
        assert (tmp_path / name).read_text() == "of the earlier run"


def test_weights_of_nan_get_no_score(run: Run, tmp_path: Path) -> None:
    cfg = load_config(str(ROOT / CONFIG), [*SMALL_NETWORK, "train.device=cpu"])
    state = build_model(cfg, starting_weights=False).state_dict()
    for x in state.values():
        if x.is_floating_point():
            x.fill_(torch.nan)
    torch.save({"model": state}, tmp_path / "nan.pth")
    weights = f"train.init_checkpoint={tmp_path / 'nan.pth'}"
    arguments = (*SMALL_NETWORK, *QUICK, weights, f"train.output_dir={tmp_path / 'run'}")
    first = DatasetCatalog.get("shapes_sem_seg_val")[0]["file_name"]
    check(run("--config-file", CONFIG, "--eval-only", *arguments), first, "not finite", "64 of 64")
    assert not list((tmp_path / "run").rglob("*.json"))


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
    with loggers_kept(), pytest.raises(KeyError, match="a bug"):
        train_net.run()

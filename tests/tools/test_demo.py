"""tools/demo.py: what it writes of images and videos, and what it says of mistakes."""

from __future__ import annotations

import re
import shlex
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from omegaconf import OmegaConf
from PIL import Image

from contrast_d2.data.shapes import CLASS_COLORS
from contrast_d2.engine import load_config
from contrast_d2.studio.media import Video, VideoWriter

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/demo.py"
GUIDE = (ROOT / "docs/demo.md").read_text()
CONFIG = str(ROOT / "configs/shapes/semfpn_r18_ms_cs_demo.py")
HEIGHT, WIDTH = 64, 96


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of two runs; "first" says class 2 everywhere, "second" class 5."""
    model = instantiate(load_config(CONFIG, SMALL_NETWORK).model)
    paths = {}
    for name, k in (("first", 2), ("second", 5)):
        with torch.no_grad():
            model.sem_seg_head.predictor.weight.zero_()
            model.sem_seg_head.predictor.bias.copy_(torch.eye(9)[k])
        path = tmp_path_factory.mktemp("runs") / name / "model_final.pth"
        path.parent.mkdir()
        torch.save({"model": model.state_dict()}, path)
        paths[name] = str(path)
    return paths


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """A folder of two grey images."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT), (128, 128, 128)).save(folder / name)
    return folder


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Their labels: in the left half of both images "second" is right, in the right half nobody."""
    folder = tmp_path / "labels"
    folder.mkdir()
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    ids[:, : WIDTH // 2 + 4] = 5
    for name in ("a.png", "b.png"):
        Image.fromarray(ids).save(folder / name)
    return folder


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "drive.mp4"
    with VideoWriter(str(path), Fraction(12)) as writer:
        for shade in (100, 120, 140, 160):
            writer.write(np.full((HEIGHT, WIDTH, 3), shade, dtype=np.uint8))
    return path


def command(weights: str, output: Path, *more: object) -> list[str]:
    fixed = ["--config-file", CONFIG, "--weights", weights, "--output", str(output)]
    return [*fixed, *map(str, more), "--device", "cpu", "--set", *SMALL_NETWORK]


def test_images_give_overlay_ids_and_colours(main, weights, frames, tmp_path, capsys) -> None:
    output = tmp_path / "new" / "pictures"
    assert main(command(weights["first"], output, frames, "--opacity", "0.25")) == 0
    assert "2 frames, " in capsys.readouterr().out
    names = {f"{stem}_{kind}.png" for stem in "ab" for kind in ("overlay", "ids", "colors")}
    assert {path.name for path in output.iterdir()} == names
    with Image.open(output / "a_ids.png") as image:
        assert np.unique(np.asarray(image)).tolist() == [2]
    color = np.array(CLASS_COLORS[2])
    with Image.open(output / "a_colors.png") as image:
        assert (np.asarray(image) == color).all()
    with Image.open(output / "a_overlay.png") as image:
        picture = np.asarray(image)
    assert np.abs(picture[:HEIGHT] - (0.75 * 128 + 0.25 * color)).max() <= 1
    legend = picture[HEIGHT:]
    # The first colour is a grey, which the letters have too.
    shown = [bool((legend == other).all(axis=-1).any()) for other in CLASS_COLORS[1:]]
    assert shown == [k == 2 for k in range(1, 9)]


def test_the_flags_of_detectron2s_demo(main, weights, frames, tmp_path, capsys) -> None:
    fixed = ["--config-file", CONFIG, "--input", str(frames / "a.png"), "--output", str(tmp_path)]
    chosen = [*SMALL_NETWORK, f"train.init_checkpoint={weights['first']}"]
    assert main([*fixed, "--opts", *chosen]) == 0
    with Image.open(tmp_path / "a_ids.png") as image:
        assert np.unique(np.asarray(image)).tolist() == [2]
    assert main([*fixed, "--opts", *SMALL_NETWORK]) == 1
    assert "error: no weights" in capsys.readouterr().err


def test_what_is_saved_can_be_chosen(main, weights, frames, tmp_path) -> None:
    output = tmp_path / "out"
    assert main(command(weights["first"], output, frames / "a.png", "--save", "ids")) == 0
    assert [path.name for path in output.iterdir()] == ["a_ids.png"]


def test_a_video_gives_a_video_of_its_rate(main, weights, video, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    more = (video, "--frames", "3", "--save", "overlay", "ids")
    assert main(command(weights["first"], output, *more)) == 0
    assert "3 frames, " in capsys.readouterr().out
    found = Video(str(output / "drive_overlay.mp4"), "drive")
    pictures = [frame.image for frame in found]
    assert len(pictures) == 3 and found.frame_rate == 12
    assert pictures[0].shape[0] > HEIGHT
    expected = 0.4 * np.array([100, 140])[:, None] + 0.6 * np.array(CLASS_COLORS[2])
    means = [picture[8 : HEIGHT - 8].mean(axis=(0, 1)) for picture in (pictures[0], pictures[2])]
    assert np.abs(np.array(means) - expected).max() < 8
    ids = sorted(path.name for path in (output / "drive_ids").iterdir())
    assert ids == ["000000.png", "000001.png", "000002.png"]


def test_a_comparison_says_who_is_right(main, weights, frames, labels, tmp_path, capsys) -> None:
    output = tmp_path / "out"
    more = (frames, "--compare", weights["second"], "--labels", labels)
    assert main(command(weights["first"], output, *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "a: 100.0% of the pixels differ; of those, where labelled, first is right in 0.0%, second "
        "in 54.2%, neither in 45.8%"
    )
    names = sorted(path.name for path in output.iterdir())
    assert names == ["a_comparison.png", "b_comparison.png"]
    with Image.open(output / "a_comparison.png") as image:
        picture = np.asarray(image)
    # Image and ground truth above, the two predictions below, in a box of the second's colour.
    assert picture.shape[0] > 2 * HEIGHT and 2 * WIDTH < picture.shape[1] < 3 * WIDTH
    blue = (picture[: picture.shape[0] // 2] == (86, 180, 233)).all(axis=-1).sum()
    assert blue == 0
    blue = (picture == (86, 180, 233)).all(axis=-1)
    assert blue[:, :WIDTH].sum() > 2 * (HEIGHT + WIDTH) and blue[:, WIDTH:].sum() > HEIGHT + WIDTH


def test_endings_of_labels_and_videos_of_two(main, weights, video, frames, tmp_path) -> None:
    output, labels = tmp_path / "out", tmp_path / "gt"
    labels.mkdir()
    (frames / "a.png").rename(frames / "a_left.png")
    Image.fromarray(np.full((HEIGHT, WIDTH), 2, np.uint8)).save(labels / "a_ids.png")
    both = ("--compare", weights["second"], "--compare-config", CONFIG, "--names", "base", "ours")
    ending = ("--labels", labels, "--label-ending", "_left.png=_ids.png")
    assert main(command(weights["first"], output, frames / "a_left.png", *both, *ending)) == 0
    assert main(command(weights["first"], output, video, "--frames", "2", *both)) == 0
    names = {path.name for path in output.iterdir()}
    assert names == {"a_left_comparison.png", "drive_comparison.mp4"}
    pictures = [frame.image for frame in Video(str(output / "drive_comparison.mp4"), "both")]
    assert len(pictures) == 2 and 2 * WIDTH <= pictures[0].shape[1] < 3 * WIDTH


def test_what_cannot_be_read_is_told_of_and_left(main, weights, frames, tmp_path, capsys) -> None:
    (frames / "aa.png").write_bytes(b"torn")
    output = tmp_path / "out"
    assert main(command(weights["first"], output, frames, "--save", "ids")) == 1
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "aa.png" in line and "2 frames" in out
    assert sorted(path.name for path in output.iterdir()) == ["a_ids.png", "b_ids.png"]


def test_a_stop_keeps_the_frames_until_then(
    main, weights, video, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = main.__globals__["Demo"]
    predicted = []

    def stop(self, image, ids, in_video):
        if len(predicted) == 2:
            raise KeyboardInterrupt
        predicted.append(image)
        return image

    monkeypatch.setattr(demo, "_overlay", stop)
    assert main(command(weights["first"], tmp_path / "out", video)) == 130
    out, err = capsys.readouterr()
    assert "2 frames" in out and "error: stopped before all inputs were read" in err
    assert len(list(Video(str(tmp_path / "out" / "drive_overlay.mp4"), "drive"))) == 2


def test_mistakes_give_one_clear_line(
    main, weights, frames, labels, video, tmp_path, capsys
) -> None:
    first, output = weights["first"], tmp_path / "out"
    (frames / "b.png").write_bytes((frames / "a.png").read_bytes())
    a, compared = frames / "a.png", ("--compare", weights["second"])
    short = tmp_path / "short"
    short.mkdir()
    Image.new("L", (WIDTH, 3)).save(short / "a.png")
    for arguments, message in (
        (command(first, output), "or else a camera"),
        (command(first, output, a, "--webcam", "0"), "or else a camera"),
        (command(first, output, a, "--opacity", "2"), "--opacity 2.0"),
        (command(first, output, a, "--frames", "0"), "--frames 0"),
        (command(first, output, a, "--labels", labels), "--labels needs --compare"),
        (command(first, output, a, *compared, "--label-ending", "x=y"), "needs --labels"),
        (command(first, output, a, *compared, "--names", "x", "x"), "both are called x"),
        (command(first, output, frames), "b.jpg and"),
        (command(str(tmp_path / "none.pth"), output, a), "none.pth: there is no such file"),
        (command(first, output, frames / "c.png"), "c.png: there is no such file"),
        (command(first, output, a, *compared, "--labels", output), "has no label file"),
        (command(first, output, video, *compared, "--labels", labels), "is a video"),
        (command(first, output, a, *compared, "--labels", short), "has size (height, width) (3"),
        ([*command(first, output, a), "model.backbon.name=x"], "model.backbon.name"),
        ([*command(first, output, a), "model.sem_seg_head.conv_dims=64"], "does not fit the model"),
    ):
        assert main(arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line, line
    assert not output.exists() or not list(output.iterdir())


def test_networks_of_other_classes_are_not_compared(
    main, weights, frames, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = main.__globals__["load_predictor"]

    def load_other(config_file, path, overrides, *, device):
        predictor = load(config_file, path, overrides, device=device)
        if path == weights["second"]:
            predictor.class_names = [*predictor.class_names[:8], "other"]
        return predictor

    monkeypatch.setitem(main.__globals__, "load_predictor", load_other)
    more = (frames / "a.png", "--compare", weights["second"])
    assert main(command(weights["first"], tmp_path / "out", *more)) == 1
    assert "have different classes" in capsys.readouterr().err


def test_the_guide_runs(
    main, weights, frames, labels, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands with a small network, and with files where it says that they are."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python tools/demo.py (.+)$", GUIDE, re.MULTILINE)
    assert len(commands) == 2
    for line in commands:
        arguments = shlex.split(line)
        options = main.__globals__["_parser"]().parse_intermixed_args(arguments)
        assert (ROOT / options.config_file).is_file()
        if not options.compare:
            continue
        given = Path(options.inputs[0])
        for folder in (given.parent, Path(options.labels)):
            folder.mkdir(parents=True)
        Image.open(frames / "a.png").save(given)
        shutil.copy(labels / "a.png", Path(options.labels, given.stem + ".png"))
        replaced = {
            options.config_file: CONFIG,
            options.weights: weights["first"],
            options.compare: weights["second"],
        }
        arguments = [replaced.get(argument, argument) for argument in arguments]
        assert main([*arguments, "--set", *SMALL_NETWORK]) == 0
        assert (tmp_path / f"output/pictures/{given.stem}_comparison.png").is_file()
    (snippet,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "street.jpg").write_bytes((frames / "b.jpg").read_bytes())
    load = main.__globals__["load_predictor"]
    names: dict[str, Any] = {}

    def load_small(config_file: str, path: str) -> Any:
        run = OmegaConf.select(load_config(str(ROOT / config_file)), "train.output_dir")
        assert path == f"{run}/model_final.pth"
        return load(CONFIG, weights["first"], SMALL_NETWORK, device="cpu")

    monkeypatch.setattr("contrast_d2.deploy.predictor.load_predictor", load_small)
    exec(compile(snippet, "docs/demo.md", "exec"), names)
    assert names["names"] == [names["predictor"].class_names[2]]

#!/usr/bin/env python
"""Predict images, videos or a camera with a trained network, and draw what it sees.

Usage:
    python tools/demo.py --config-file configs/camvid/semfpn_r18_ms_cs_6k.py \\
        --weights output/camvid/semfpn_r18_ms_cs_6k/model_final.pth --output output/pictures \\
        street.jpg frames/ 'more/**/*.png' drive.mp4
    python tools/demo.py --config-file F --weights W --webcam 0
    python tools/demo.py --config-file F --weights BASELINE --compare METHOD --labels LABELS frames/
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

# detectron2 0.6 scripts functions at import; its users can do nothing about the warning.
warnings.filterwarnings("ignore", message=".*torch.jit.script.*")

# ruff: noqa: E402
import numpy as np
from PIL import Image
from tqdm import tqdm

from contrast_d2.data import load_labels, register_folder
from contrast_d2.deploy.predictor import Predictor, load_predictor
from contrast_d2.engine import import_modules
from contrast_d2.studio.compositing import (
    blend,
    box_entries,
    class_entries,
    draw_boxes,
    palette_image,
    panels,
    text_size_for,
    with_legend,
)
from contrast_d2.studio.differences import Agreement, agreement, differing_regions
from contrast_d2.studio.media import Frame, ImageFile, Video, VideoWriter, find_sources, open_camera
from contrast_d2.studio.visualize import overlay

_OVERLAY, _IDS, _COLORS, _COMPARISON = "overlay", "ids", "colors", "comparison"
_SAVED = (_OVERLAY, _IDS, _COLORS)
# All frames of a video have one size, whatever classes they show.
_VIDEO_LEGEND_ROWS = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the command's name; None takes them from `sys.argv`.

    Returns:
        The exit status: 1 for a mistake, or where a file could not be used, 130 where the work was
        stopped.
    """
    options = _parser().parse_intermixed_args(arguments)
    options.inputs += options.input
    try:
        return Demo(options).run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("inputs", nargs="*", metavar="INPUT", help="image, folder of images, pattern, or video")
    add("--input", nargs="+", default=[], metavar="INPUT", help="the same, as detectron2's demo")
    add("--config-file", required=True, metavar="FILE", help="experiment file, or run's config")
    add("--weights", default="", metavar="FILE", help="checkpoint (default: the config's)")
    add("--webcam", metavar="DEVICE", help="a camera instead of files, such as 0; Ctrl-C ends it")
    add("--output", type=Path, default=Path("output/pictures"), metavar="DIR", help="%(default)s")
    add("--opacity", type=float, default=0.6, help="of the classes' colours (default 0.6)")
    add(
        "--save",
        nargs="+",
        choices=_SAVED,
        help="what to write (default: all of an image, the overlay of a video; with --compare the "
        "comparison alone); give it behind the inputs",
    )
    add("--frames", type=int, metavar="N", help="stop a video or a camera after so many frames")
    add("--compare", metavar="WEIGHTS", help="checkpoint to compare with, drawn to the right")
    add("--compare-config", metavar="FILE", help="its experiment file (default: --config-file)")
    add("--names", nargs=2, metavar=("FIRST", "SECOND"), help="what to call the two")
    add("--labels", metavar="DIR", help="label files, which say who of the two is right")
    add(
        "--label-ending",
        metavar="IMAGE=LABEL",
        help="endings of file names that belong together (default: any image's and .png); "
        "_leftImg8bit.png=_gtFine_labelTrainIds.png for Cityscapes",
    )
    add("--device", help="cuda, cuda:1, cpu (default: a GPU where there is one)")
    add("--dataset-folder", metavar="DIR", help="folder whose dataset.json names the classes")
    add(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="module to import first, for what it registers, as train_net.py has it",
    )
    add(
        "--set",
        "--opts",
        dest="overrides",
        action="extend",
        nargs="+",
        default=[],
        metavar="key=value",
        help="changes to the config; give them behind the inputs",
    )
    return parser


class Demo:
    """One call of the command: its networks, its inputs, and what was counted.

    Args:
        options: of the command line.

    Raises:
        ValueError: something is missing, contradicts something else, or cannot be read.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        _check(options)
        self.options = options
        import_modules(options.imports)
        if options.dataset_folder:
            register_folder(options.dataset_folder)
        self.sources = _sources(options)
        self.labels = _label_files(self.sources, options.labels, options.label_ending)
        self.predictors = _load(options)
        self.names = options.names or _names([options.weights, options.compare or ""])
        self.frames = 0
        self.seconds_in_network = 0.0
        self.failed = 0

    def run(self) -> int:
        """Goes through all inputs; returns the exit status."""
        self.options.output.mkdir(parents=True, exist_ok=True)
        start, status = time.perf_counter(), 0
        lengths = [self._length(source) for source in self.sources]
        total = sum(lengths) if all(lengths) else None
        with tqdm(total=total, unit="frame", disable=None) as self.progress:
            try:
                for source in self.sources:
                    self._predict_source(source)
            except KeyboardInterrupt:
                status = 0 if self.options.webcam else 130
        self._report(time.perf_counter() - start)
        if status:
            print("error: stopped before all inputs were read", file=sys.stderr)
        return status or int(self.failed > 0)

    def _length(self, source: ImageFile | Video) -> int:
        if isinstance(source, Video) and self.options.frames:
            return min(len(source) or self.options.frames, self.options.frames)
        return len(source)

    def _predict_source(self, source: ImageFile | Video) -> None:
        """Predicts all frames of a source; one that cannot be read is told of and left."""
        try:
            if isinstance(source, ImageFile):
                for frame in source:
                    self._predict_image(source, frame)
            else:
                self._predict_video(source)
        except ValueError as error:
            self.failed += 1
            tqdm.write(f"error: {error}", file=sys.stderr)

    def _predict_image(self, source: ImageFile, frame: Frame) -> None:
        for kind, picture in self._pictures(frame, self._kinds(_SAVED), source.path):
            picture.save(self.options.output / f"{source.name}_{kind}.png")

    def _predict_video(self, source: Video) -> None:
        kinds = self._kinds([_OVERLAY])
        stem = self.options.output / source.name
        with ExitStack() as stack:
            writers = {
                kind: stack.enter_context(VideoWriter(f"{stem}_{kind}.mp4", source.frame_rate))
                for kind in kinds
                if kind != _IDS
            }
            if _IDS in kinds:
                Path(f"{stem}_{_IDS}").mkdir(exist_ok=True)
            for frame in islice(source, self.options.frames):
                for kind, picture in self._pictures(frame, kinds, None):
                    if kind == _IDS:
                        picture.save(f"{stem}_{_IDS}/{frame.name}.png")
                    else:
                        writers[kind].write(np.asarray(picture))

    def _kinds(self, default: Sequence[str]) -> list[str]:
        """What is written: what is asked for, a comparison, or else the default."""
        comparison = [_COMPARISON] if self.options.compare else []
        return [*dict.fromkeys(self.options.save or ([] if comparison else default)), *comparison]

    def _pictures(
        self, frame: Frame, kinds: Iterable[str], path: str | None
    ) -> Iterator[tuple[str, Image.Image]]:
        """The pictures of a frame; `path` is that of an image file, None in a video."""
        start = time.perf_counter()
        ids = [predictor(frame.image) for predictor in self.predictors]
        self.seconds_in_network += time.perf_counter() - start
        colors = self.predictors[0].class_colors
        for kind in kinds:
            if kind == _IDS:
                yield kind, palette_image(ids[0], colors)
            elif kind == _COLORS:
                yield kind, palette_image(ids[0], colors).convert("RGB")
            elif kind == _OVERLAY:
                yield kind, Image.fromarray(self._overlay(frame.image, ids[0], path is None))
            else:
                yield kind, Image.fromarray(self._comparison(frame, ids, path))
        self.frames += 1
        self.progress.update()

    def _overlay(self, image: np.ndarray, ids: np.ndarray, in_video: bool) -> np.ndarray:
        first = self.predictors[0]
        return with_legend(
            blend(image, ids, first.class_colors, self.options.opacity),
            class_entries([ids], first.class_names, first.class_colors),
            text_size=text_size_for(*ids.shape),
            rows=_VIDEO_LEGEND_ROWS if in_video else None,
        )

    def _comparison(self, frame: Frame, ids: list[np.ndarray], path: str | None) -> np.ndarray:
        """Image, ground truth where it is known, and both predictions with what differs framed."""
        first = self.predictors[0]
        ignored = first.label_map.ignore_label
        labels = load_labels(self.labels[path], first.label_map) if path in self.labels else None
        if labels is not None and labels.shape != ids[0].shape:
            raise ValueError(
                f"{self.labels[path]} has size (height, width) {labels.shape}, but its image "
                f"{path} has {ids[0].shape}"
            )
        regions = differing_regions(*ids, labels, ignore_label=ignored)
        text_size = text_size_for(*ids[0].shape)
        pictures = {} if path is None else {"image": frame.image}
        maps = list(ids)
        if labels is not None:
            maps.append(labels)
            pictures["ground truth"] = overlay(
                frame.image,
                labels,
                first.class_colors,
                alpha=self.options.opacity,
                ignore_label=ignored,
            )
        for name, prediction in zip(self.names, ids, strict=True):
            picture = blend(frame.image, prediction, first.class_colors, self.options.opacity)
            pictures[name] = draw_boxes(picture, regions, max(2, text_size // 5))
        if path is not None:
            shares = agreement(*ids, labels, ignored)
            tqdm.write(f"{frame.name}: {_sentence(shares, self.names)}")
        return with_legend(
            panels(pictures, text_size=text_size, columns=2 if len(pictures) == 4 else 3),
            [
                *class_entries(maps, first.class_names, first.class_colors),
                *box_entries(regions, *self.names),
            ],
            text_size=text_size,
            rows=_VIDEO_LEGEND_ROWS if path is None else None,
        )

    def _report(self, seconds: float) -> None:
        if not self.frames:
            return
        frames = "1 frame" if self.frames == 1 else f"{self.frames} frames"
        print(
            f"{self.options.output}: {frames}, {self.frames / seconds:.2f} per second, "
            f"{self.seconds_in_network / self.frames:.3f} s in the network for each"
        )


def _check(options: argparse.Namespace) -> None:
    """Raises ValueError where options contradict each other."""
    if bool(options.inputs) == (options.webcam is not None):
        raise ValueError("name images, folders or videos, or else a camera with --webcam 0.")
    if not 0 <= options.opacity <= 1:
        raise ValueError(f"--opacity {options.opacity} is not in 0..1.")
    if options.frames is not None and options.frames < 1:
        raise ValueError(f"--frames {options.frames} must be at least 1.")
    for name in ("compare_config", "names", "labels"):
        if getattr(options, name) and not options.compare:
            raise ValueError(f"--{name.replace('_', '-')} needs --compare WEIGHTS.")
    if options.label_ending and not options.labels:
        raise ValueError("--label-ending needs --labels DIR.")
    if options.names and options.names[0] == options.names[1]:
        raise ValueError(f"--names: both are called {options.names[0]}.")
    for path in (options.weights, options.compare):
        if path and not Path(path).is_file():
            raise ValueError(f"{path}: there is no such file of weights.")


def _sources(options: argparse.Namespace) -> list[ImageFile | Video]:
    if options.webcam is not None:
        return [open_camera(options.webcam)]
    sources = find_sources(options.inputs)
    counts = Counter(source.name for source in sources)
    if twice := [source.path for source in sources if counts[source.name] > 1]:
        raise ValueError(
            f"{twice[0]} and {twice[1]} would be written to files of one name: predict them one by "
            "one, with another --output for each."
        )
    return sources


def _label_files(
    sources: Sequence[ImageFile | Video], folder: str | None, endings: str | None
) -> dict[str, str]:
    """The path of each image's label file, by its own."""
    if folder is None:
        return {}
    image_ending, separator, label_ending = (endings or "=.png").partition("=")
    if not separator:
        raise ValueError(f"--label-ending {endings}: write IMAGE_ENDING=LABEL_ENDING.")
    found = {}
    for source in sources:
        if isinstance(source, Video):
            raise ValueError(f"--labels: {source.path} is a video; its frames have no label files.")
        name = os.path.basename(source.path)
        if not name.endswith(image_ending):
            raise ValueError(
                f"{source.path} does not end in {image_ending}, as --label-ending says."
            )
        stem = name.removesuffix(image_ending) if image_ending else source.name
        found[source.path] = os.path.join(folder, stem + label_ending)
        if not os.path.isfile(found[source.path]):
            raise ValueError(f"{source.path} has no label file {found[source.path]}.")
    return found


def _load(options: argparse.Namespace) -> list[Predictor]:
    loaded = [(options.config_file, options.weights)]
    if options.compare:
        loaded.append((options.compare_config or options.config_file, options.compare))
    predictors = [
        load_predictor(config_file, weights, options.overrides, device=options.device)
        for config_file, weights in loaded
    ]
    first, *others = predictors
    for other in others:
        if other.class_names != first.class_names:
            raise ValueError(
                f"{first.dataset_name} and {other.dataset_name} have different classes: only "
                "networks of the same classes can be compared."
            )
    return predictors


def _names(weights: Sequence[str]) -> list[str]:
    """What to call two checkpoints: by their folders, or else by their paths."""
    folders = [Path(path).resolve().parent.name for path in weights]
    return folders if folders[0] != folders[1] else list(weights)


def _sentence(shares: Agreement, names: Sequence[str]) -> str:
    text = f"{shares.differing:.1%} of the pixels differ"
    if np.isnan(shares.first):
        return text
    neither = 1 - shares.first - shares.second
    return (
        f"{text}; of those, where labelled, {names[0]} is right in {shares.first:.1%}, {names[1]} "
        f"in {shares.second:.1%}, neither in {neither:.1%}"
    )


if __name__ == "__main__":
    sys.exit(main())

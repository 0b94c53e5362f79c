"""What the check of a dataset finds, each in a small folder that has just that fault."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from contrast_d2.data import SemSegMapper
from contrast_d2.data.check import Finding, Severity, check_dataset, text_report
from contrast_d2.data.files import BrokenFilesError
from contrast_d2.studio.dataset_report import write_report

CLASSES = [
    {"name": "road", "color": [128, 64, 128]},
    {"name": "car", "color": [0, 0, 142]},
    {"name": "sky", "color": [70, 130, 180]},
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder `yard` in DETECTRON2_DATASETS without a fault: 3 + 2 pairs, values 0..2 and 255."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    path = tmp_path / "yard"
    rng = np.random.default_rng(0)
    for split, names in (("train", "abc"), ("val", "de")):
        for part in ("images", "annotations"):
            (path / part / split).mkdir(parents=True)
        for name in names:
            pixels = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"images/{split}/{name}.png")
            save(path / f"annotations/{split}/{name}.png", good_labels())
    describe(path, classes=CLASSES)
    yield path
    forget()


def forget() -> None:
    """A description is read once in a process."""
    for name in [n for n in DatasetCatalog.list() if n.startswith("yard")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def good_labels() -> np.ndarray:
    labels = np.repeat(np.array([0, 1, 2, 255], np.uint8), 6)
    return np.tile(labels, (16, 1))


def save(path: Path, array: np.ndarray) -> None:
    Image.fromarray(array).save(path)


def describe(folder: Path, **entries) -> None:
    (folder / "dataset.json").write_text(json.dumps(entries))


def labels_of(folder: Path) -> list[Path]:
    return sorted((folder / "annotations").rglob("*.png"))


def relabel(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes all label files."""
    for path in labels_of(folder):
        save(path, change(np.asarray(Image.open(path))))


def only(folder: Path) -> Finding:
    """The one finding of a folder."""
    (finding,) = check_dataset("yard").findings
    return finding


def names(finding: Finding) -> list[str]:
    return [Path(file).name for file in finding.files]


def test_a_good_folder_has_no_findings(folder) -> None:
    for target in ("yard", str(folder)):
        checked = check_dataset(target, workers=2)
        assert checked.findings == () and not checked.has_errors
        assert checked.splits == ("yard_sem_seg_train", "yard_sem_seg_val")
        assert len(checked.pairs) == 5
    assert check_dataset("yard_sem_seg_val").splits == ("yard_sem_seg_val",)
    assert text_report(checked).splitlines() == [
        "yard_sem_seg_train: 3 images, 24x16",
        "yard_sem_seg_val: 2 images, 24x16",
        "0 errors, 0 warnings, 0 notes",
    ]


def test_pairs_that_are_missing_either_way(folder) -> None:
    (folder / "annotations/train/a.png").unlink()
    (folder / "annotations/train/b.png").unlink()
    (folder / "images/val/e.png").unlink()
    missing, stray = check_dataset("yard").findings
    assert missing.severity is Severity.ERROR and "2 images cannot be used" in missing.text
    assert "images/train/a.png has no label file" in missing.text
    assert any("images/train/b.png" in line for line in missing.files)
    assert stray.severity is Severity.WARNING and names(stray) == ["e.png"]
    with pytest.raises(BrokenFilesError, match="a.png has no label.*; 1 more files.*check_data"):
        DatasetCatalog.get("yard_sem_seg_train")


def test_files_that_cannot_be_read(folder) -> None:
    image = folder / "images/train/a.png"
    Image.open(image).save(image.with_suffix(".jpg"))
    image.unlink()
    for path in (image.with_suffix(".jpg"), folder / "annotations/val/d.png"):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - 30])
    (folder / "images/train/b.png").write_bytes(b"no image")
    header, body = check_dataset("yard").findings
    assert header.severity is body.severity is Severity.ERROR
    assert "images/train/b.png" in header.text
    assert names(body) == ["a.jpg", "d.png"]


def test_sizes_that_differ(folder) -> None:
    save(folder / "annotations/train/b.png", good_labels()[:, :-2])
    finding = only(folder)
    assert finding.severity is Severity.ERROR and names(finding) == ["b.png"]
    assert "24x16 pixels with labels of 22x16" in finding.text and "EXIF" not in finding.text


def test_sizes_that_differ_by_the_orientation(folder) -> None:
    path = folder / "images/train/b.png"
    image = Image.open(path)
    exif = Image.Exif()
    exif[274] = 6
    image.save(path, exif=exif)
    finding = only(folder)
    assert "turned by their EXIF: 1 image" in finding.text
    assert "EXIF orientation" in finding.fix


@pytest.mark.parametrize(
    ("mode", "severity", "words"),
    [
        ("L", "note", "mode L"),
        ("RGBA", "warning", "alpha"),
        ("CMYK", "warning", "CMYK"),
        ("I;16", "error", "cut off at 255"),
    ],
)
def test_modes_of_images(folder, mode, severity, words) -> None:
    source = folder / "images/train/a.png"
    image = Image.open(source)
    source.unlink()
    image = image.convert("L").convert("I;16") if mode == "I;16" else image.convert(mode)
    target = source.with_suffix(".jpg" if mode == "CMYK" else ".png")
    image.save(target)
    finding = only(folder)
    assert finding.severity.value == severity and words in finding.text
    assert "1 image of 5" in finding.text and names(finding) == [target.name]


def test_equal_images(folder) -> None:
    image = Image.open(folder / "images/train/a.png")
    image.save(folder / "images/val/d.png", compress_level=0)  # other bytes, same pixels
    finding = only(folder)
    assert finding.severity is Severity.WARNING and "share 1 image, equal" in finding.text
    assert names(finding) == ["a.png", "d.png"]
    shutil.copy(folder / "images/train/b.png", folder / "images/train/c.png")
    within = check_dataset("yard").findings[-1]
    assert within.severity is Severity.NOTE and names(within) == ["b.png", "c.png"]


def test_labels_in_colours(folder) -> None:
    table = np.zeros((256, 3), np.uint8)
    table[:3] = [c["color"] for c in CLASSES]
    table[255] = 9, 8, 7
    relabel(folder, lambda labels: table[labels])
    finding = check_dataset("yard").findings[0]
    assert finding.severity is Severity.ERROR and len(finding.files) == 5
    assert "#804080 road (25.0%)" in finding.text and "#090807 ? (25.0%)" in finding.text
    assert "docs/custom_data.md" in finding.fix
    relabel(folder, lambda labels: np.repeat(good_labels()[..., None], 3, axis=2))
    assert "several equal channels" in check_dataset("yard").findings[0].text


def paint(path: Path, palette: list[int]) -> None:
    painted = Image.fromarray(good_labels() % 255)  # void becomes 0
    painted.putpalette(palette)
    painted.save(path)


def test_palettes_that_are_decoration_are_fine(folder) -> None:
    for path in labels_of(folder):
        paint(path, [c for row in CLASSES for c in row["color"]])
    assert check_dataset("yard").findings == ()


def test_palettes_that_differ_between_files(folder) -> None:
    for i, path in enumerate(labels_of(folder)):
        paint(path, [10, 0, 0, 0, 10, 0, 0, 0, 10 + (i == 2)])
    finding = only(folder)
    assert finding.severity is Severity.ERROR and "indices 2 have" in finding.text


def test_palettes_that_hold_the_ids(folder) -> None:
    for path in labels_of(folder):
        paint(path, [2, 2, 2, 0, 0, 0, 255, 255, 255])
    finding = only(folder)
    assert finding.severity is Severity.ERROR and "0 -> 2, 1 -> 0, 2 -> 255" in finding.text


def test_palettes_with_the_colours_of_other_classes(folder) -> None:
    for path in labels_of(folder):
        paint(path, [c for row in reversed(CLASSES) for c in row["color"]])
    finding = only(folder)
    assert finding.severity is Severity.WARNING and "0 -> sky, 2 -> road" in finding.text


def test_void_that_is_not_declared(folder) -> None:
    describe(folder, classes=CLASSES, void_ids=[])
    finding = only(folder)
    assert finding.severity is Severity.ERROR and len(finding.files) == 5
    assert "255 (480 pixels in 5 files)" in finding.text and "usually void" in finding.text
    assert '"void_ids": [255]' in finding.fix and "yard/dataset.json" in finding.fix


def test_classes_that_are_counted_from_one(folder) -> None:
    relabel(folder, lambda labels: np.where(labels == 255, 255, labels + 1).astype(np.uint8))
    finding = check_dataset("yard").findings[0]
    assert "counted from 1 to 3" in finding.text and '"ids": [k]' in finding.fix


@pytest.mark.parametrize(("void", "fix"), [(3, '"void_ids": [3, 255]'), (0, '"ids": [k]')])
def test_the_rarer_of_two_candidates_for_void(folder, void, fix) -> None:
    values = [1, 2, 0, 0, 3] if void == 3 else [1, 2, 3, 3, 0]
    relabel(folder, lambda _: np.tile(np.repeat(np.array(values, np.uint8), 5)[:24], (16, 1)))
    finding = only(folder)
    assert f"so {void} is the likelier" in finding.text and fix in finding.fix


def test_the_proposal_for_void_mends(folder) -> None:
    describe(folder, classes=CLASSES, void_ids=[])
    entry = re.search(r'"void_ids": (\[.*?\])', only(folder).fix)
    forget()
    describe(folder, classes=CLASSES, void_ids=json.loads(entry[1]))
    assert check_dataset("yard").findings == ()


def test_a_mask_of_0_and_255(folder) -> None:
    describe(folder, classes=["background", "crack"])
    relabel(folder, lambda labels: np.where(labels == 1, 255, 0).astype(np.uint8))
    mask, absent = check_dataset("yard").findings
    assert "nothing but 'background'" in mask.text and '"ids": [255]' in mask.fix
    assert "never occur: crack" in absent.text


def test_classes_that_are_missing(folder) -> None:
    for split, value in (("train", 1), ("val", 2)):
        for path in (folder / "annotations" / split).iterdir():
            save(path, np.where(good_labels() == value, 0, good_labels()))
    train, val = check_dataset("yard").findings
    assert train.severity is Severity.WARNING
    assert (
        train.text.startswith("yard_sem_seg_train has no pixel of 1 class") and "car" in train.text
    )
    assert val.severity is Severity.NOTE and "sky" in val.text


def test_labels_that_are_void_all_over(folder) -> None:
    save(folder / "annotations/train/c.png", np.full((16, 24), 255, np.uint8))
    finding = only(folder)
    assert "void all over" in finding.text and names(finding) == ["c.png"]


def test_the_built_in_datasets_name_their_command(tmp_path, monkeypatch) -> None:
    for part in ("images", "annotations"):
        (tmp_path / "camvid" / part / "val").mkdir(parents=True)
    rng = np.random.default_rng(0)
    save(tmp_path / "camvid/images/val/a.png", rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    save(
        tmp_path / "camvid/annotations/val/a.png", np.arange(12, dtype=np.uint8)[None].repeat(9, 0)
    )
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert check_dataset("camvid_sem_seg_val").findings == ()
    save(tmp_path / "camvid/annotations/val/a.png", np.full((9, 12), 200, np.uint8))
    (finding,) = check_dataset("camvid_sem_seg_val").findings
    assert "200 (108 pixels" in finding.text and "prepare_dataset.py camvid," in finding.fix
    whole = check_dataset("camvid")
    assert whole.splits == ("camvid_sem_seg_val",)
    assert sum("cannot be listed" in finding.text for finding in whole.findings) == 3


def test_training_points_to_the_check(folder) -> None:
    save(folder / "annotations/train/a.png", np.full((16, 24), 77, np.uint8))
    check_dataset("yard")
    mapper = SemSegMapper(dataset_name="yard_sem_seg_train", is_train=True)
    with pytest.raises(ValueError, match=r"\[77\].*tools/check_dataset.py yard_sem_seg_train"):
        mapper(DatasetCatalog.get("yard_sem_seg_train")[0])


def test_the_report_shows_the_pairs(folder, tmp_path) -> None:
    save(folder / "annotations/train/b.png", good_labels()[:, :-2])
    save(folder / "annotations/train/c.png", np.full((16, 24), 77, np.uint8))
    target = tmp_path / "report.html"
    write_report(str(target), check_dataset("yard"), "yard <1>")
    text = target.read_text()
    assert "yard &lt;1&gt;" in text and "<title>yard <1>" not in text
    # Of both pairs the image and the label; nothing is loaded from elsewhere.
    assert text.count('<img src="data:image/jpeg;base64,') == text.count("<img") == 4
    assert "(neither)" in text and "<td>road</td>" in text


def test_an_unknown_name_and_a_folder_without_description(folder, tmp_path) -> None:
    with pytest.raises(ValueError, match="'yrad' is not registered"):
        check_dataset("yrad")
    with pytest.raises(ValueError, match="dataset.json does not exist"):
        check_dataset(str(tmp_path))
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        check_dataset("yard", workers=0)

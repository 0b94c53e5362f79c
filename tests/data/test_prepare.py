"""The preparation of label files: interrupted, repeated, incomplete."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from contrast_d2.data.preparations import PREPARATIONS
from contrast_d2.data.prepare import Job, Plan, run_plan

from . import published


@pytest.fixture
def ade20k(tmp_path, monkeypatch) -> Path:
    """ADE20K of three images per split; its folder."""
    published.set_root(monkeypatch, tmp_path)
    published.ade20k(tmp_path, count=3)
    return tmp_path / "ADEChallengeData2016"


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by relative path."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def prepare(**options):
    return run_plan(PREPARATIONS["ade20k"](), **{"workers": 1, "partial": True, **options})


def test_a_second_run_writes_nothing(ade20k) -> None:
    first = prepare()
    assert (first.written, first.present) == (6, 0)
    path = ade20k / "annotations_detectron2/training/ADE_train_00000002.png"
    time = path.stat().st_mtime_ns
    second = prepare()
    assert (second.written, second.present) == (0, 6)
    assert path.stat().st_mtime_ns == time


def test_a_stopped_run_leaves_complete_files_and_is_gone_on_with(ade20k, monkeypatch) -> None:
    """Stopped while the third file is written, by what Ctrl-C raises."""
    prepare()
    folder = ade20k / "annotations_detectron2"
    expected = files(folder)
    for path in folder.rglob("*.png"):
        path.unlink()

    save, saved = Image.Image.save, []

    def stopped(self, file, *args, **kwargs):
        saved.append(file)
        if len(saved) == 3:
            file.write(b"half a file")
            raise KeyboardInterrupt
        save(self, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    left = files(folder)
    # A worker may have begun the next file before the main thread saw the interrupt.
    assert 2 <= len(left) < 6 and left.items() <= expected.items()
    summary = prepare()
    assert (summary.present, summary.written) == (len(left), 6 - len(left))
    assert files(folder) == expected


def test_files_that_others_left_empty_are_written_anew(ade20k) -> None:
    prepare()
    path = ade20k / "annotations_detectron2/training/ADE_train_00000001.png"
    complete = path.read_bytes()
    path.write_bytes(b"")
    assert prepare().written == 1
    assert path.read_bytes() == complete


def test_leftovers_of_a_killed_process_do_not_matter(ade20k) -> None:
    folder = ade20k / "annotations_detectron2"
    (folder / "training").mkdir(parents=True)
    (folder / "training/ADE_train_00000001.png.tmp").write_bytes(b"half a file")
    assert prepare().images["ade20k_sem_seg_train"] == 3
    assert not list(folder.rglob("*.tmp"))


def test_the_first_failure_cancels_the_rest(tmp_path, monkeypatch) -> None:
    begun = []
    noticed = threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def notice(pool: ThreadPoolExecutor, wait: bool = True, *, cancel_futures: bool = False):
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        noticed.set()
        shutdown(pool, wait=wait)

    def make(i: int) -> np.ndarray:
        begun.append(i)
        if i == 1:
            raise ValueError("label 1 is broken")
        if i > 1:
            noticed.wait()
        return np.zeros((1, 1), dtype=np.uint8)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", notice)
    jobs = [Job("some", str(tmp_path / f"{i}.png"), partial(make, i)) for i in range(2000)]
    with pytest.raises(ValueError, match="label 1 is broken"):
        run_plan(Plan(jobs, {"some": (2000,)}), workers=2)
    # Each worker may have begun one more, before the failure was noticed.
    assert {0, 1} <= set(begun) <= {0, 1, 2, 3}
    assert len(list(tmp_path.iterdir())) == len(begun) - 1


def test_workers_write_side_by_side(ade20k, monkeypatch) -> None:
    together = threading.Barrier(2, timeout=300)  # of one thread alone; two meet at once
    save = Image.Image.save

    def save_together(self, *args, **kwargs):
        together.wait()  # fails if one thread does all
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save_together)
    assert prepare(workers=2).written == 6


def test_an_incomplete_download_is_named_before_anything_is_written(ade20k) -> None:
    with pytest.raises(ValueError) as error:
        prepare(partial=False)
    assert re.search(r"ade20k_sem_seg_train\b.* 3 .*20,210", str(error.value))
    assert re.search(r"ade20k_sem_seg_val\b.* 3 .*2,000", str(error.value))
    assert "--partial" in str(error.value)
    assert not (ade20k / "annotations_detectron2").exists()


def test_missing_images_are_named(ade20k) -> None:
    plan = PREPARATIONS["ade20k"]()._replace(
        counts={"ade20k_sem_seg_train": (3,), "ade20k_sem_seg_val": (3, 4)}
    )
    assert run_plan(plan, workers=1).written == 6
    (ade20k / "images/validation/ADE_val_00000002.jpg").unlink()
    with pytest.raises(ValueError, match="ade20k_sem_seg_val.* 2 images.*3.*4"):
        run_plan(plan, workers=1)


def test_a_split_may_be_missing_from_a_partial_download(ade20k, caplog) -> None:
    (ade20k / "annotations/training").rename(ade20k / "elsewhere")
    assert prepare().images == {"ade20k_sem_seg_val": 3}
    assert "ade20k_sem_seg_train" in caplog.text


def test_a_value_that_the_dataset_lacks_is_told(ade20k) -> None:
    path = ade20k / "annotations/training/ADE_train_00000003.png"
    published.write_png(path, published.one_row([0, 151]))
    with pytest.raises(ValueError, match=r"training/ADE_train_00000003\.png.*values \[151\]"):
        prepare()


def test_a_value_that_coco_stuff_lacks_is_told(tmp_path, monkeypatch) -> None:
    """The 10k release keeps its values, and they are looked at nevertheless."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    published.coco_stuff_10k(tmp_path)
    path = tmp_path / "coco_stuff_10k/annotations/COCO_train2014_000000000009.mat"
    savemat(path, {"S": published.one_row([0, 1, 12])})
    with pytest.raises(ValueError, match=r"000000000009\.mat.*values \[12\]"):
        run_plan(PREPARATIONS["coco_stuff_10k"](), workers=1, partial=True)


def test_a_truncated_label_file_is_told(ade20k) -> None:
    path = ade20k / "annotations/training/ADE_train_00000003.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"Cannot read .*ADE_train_00000003\.png"):
        prepare()


def test_without_a_download_the_folder_is_named(
    tmp_path, monkeypatch, subtests: pytest.Subtests
) -> None:
    for name in sorted(PREPARATIONS):
        with subtests.test(name=name):
            monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
            for partially in (False, True):
                with pytest.raises(ValueError, match=str(tmp_path)) as error:
                    run_plan(PREPARATIONS[name](), workers=1, partial=partially)
                assert "DETECTRON2_DATASETS" in str(error.value)
            assert not list(tmp_path.iterdir())


def test_workers_must_be_positive(ade20k) -> None:
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        prepare(workers=0)


def test_split_files_are_written_when_all_labels_are_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    published.pascal_context_mat(tmp_path)
    lists = tmp_path / "VOCdevkit/VOC2010/ImageSets/SegmentationContext"
    broken = tmp_path / "VOCdevkit/VOC2010/trainval/2008_000003.mat"
    complete = broken.read_bytes()
    broken.write_bytes(b"no MATLAB file")
    plan = PREPARATIONS["pascal_context"]
    with pytest.raises(ValueError, match=r"2008_000003\.mat"):
        run_plan(plan(), workers=1, partial=True)
    assert not lists.exists()
    broken.write_bytes(complete)
    run_plan(plan(), workers=1, partial=True)
    assert {path.name: path.read_text().split() for path in lists.iterdir()} == {
        f"{split}.txt": names for split, names in published.PASCAL_SPLITS.items()
    }


def test_pascal_context_without_a_label_is_told_and_can_be_partial(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    published.pascal_context_mat(tmp_path)
    (tmp_path / "VOCdevkit/VOC2010/trainval/2008_000007.mat").unlink()
    summary = run_plan(PREPARATIONS["pascal_context"](), workers=1, partial=True)
    assert summary.images["pascal_context_60_sem_seg_train"] == 1

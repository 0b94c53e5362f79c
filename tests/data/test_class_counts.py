"""Pixels of each class in a dataset's label files."""

from __future__ import annotations

import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import contrast_d2.data.class_counts as module
from contrast_d2.data.class_counts import count_classes

from .labelled_files import COUNTS, NAME, register, write


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    return write(tmp_path, monkeypatch)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The label files that have been read, in the order of reading."""
    read: list[str] = []
    load = module.load_labels

    def recorded(path, label_map):
        read.append(path)
        return load(path, label_map)

    monkeypatch.setattr(module, "load_labels", recorded)
    return read


def counts_of(name: str) -> list[list[int]]:
    return count_classes(name).tolist()


def npz(counts: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, counts=counts)
    return file.getvalue()


def test_pixels_are_counted_by_image_and_class_without_void(files) -> None:
    assert counts_of(NAME) == COUNTS


def test_files_are_read_once(files, reads, caplog) -> None:
    with caplog.at_level(logging.INFO):
        first = counts_of(NAME)
        assert sorted(reads) == [str(file) for file in files]
        assert counts_of(NAME) == first
    assert len(reads) == len(files)
    assert caplog.text.count("Counting the classes in 2 label files of counted") == 1


def test_of_several_at_once_one_reads(files, reads) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(counts_of, [NAME] * 4))
    assert results == [COUNTS] * 4
    assert len(reads) == len(files)


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_changed_file_is_counted_anew(files, reads, change: str) -> None:
    counts_of(NAME)
    times = os.stat(files[0]).st_atime_ns, os.stat(files[0]).st_mtime_ns
    if change == "size":
        Image.fromarray(np.full((20, 40), 20, dtype=np.uint8)).save(files[0])
        os.utime(files[0], ns=times)
        assert counts_of(NAME) == [[0, 800, 0, 0], COUNTS[1]]
    else:
        os.utime(files[0], ns=(times[0], times[1] + 1))
        assert counts_of(NAME) == COUNTS
    assert len(reads) == 2 * len(files)


def test_another_label_map_is_another_count(files, monkeypatch) -> None:
    counts_of(NAME)
    metadata = register(NAME, [str(file) for file in files], monkeypatch)
    metadata.stuff_dataset_id_to_contiguous_id.update({10: 1, 20: 0})
    assert counts_of(NAME) == [[1, 6, 0, 0], [0, 1, 2, 0]]


WHOLE = np.array(COUNTS)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        npz(WHOLE)[:-30],
        npz(WHOLE[:1]),
        npz(WHOLE - 1),
        npz(WHOLE.astype(float)),
        npz(WHOLE).replace(b"counts", b"others"),
    ],
)
def test_a_broken_cached_file_is_made_anew(files, reads, caplog, content: bytes) -> None:
    counts_of(NAME)
    (cached,) = (files[0].parent / "cache").glob("*.npz")
    cached.write_bytes(content)
    assert counts_of(NAME) == COUNTS
    assert caplog.records[0].levelname == "WARNING" and str(cached) in caplog.text
    assert counts_of(NAME) == COUNTS
    assert len(reads) == 2 * len(files)


def test_without_a_folder_for_the_cache_it_counts(files, tmp_path, monkeypatch, caplog) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path / "file" / "cache"))
    assert counts_of(NAME) == COUNTS
    assert "cannot be written to" in caplog.text


def test_camvid(camvid: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CONTRAST_D2_CACHE", str(tmp_path))
    counts = count_classes("camvid_sem_seg_val")
    labels = [
        np.asarray(Image.open(path)) for path in sorted((camvid / "annotations/val").iterdir())
    ]
    expected = [[int((x == c).sum()) for c in range(11)] for x in labels]
    assert counts.tolist() == expected

"""Decoded images on a disk: the same pixels, never a half-written one, never a stale one."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from contrast_d2.data.cache import PixelCache
from contrast_d2.data.reading import read_rgb


@pytest.fixture
def image(tmp_path: Path) -> str:
    return _write(tmp_path / "image.png", seed=0)


@pytest.fixture
def cache(tmp_path: Path) -> PixelCache:
    return PixelCache(str(tmp_path / "cache"))


def _write(path: Path, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def _entries(cache: PixelCache) -> list[Path]:
    return [path for path in Path(cache.folder).rglob("*") if path.is_file()]


def _refuse(path: str) -> np.ndarray:
    raise AssertionError(f"{path} is decoded again")


def test_an_image_is_decoded_once(image, cache) -> None:
    decoded = cache.read(image, read_rgb)
    kept = PixelCache(cache.folder).read(image, _refuse)  # another process, or a later run
    np.testing.assert_array_equal(kept, decoded)
    assert type(kept) is np.ndarray and kept.dtype == np.uint8 and not kept.flags.writeable


def test_a_changed_file_is_decoded_again(image, cache) -> None:
    cache.read(image, read_rgb)
    status = os.stat(image)
    _write(Path(image), seed=1)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    np.testing.assert_array_equal(cache.read(image, read_rgb), read_rgb(image))


@pytest.mark.parametrize("length", [0, 10, 128, 1000])
def test_a_torn_entry_is_made_anew(image, cache, length, caplog) -> None:
    cache.read(image, read_rgb)
    (entry,) = _entries(cache)
    entry.write_bytes(entry.read_bytes()[:length])
    np.testing.assert_array_equal(cache.read(image, read_rgb), read_rgb(image))
    assert "is made anew" in caplog.text
    np.testing.assert_array_equal(cache.read(image, _refuse), read_rgb(image))


def test_a_full_disk_ends_the_keeping_and_not_the_run(image, cache, monkeypatch, caplog) -> None:
    def save(file, pixels, **options) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    for _ in range(2):
        np.testing.assert_array_equal(cache.read(image, read_rgb), read_rgb(image))
    assert _entries(cache) == []
    assert caplog.text.count("No space left on device") == 1  # told once, tried once


def test_errors_of_the_decoder_are_passed_on(tmp_path, cache) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for path in (str(broken), str(tmp_path / "missing.png")):
        with pytest.raises(ValueError, match="Cannot read the image"):
            cache.read(path, read_rgb)
    assert _entries(cache) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache_dir .*file/cache cannot be made"):
        PixelCache(str(tmp_path / "file/cache"))

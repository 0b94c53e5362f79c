"""Decoded images on a disk, so that an epoch does not decode again what the last one did."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable

import numpy as np

from ..files import write_atomically

logger = logging.getLogger(__name__)


class PixelCache:
    """Keeps decoded images in a folder; what reads a part of one touches that part alone.

    An entry is a ``.npy`` file, as large as the pixels: 6.3 MB for an image of 2048x1024, 19 GB for
    the training images of Cityscapes. It is found by path, size and time of the image file, appears
    when it is complete, and may be read by any number of processes at once. Entries of files that
    are no more are not removed: delete the folder. Where the disk is full, images are decoded as
    without a cache.

    Args:
        folder: made where it is missing. Of a fast local disk, or what is gained is lost.

    Raises:
        ValueError: if the folder cannot be made or written to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(os.path.expanduser(folder))
        try:
            os.makedirs(self.folder, exist_ok=True)
            writable = os.access(self.folder, os.W_OK)
        except OSError:
            writable = False
        if not writable:
            raise ValueError(
                f"cache_dir {folder} cannot be made or written to: choose a folder of yours, or "
                "None to decode each image anew"
            )
        self._keeps_more = True

    def read(self, path: str, decode: Callable[[str], np.ndarray]) -> np.ndarray:
        """The pixels of an image file.

        Args:
            path: of the file. One that does not lie on a local disk is decoded each time.
            decode: reads a file; its result is kept, and its errors are passed on.

        Returns:
            What `decode` returns, read-only.
        """
        entry = self._entry(path)
        if entry is None:
            return decode(path)
        try:
            # A plain array: results of a memmap are memmaps, down to sums and scalars.
            return np.asarray(np.load(entry, mmap_mode="r", allow_pickle=False))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, EOFError) as error:
            logger.warning("The cached file %s cannot be read (%s) and is made anew", entry, error)
        pixels = decode(path)
        if self._keeps_more:
            self._keep(entry, pixels)
        return pixels

    def _entry(self, path: str) -> str | None:
        try:
            status = os.stat(path)
        except OSError:
            return None
        stamp = os.path.abspath(path), status.st_size, status.st_mtime_ns
        key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]
        # No folder of a file system likes a million files.
        return os.path.join(self.folder, key[:2], f"{key[2:]}.npy")

    def _keep(self, entry: str, pixels: np.ndarray) -> None:
        try:
            os.makedirs(os.path.dirname(entry), exist_ok=True)
            write_atomically(entry, lambda file: np.save(file, pixels, allow_pickle=False))
        except OSError as error:
            self._keeps_more = False
            logger.warning("No more images are kept in %s: %s", self.folder, error)

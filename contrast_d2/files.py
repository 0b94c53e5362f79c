"""Files that are either whole or not there, and what a full disk does to them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

# No room on the disk, in a quota, or under a limit on the size of files.
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class DiskFullError(ValueError):
    """A file could not be written for lack of room; those written before are as they were."""


def write_atomically(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file so that `path` is never seen half-written, whenever the process dies.

    Args:
        path: of the file, in a folder that exists.
        write: puts the content into the open binary file that it is given.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def write_durably(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Writes a file as `write_atomically` does, so that it also outlasts a power failure.

    Args:
        path: of the file, in a folder that exists.
        write: puts the content into the open binary file that it is given.

    Raises:
        DiskFullError: there is no room for it. The file of before is still there.
    """

    def write_and_sync(file: IO[bytes]) -> None:
        write(file)
        file.flush()
        os.fsync(file.fileno())

    with stop_when_disk_is_full(path):
        write_atomically(path, write_and_sync)
    _sync_folder(os.path.dirname(path) or ".")


@contextmanager
def stop_when_disk_is_full(path: str) -> Iterator[None]:
    """Turns the errors of writing `path` on a full disk into a line that says what to do.

    Raises:
        DiskFullError: the code inside found no room.
    """
    try:
        yield
    except Exception as error:
        # torch.save ends with a RuntimeError of its own, raised while it cleans up after the first.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            raise DiskFullError(
                f"{path} could not be written: {os.strerror(cause.errno)}. What was saved before "
                "is whole: make room, then continue with --resume."
            ) from error
        raise


def _sync_folder(folder: str) -> None:
    """Makes a rename outlast a power failure, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems sync no folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)

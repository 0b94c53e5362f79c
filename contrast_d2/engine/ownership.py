"""One training at a time in a folder."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime

from detectron2.utils import comm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FILE_NAME = "owner.json"

# Seconds between two signs of life of an owner, and how long to wait for one before it counts as
# dead. Network file systems may show what another machine has written a few seconds late.
_BEAT, _PATIENCE = 10.0, 45.0


@dataclass(frozen=True)
class Owner:
    """A process that trains in a folder.

    Attributes:
        host: name of its machine.
        process: its id there.
        start: when it took the folder, in local time.
    """

    host: str
    process: int
    start: str


@contextmanager
def owned(folder: str) -> Iterator[None]:
    """Keeps other trainings out of a folder, as long as the context is open or the process lives.

    The main process locks the file `owner.json` in it; all processes have to enter, and all are
    refused where it is. The lock is one of POSIX, which ends with the process, however that ends,
    and which data workers do not inherit, as they would one of `flock`. Where a file system has no
    locks, or keeps them to each machine, the file itself serves: its owner touches it every 10
    seconds, and one that has not done so for 45 is dead.

    Args:
        folder: of a run, which exists.

    Raises:
        ValueError: another training is under way there. The message names it.
    """
    lock, problem = None, ""
    if comm.is_main_process():
        try:
            lock = _Lock(folder)
        except ValueError as error:
            problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise ValueError(problem)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class _Lock:
    """Holds the file, and shows that its owner is alive."""

    def __init__(self, folder: str) -> None:
        self._path = path = os.path.join(folder, FILE_NAME)
        self._released = threading.Event()
        while True:
            self._file, is_new = _open(path)
            try:
                locked = _lock(self._file)
                if locked is False:
                    raise _refusal(folder, _owner(self._file))
                if not _is_at(self._file, path):  # the one who held it has removed it meanwhile
                    os.close(self._file)
                    continue
                before = _owner(self._file)
                died_here = locked and (before is None or before.host == socket.gethostname())
                if not (is_new or died_here) and _shows_life(path):
                    raise _refusal(folder, before)
            except BaseException:
                os.close(self._file)
                raise
            break
        start = datetime.now().astimezone().isoformat(timespec="seconds")
        note = json.dumps(asdict(Owner(socket.gethostname(), os.getpid(), start))) + "\n"
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, note.encode())
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def _beat(self) -> None:
        while not self._released.wait(_BEAT):
            with suppress(OSError):  # a network disk that is away for a while
                os.utime(self._path)

    def release(self) -> None:
        self._released.set()
        self._beats.join()
        if fcntl is None:  # Windows removes no open file
            os.close(self._file)
        with suppress(OSError):
            os.unlink(self._path)  # while it is locked: nobody else can have taken it
        if fcntl is not None:
            os.close(self._file)


def _open(path: str) -> tuple[int, bool]:
    """A descriptor of the file, and whether it was not there before."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        try:
            return os.open(path, os.O_RDWR), False
        except FileNotFoundError:  # removed between the two
            continue
        except OSError as error:
            raise ValueError(
                f"{path} cannot be opened ({error.strerror}): it says which training a folder "
                "belongs to. Remove it, or name another train.output_dir."
            ) from error


def _lock(file: int) -> bool | None:
    """Whether the file could be locked; None where the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_at(file: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _owner(file: int) -> Owner | None:
    """Whom the file names; None where nobody has written it.

    By the descriptor that locks it: closing any other one would end the lock.
    """
    os.lseek(file, 0, os.SEEK_SET)
    try:
        return Owner(**json.loads(os.read(file, 4096)))
    except (ValueError, TypeError):
        return None


def _shows_life(path: str) -> bool:
    """Waits for an owner of whom no lock can tell, on another machine perhaps, to touch the file.

    Its times are only compared with one another: clocks of machines differ.
    """
    try:
        before = os.stat(path).st_mtime_ns
        for _ in range(round(_PATIENCE)):
            time.sleep(1.0)
            if os.stat(path).st_mtime_ns != before:
                return True
    except FileNotFoundError:
        return False
    return False


def _refusal(folder: str, owner: Owner | None) -> ValueError:
    who = "another process"
    if owner is not None:
        who = f"process {owner.process} on {owner.host}, since {owner.start}"
    return ValueError(
        f"train.output_dir={folder}: a training is under way there, of {who}. End it first, or "
        "name another folder."
    )

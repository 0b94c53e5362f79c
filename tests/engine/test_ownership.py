"""One training at a time in a folder, and what a start leaves alone there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from contrast_d2.engine import owned, ownership
from contrast_d2.engine.record import begin_run

from ..tiny import SMALL_NETWORK

ROOT = Path(__file__).parents[2]

# Takes a folder, says so, and keeps it until it is told to go on; it has a child, as data workers
# are, that outlives it.
HOLDER = """
import os, sys
from contrast_d2.engine import owned
try:
    with owned(sys.argv[1]):
        child = os.fork()
        if not child:
            sys.stdin.close()
            os.read(int(sys.argv[2]), 1)
            os._exit(0)
        print("taken", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""


class Holder:
    """Another process that takes a folder."""

    def __init__(self, folder: Path) -> None:
        self._end, self._child_ends = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HOLDER, str(folder), str(self._end)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[self._end],
        )

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        os.close(self._child_ends)
        os.close(self._end)
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


posix = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@posix
def test_a_second_training_is_told_whose_the_folder_is(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    try:
        assert holder.answer() == "taken"
        before = (tmp_path / ownership.FILE_NAME).read_text()
        words = [str(tmp_path), str(holder.process.pid), socket.gethostname()]
        with pytest.raises(ValueError) as raised, owned(str(tmp_path)):
            pass
        message = str(raised.value)
        assert all(word in message for word in words) and "\n" not in message
        assert (tmp_path / ownership.FILE_NAME).read_text() == before
        # Its workers may live on for a while when it is killed.
        holder.process.send_signal(signal.SIGKILL)
        holder.process.wait()
        with owned(str(tmp_path)):
            note = json.loads((tmp_path / ownership.FILE_NAME).read_text())
            assert note["process"] == os.getpid()
        assert not list(tmp_path.iterdir())
    finally:
        holder.end()


@posix
@pytest.mark.slow
def test_of_two_that_start_at_once_one_wins(tmp_path: Path) -> None:
    for _ in range(3):
        both = [Holder(tmp_path), Holder(tmp_path)]
        try:
            answers = sorted(holder.answer() for holder in both)
            assert answers[1].startswith("train.output_dir") and answers[0] == "taken"
        finally:
            for holder in both:
                holder.end()


@pytest.mark.parametrize("locks", [True, False])
def test_the_owner_on_another_machine_shows_life(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where locks do not reach from one machine to another, or there are none."""
    if not locks:
        monkeypatch.setattr(ownership, "fcntl", None)
    host = "elsewhere" if locks else socket.gethostname()
    path = tmp_path / ownership.FILE_NAME
    path.write_text(json.dumps({"host": host, "process": 7, "start": "noon"}))
    beats = iter(range(100))

    def sleep(_: float) -> None:
        if alive.is_set():
            os.utime(path, (next(beats), 0))

    monkeypatch.setattr(ownership.time, "sleep", sleep)
    alive = threading.Event()
    alive.set()
    with pytest.raises(ValueError, match=f"process 7 on {host}, since noon"), owned(str(tmp_path)):
        pass
    alive.clear()
    with owned(str(tmp_path)):
        assert json.loads(path.read_text())["process"] == os.getpid()


def test_the_owner_touches_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_BEAT", 0.001)
    touched = threading.Event()
    monkeypatch.setattr(ownership.os, "utime", lambda path: touched.set())
    with owned(str(tmp_path)):
        assert touched.wait(60)


def test_a_file_that_is_no_owners_is_taken(tmp_path: Path) -> None:
    path = tmp_path / ownership.FILE_NAME
    path.write_text('{"host": ')  # of a machine that lost its power
    with owned(str(tmp_path)):
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    path.mkdir()
    with pytest.raises(ValueError, match=ownership.FILE_NAME), owned(str(tmp_path)):
        pass


@posix
def test_a_training_is_refused_before_it_writes_anything(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("of the first\n")
    config = "configs/shapes/semfpn_r18_ms_cs_demo.py"
    with owned(str(tmp_path)):
        names = sorted(path.name for path in tmp_path.iterdir())
        result = subprocess.run(
            [
                *(sys.executable, "train_net.py", "--config-file", config, *SMALL_NETWORK),
                f"train.output_dir={tmp_path}",
            ],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert f"process {os.getpid()}" in result.stderr.strip().splitlines()[-1]
        assert sorted(path.name for path in tmp_path.iterdir()) == names
        assert (tmp_path / "log.txt").read_text() == "of the first\n"


def test_temporary_files_of_others_are_left_alone(tmp_path: Path) -> None:
    ours = ["model_0000001.pth.12.tmp", "last_checkpoint.7.tmp", "metrics.json.3.tmp"]
    others = ["notes.tmp", "model_mine.pth.3.tmp", "model_0000001.pth.tmp"]
    for name in [*ours, *others]:
        (tmp_path / name).touch()
    (tmp_path / "model_final.pth.5.tmp").mkdir()
    cfg = OmegaConf.create({"train": {"output_dir": str(tmp_path)}})
    begin_run(cfg, start=1)
    left = {path.name for path in tmp_path.glob("*.tmp")}
    assert left == {*others, "model_final.pth.5.tmp"}

from __future__ import annotations

import os
import sys
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from contrast_d2.studio import media
from contrast_d2.studio.media import ImageFile, Video, VideoWriter, find_sources, open_camera


def shades(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames that H.264 keeps: a shade each, dark on the left."""
    frames = [np.full((height, width, 3), 60 + 20 * i, dtype=np.uint8) for i in range(count)]
    for frame in frames:
        frame[:, : width // 2] = (200, 30, 30)
    return frames


@pytest.fixture
def video(tmp_path: Path) -> Path:
    path = tmp_path / "drive.mp4"
    with VideoWriter(str(path), Fraction(30000, 1001)) as writer:
        for frame in shades(6):
            writer.write(frame)
    return path


def write_image(path: Path, value: int = 7) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (value, 0, 0)).save(path)
    return str(path)


def test_a_video_is_read_as_it_was_written(video: Path) -> None:
    source = Video(str(video), "drive")
    frames = list(source)
    assert len(source) == len(frames) == 6
    assert source.frame_rate == Fraction(30000, 1001)
    assert [frame.name for frame in frames[:2]] == ["000000", "000001"]
    for frame, written in zip(frames, shades(6), strict=True):
        assert frame.image.dtype == np.uint8
        middle = np.s_[8:24, 4:16]
        assert np.abs(frame.image[middle].astype(int) - written[middle]).max() < 12  # red, not blue
        assert np.abs(frame.image[8:24, 36:].astype(int) - written[8:24, 36:]).max() < 12
    assert len(list(source)) == 6  # and again


def test_odd_sides_lose_a_pixel(tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    with VideoWriter(str(path), Fraction(10)) as writer:
        writer.write(shades(1, height=33, width=51)[0])
    (frame,) = Video(str(path), "odd")
    assert frame.image.shape == (32, 50, 3)


def test_a_video_that_was_filmed_sideways_is_turned(tmp_path: Path) -> None:
    path = str(tmp_path / "turned.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.set_display_rotation(90)
        frame = av.VideoFrame.from_ndarray(shades(1)[0], format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (found,) = Video(path, "turned")
    assert found.image.shape == (48, 32, 3)
    # A quarter of a turn against the clock: the left side, which is red, comes to lie below.
    red = found.image[:, :, 0].astype(int) - found.image[:, :, 2]
    assert red[36].min() > 100 > 20 > abs(red[12]).max()


def test_a_stop_leaves_a_video_of_the_frames_until_then(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    with pytest.raises(KeyboardInterrupt):
        with VideoWriter(str(path), Fraction(10)) as writer:
            for frame in shades(3):
                writer.write(frame)
            raise KeyboardInterrupt
    assert len(list(Video(str(path), "cut"))) == 3


def test_files_folders_and_patterns_in_their_order(tmp_path: Path, video: Path) -> None:
    b, a = write_image(tmp_path / "frames/b.JPG"), write_image(tmp_path / "frames/a.png")
    deep = write_image(tmp_path / "deep/er/c.png")
    odd = write_image(tmp_path / "odd/x[1].png")
    (tmp_path / "frames/notes.txt").write_text("no image")
    (tmp_path / "frames/._a.png").write_text("of an archive")
    pattern = str(tmp_path / "deep/**/*.png")
    found = find_sources([str(video), str(tmp_path / "frames"), pattern, odd])
    assert [source.path for source in found] == [str(video), a, b, deep, odd]
    assert [type(source) for source in found] == [Video, *[ImageFile] * 4]
    assert [source.name for source in found] == ["drive", "a", "b", "c", "x[1]"]
    (frame,) = found[1]
    assert frame.name == "a" and frame.image.shape == (4, 6, 3)
    assert frame.image[0, 0].tolist() == [7, 0, 0]


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "broken.mp4").write_bytes(b"0" * 100)
    for text, message in {
        str(tmp_path / "none.png"): "none.png: there is no such file",
        str(tmp_path / "empty"): "empty holds no image",
        str(tmp_path / "*.gif"): "no file fits the pattern",
        str(tmp_path / "notes.txt"): "notes.txt: images end in",
        str(tmp_path / "broken.mp4"): "broken.mp4 cannot be opened: Invalid data",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_sources([text])
    with pytest.raises(ValueError, match="Cannot read the image"):
        path = tmp_path / "torn.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n")
        list(ImageFile(str(path)))


def test_a_file_with_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = str(tmp_path / "sound.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="sound.mp4 holds no pictures"):
        find_sources([path])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for a device file of Linux")
def test_a_camera_that_is_not_there_is_named() -> None:
    assert not os.path.exists("/dev/video97")
    with pytest.raises(ValueError, match="the camera /dev/video97 cannot be opened: No such file"):
        open_camera("97")


def test_a_camera_is_read_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # A device of FFmpeg that draws its pictures itself, and is opened as a camera is.
    monkeypatch.setitem(media._CAMERA_FORMATS, sys.platform, "lavfi")
    camera = open_camera("testsrc=size=64x48:rate=10")
    assert (camera.name, camera.frame_rate, len(camera)) == ("webcam", 10, 0)
    frames = list(islice(camera, 25))
    assert [frame.name for frame in frames][-1] == "000024"
    assert frames[0].image.shape == (48, 64, 3) and (frames[0].image != frames[24].image).any()


def test_without_pyav_it_says_what_to_install(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"pip install av.*\[demo\]"):
        find_sources([str(video)])

"""Images, videos and cameras as one stream of frames, and a video file to write frames to.

Videos need PyAV, the extra `demo`. Shape letters: H W a frame.
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..data.files import IMAGE_SUFFIXES
from ..data.reading import read_rgb

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")

# What FFmpeg calls the cameras of each system.
_CAMERA_FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}
_GLOB = ("*", "?", "[")
# Of videos and cameras that do not say how fast they are.
_DEFAULT_RATE = Fraction(25)


class Frame(NamedTuple):
    """One image of a source."""

    name: str
    """Of the image file without ending; of a video, the number of the frame."""
    image: np.ndarray
    """(H, W, 3) uint8, RGB."""


class ImageFile:
    """An image file, of one frame.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.name = os.path.splitext(os.path.basename(path))[0]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Frame]:
        """Reads the file.

        Raises:
            ValueError: it cannot be read.
        """
        yield Frame(self.name, read_rgb(self.path))


class Video:
    """A video file or a camera, decoded frame by frame and turned upright; its sound is left out.

    Args:
        path: of the file, or what FFmpeg calls the camera.
        name: for what is made of it.
        camera_format: FFmpeg's name of the interface to cameras; None for a file.

    Raises:
        ValueError: it cannot be opened, has no pictures, or PyAV is not installed.
    """

    def __init__(self, path: str, name: str, camera_format: str | None = None) -> None:
        self.path = path
        self.name = name
        self._camera_format = camera_format
        with self._open() as container:
            stream = container.streams.video[0]
            self.frame_rate = Fraction(stream.average_rate or _DEFAULT_RATE)
            self._length = 0 if camera_format else stream.frames

    def __len__(self) -> int:
        """Number of frames; 0 where it is not known, as of a camera."""
        return self._length

    def __iter__(self) -> Iterator[Frame]:
        """Decodes frames as they are asked for.

        Raises:
            ValueError: the file is damaged from some frame on.
        """
        av = _pyav()
        with self._open() as container:
            frames = container.decode(video=0)
            number = 0
            while True:
                try:
                    frame = next(frames, None)
                except av.FFmpegError as error:
                    raise ValueError(
                        f"{self.path} cannot be read beyond frame {number}: {error.strerror}."
                    ) from error
                if frame is None:
                    return
                # Telephones film sideways and note by how many degrees a player has to turn.
                image = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                yield Frame(f"{number:06d}", image)
                number += 1

    def _open(self) -> Any:
        av = _pyav()
        try:
            container = av.open(self.path, format=self._camera_format)
        except (av.FFmpegError, ValueError) as error:
            kind = "camera" if self._camera_format else "video"
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"the {kind} {self.path} cannot be opened: {reason}.") from error
        if not container.streams.video:
            container.close()
            raise ValueError(f"{self.path} holds no pictures.")
        return container


class VideoWriter:
    """Writes frames to an mp4 file with H.264, which players and browsers show.

    Used in a `with` statement. The file is there, and can be played, however that ends: a stop in
    between keeps the frames until then.

    Args:
        path: of the file, in a folder that exists.
        frame_rate: in frames per second.

    Raises:
        ValueError: PyAV is not installed.
    """

    def __init__(self, path: str, frame_rate: Fraction) -> None:
        self._container = _pyav().open(path, "w", format="mp4")
        self._frame_rate = frame_rate
        self._stream: Any = None

    def write(self, image: np.ndarray) -> None:
        """Appends a frame.

        Args:
            image: (H, W, 3) uint8, RGB; of one size in all calls. An odd side loses one pixel,
                since H.264 has colours for pairs of pixels only.
        """
        height, width = (side - side % 2 for side in image.shape[:2])
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._frame_rate)
            self._stream.height, self._stream.width = height, width
            self._stream.pix_fmt = "yuv420p"
            self._stream.options = {"crf": "18"}  # without a difference that can be seen
        frame = _pyav().VideoFrame.from_ndarray(
            np.ascontiguousarray(image[:height, :width]), format="rgb24"
        )
        self._container.mux(self._stream.encode(frame))

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()


def find_sources(inputs: Sequence[str]) -> list[ImageFile | Video]:
    """Images and videos that paths, folders and patterns stand for, in their order.

    Args:
        inputs: files, told apart by their ending; folders, of which all images are taken; patterns
            such as `frames/**/*.png`.

    Raises:
        ValueError: there is no such file, its ending is unknown, or a folder or a pattern has no
            image.
    """
    return [_source(path) for text in inputs for path in _paths(text)]


def open_camera(device: str) -> Video:
    """Opens a camera.

    Args:
        device: its number, or what FFmpeg calls it: /dev/video2 on Linux, video=NAME on Windows.

    Raises:
        ValueError: it cannot be opened.
    """
    camera_format = _CAMERA_FORMATS.get(sys.platform)
    if camera_format is None:
        raise ValueError(f"cameras cannot be read on {sys.platform}: record a video first.")
    path = f"/dev/video{device}" if device.isdigit() and camera_format == "v4l2" else device
    return Video(path, "webcam", camera_format)


def _paths(text: str) -> list[str]:
    if os.path.isdir(text):
        names = [n for n in sorted(os.listdir(text)) if _ends(n, IMAGE_SUFFIXES)]
        if not names:
            raise ValueError(f"the folder {text} holds no image ({' '.join(IMAGE_SUFFIXES)}).")
        return [os.path.join(text, name) for name in names]
    if not os.path.exists(text) and any(sign in text for sign in _GLOB):
        found = sorted(filter(os.path.isfile, glob.glob(text, recursive=True)))
        if not found:
            raise ValueError(f"no file fits the pattern {text}.")
        return found
    if not os.path.exists(text):
        raise ValueError(f"{text}: there is no such file or folder.")
    return [text]


def _source(path: str) -> ImageFile | Video:
    if _ends(path, IMAGE_SUFFIXES):
        return ImageFile(path)
    if _ends(path, VIDEO_SUFFIXES):
        return Video(path, os.path.splitext(os.path.basename(path))[0])
    raise ValueError(
        f"{path}: images end in {' '.join(IMAGE_SUFFIXES)} and videos in "
        f"{' '.join(VIDEO_SUFFIXES)}."
    )


def _ends(path: str, suffixes: tuple[str, ...]) -> bool:
    # Archives of macOS hold ._NAME files.
    return path.lower().endswith(suffixes) and not os.path.basename(path).startswith(".")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "videos and cameras need PyAV: pip install av, or install with the extra [demo]."
        ) from error
    return av

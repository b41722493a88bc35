"""Frames of video files, read and written by PyAV (https://pyav.basswood-io.com), the extra ``video``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from ..files import open_file
from .coco.faults import DataError

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv"}

# FFmpeg must not follow lists of other files and addresses, which are videos to it as well.
_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,avi,matroska,webm,mpeg,mpegvideo,mpegts,asf",
}

_TICKS = 90_000  # a second in the written file, which keeps the times of uneven frames


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        number: index from 0.
        time: seconds since the first frame.
        pixels: (H, W, 3) uint8 RGB, upright.
    """

    number: int
    time: float
    pixels: np.ndarray


def _import_av(path: str | Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError("missing-package", f"{path}: videos need PyAV; pip install av") from error
    return av


def count_frames(path: str | Path) -> int:
    """Return the number of frames according to the file; 0 if it does not state one.

    Raises:
        UserError: PyAV is missing, or the file is no video.
    """
    with _open(path) as (_, stream):
        return int(stream.frames)


def read_frames(path: str | Path) -> Iterator[Frame]:
    """Yield the frames of the first video stream.

    Raises:
        UserError: PyAV is missing, the file is no video, or it is damaged.
    """
    with _open(path) as (container, stream):
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or 25)
        first = None
        for number, frame in enumerate(container.decode(stream)):
            time = number / rate if frame.time is None else float(frame.time)
            first = time if first is None else first
            pixels = frame.to_ndarray(format="rgb24")
            turns = round(getattr(frame, "rotation", 0) / 90) % 4
            yield Frame(number, time - first, np.ascontiguousarray(np.rot90(pixels, turns)))
        if first is None:
            raise DataError("unreadable-image", f"video {path} has no frames; replace or remove it")


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[Any, Any]]:
    av = _import_av(path)
    try:
        with open_file(path), av.open(f"file:{path}", options=_OPTIONS) as container:
            if not container.streams.video:
                raise DataError("unreadable-image", f"{path} has no pictures, sound alone; leave it out")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            "unreadable-image", f"cannot read video {path}: {reason}; replace or remove it"
        ) from error


class VideoWriter:
    """Writes an mp4 (H.264, or MPEG-4 if PyAV lacks it), without sound.

    Args:
        file: open for binary writing and seeking; the caller closes it.
        name: name of the file, for messages.
    """

    def __init__(self, file: IO[bytes], name: str | Path) -> None:
        self._av = _import_av(name)
        self._container = self._av.open(file, "w", format="mp4")
        self._stream: Any = None
        self._last = -1

    def add(self, picture: np.ndarray, time: float) -> None:
        """Add a frame.

        Args:
            picture: (H, W, 3) uint8 RGB, as large as the first one. H.264 needs even sizes: an odd height or
                width is extended by its last line or column.
            time: seconds, later than that of the frame before.
        """
        picture = np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)), mode="edge")
        if self._stream is None:
            codec = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
            self._stream = self._container.add_stream(codec, rate=25)
            self._stream.height, self._stream.width = picture.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, _TICKS)
            if codec == "libx264":
                self._stream.options = {"crf": "20", "preset": "veryfast"}
            else:
                self._stream.bit_rate = 8_000_000
                self._stream.codec_context.time_base = Fraction(1, 1000)  # 16 bits, in MPEG-4
        frame = self._av.VideoFrame.from_ndarray(picture, format="rgb24")
        base = self._stream.codec_context.time_base
        frame.time_base = base
        frame.pts = self._last = max(self._last + 1, round(time / base))
        self._container.mux(self._stream.encode(frame))

    def end(self) -> None:
        """Complete the file."""
        if self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()

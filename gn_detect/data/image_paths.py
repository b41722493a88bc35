"""Find image files by name, folder or pattern."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .video import VIDEO_SUFFIXES

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


def find_images(inputs: Iterable[str], videos: bool = False) -> list[Path]:
    """Return files as given, the images in folders, and the matches of patterns, each once.

    Folders and patterns leave out hidden files, such as macOS's ``._photo.jpg``, and files of other kinds,
    such as ``Thumbs.db``.

    Args:
        inputs: paths and patterns.
        videos: take videos as well.

    Raises:
        UserError: an input does not exist, a folder or pattern holds no image, or there is no input.
    """
    suffixes = IMAGE_SUFFIXES | (VIDEO_SUFFIXES if videos else set())
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            matches = [path]
        else:
            listed = path.iterdir() if path.is_dir() else map(Path, glob.glob(text, recursive=True))
            shown = sorted(p for p in listed if p.is_file() and not p.name.startswith("."))
            matches = [p for p in shown if p.suffix.lower() in suffixes]
            if not path.is_dir():
                matches = matches or shown  # a pattern such as '*.dat' names them
        if not matches:
            raise UserError(
                "no-such-image", f"no image at {text}; give image files, a folder of them or a pattern"
            )
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError(
            "missing-argument", "no images: name files, a folder or a pattern before the config keys"
        )
    return list(found)

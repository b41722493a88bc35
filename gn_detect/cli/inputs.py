"""Images, folders, patterns and videos of a command line, and the names of what is written for them."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from ..config.load import known_keys
from ..config.paths import CONFIG
from ..data.video import VIDEO_SUFFIXES
from ..errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def names_weights(text: str) -> bool:
    """Return whether a word is a checkpoint, a run's folder or a name of the model zoo."""
    path = Path(text)
    if path.is_dir():
        return (path / CONFIG).is_file()
    if text.endswith((".pth", ".pt", ".pkl", ".safetensors", ".npz")) or text.startswith("zoo://"):
        return True
    if not re.fullmatch(r"[\w.]+(-[\w.]+)+", text) or path.exists():
        return False
    from ..weights.zoo import read_catalog

    return text in read_catalog()


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Images, and ``KEY VALUE`` pairs from the first argument that looks like a key and is not a file."""
    keys = known_keys()
    for i, argument in enumerate(arguments):
        is_key = _KEY.fullmatch(argument) and ("." in argument or argument in keys)
        if is_key and not Path(argument).exists():
            return arguments[:i], arguments[i:]
    return arguments, []


def find_images(inputs: list[str], videos: bool = False) -> list[Path]:
    """Files as given, the images (and videos, if wanted) in folders, and what patterns match, each once.

    Folders and patterns leave out hidden files, such as the ``._photo.jpg`` that macOS puts beside
    ``photo.jpg``, and files of other kinds, such as ``Thumbs.db``.

    Raises:
        UserError: an input does not exist, or a folder or pattern holds no image.
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
                matches = matches or shown  # of a pattern such as '*.dat'
        if not matches:
            raise UserError(f"no image at {text}; give image files, a folder of them or a pattern")
        found.update(dict.fromkeys(matches))
    if not found:
        raise UserError("no images: name files, a folder or a pattern before the config keys")
    return list(found)


def is_video(path: Path) -> bool:
    """By its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def name_outputs(inputs: list[Path]) -> list[str]:
    """A file name for the picture, or video, of each input; equal stems get a number."""
    used: set[str] = set()
    names = []
    for path in inputs:
        suffix = ".mp4" if is_video(path) else ".png"
        name, count = f"{path.stem}{suffix}", 1
        while name in used:
            count += 1
            name = f"{path.stem}_{count}{suffix}"
        used.add(name)
        names.append(name)
    return names

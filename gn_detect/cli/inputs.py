"""Split a command line's images from its config keys, and name the outputs for images and videos."""

from __future__ import annotations

import re
from pathlib import Path

from ..config.load import known_keys
from ..config.paths import CONFIG
from ..data.video import VIDEO_SUFFIXES

_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def names_weights(text: str) -> bool:
    """Return whether a word is a checkpoint, a run's folder, or a name of the model zoo or the Hub."""
    path = Path(text)
    if path.is_dir():
        return (path / CONFIG).is_file()
    if text.endswith((".pth", ".pt", ".pkl", ".safetensors", ".npz")) or text.startswith(("zoo://", "hf://")):
        return True
    if not re.fullmatch(r"[\w.]+(-[\w.]+)+", text) or path.exists():
        return False
    from ..weights.zoo import read_catalog

    return text in read_catalog()


def split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return images, and ``KEY VALUE`` pairs from the first argument that looks like a key and is no file."""
    keys = known_keys()
    for i, argument in enumerate(arguments):
        is_key = _KEY.fullmatch(argument) and ("." in argument or argument in keys)
        if is_key and not Path(argument).exists():
            return arguments[:i], arguments[i:]
    return arguments, []


def is_video(path: Path) -> bool:
    """Recognise a video by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def name_outputs(inputs: list[Path]) -> list[str]:
    """Return the file name of each input's picture or video; equal stems get a number."""
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

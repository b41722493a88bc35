"""Files that are either whole or absent: write to a temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; it becomes ``path`` only when the block ends without an error.

    Args:
        path: destination; its folder is created when missing.
        mode: ``"w"`` (UTF-8 text) or ``"wb"``.

    Raises:
        UserError: the folder cannot be created or written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose a folder that can be written"
        ) from error
    try:
        with os.fdopen(descriptor, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_current_umask())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _flush_folder(folder: Path) -> None:
    """Make the new name last through a power failure, where the system can do that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _current_umask() -> int:
    """mkstemp creates files for the owner alone; the result should have the usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8; see :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write(text)


def atomic_write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    """Write ``content`` as JSON; see :func:`atomic_write`."""
    with atomic_write(path) as file:
        json.dump(content, file, indent=indent)

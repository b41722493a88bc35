"""Open a user's files safely, and write files that are whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import UserError

_REMEDIES = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room",
    (errno.EROFS,): "choose another folder: this file system can only be read",
    (errno.EACCES, errno.EPERM): "correct the rights or choose another folder",
    (errno.ENOENT,): "it or its folder is not there: correct the path, or make again what was deleted",
    (errno.ENOTDIR, errno.EEXIST): "a part of the path is a file: choose another folder",
    (errno.EISDIR,): "it is a folder: choose another name",
    (errno.EIO, errno.ESTALE): "check the disk, or the network that it is on",
}


def remedy(error: OSError) -> str:
    """Return what a user can do about an error of the system, in a few words."""
    return next((text for codes, text in _REMEDIES.items() if error.errno in codes), "choose another folder")


def cannot_write(path: str | Path, error: OSError, then: str = "") -> UserError:
    """Return the error for a ``path`` that cannot be written; ``then`` follows after the remedy."""
    return UserError("cannot-write", f"cannot write {path}: {error.strerror or error}; {remedy(error)}{then}")


def open_file(path: str | Path) -> IO[bytes]:
    """Open a user's file for reading: a regular file, or a link to one, anywhere.

    A device has no end, and a pipe or a socket may wait for ever: none of them is opened.

    Raises:
        OSError: the file cannot be opened.
        UserError: it is not a regular file.
    """
    _check_regular(path, os.stat(path))  # to open some devices is an action by itself
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _check_regular(path, os.fstat(descriptor))  # the name may belong to another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(path: str | Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise UserError(
            "not-a-file", f"{path} is a device, a pipe or a socket; give a regular file, or a link to one"
        )


def read_text(path: str | Path, largest: int | None = None) -> str:
    """Return a user's UTF-8 text file whole, with or without a byte order mark.

    Args:
        path: a regular file.
        largest: most bytes; None for any number.

    Raises:
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        UserError: it is not a regular file, or is too large.
    """
    with open_file(path) as file:
        content = file.read(-1 if largest is None else largest + 1)
    if largest is not None and len(content) > largest:
        raise UserError(
            "oversized-file",
            f"{path} has more than {largest} bytes, too many for such a file; check its name",
        )
    return content.decode("utf-8-sig")


@contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file next to ``path``; it becomes ``path`` if the block ends without an error.

    Args:
        path: destination; a missing folder is created.
        mode: ``"w"`` (UTF-8 text) or ``"wb"``.

    Raises:
        UserError: the folder cannot be created or written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        # A name may contain half a character, which is not UTF-8: its escape is written.
        encoding, errors = (None, None) if "b" in mode else ("utf-8", "backslashreplace")
        with os.fdopen(descriptor, mode, encoding=encoding, errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_current_umask())
        os.replace(temporary, path)
        if os.name == "posix":  # let the new name survive a power failure
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise cannot_write(path, error, "; nothing was changed") from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def check_writable(path: str | Path) -> None:
    """Raise the error of a later :func:`atomic_write`, before a long computation. Write nothing."""
    path = Path(path)
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def _current_umask() -> int:
    """Return the umask: mkstemp creates files for the owner only, a result has the usual permissions."""
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


def json_values(value: Any, not_finite: Callable[[float], Any] = lambda number: None) -> Any:
    """Return a copy of nested values that JSON can hold, with text as keys and for objects of other types.

    Args:
        value: mappings, sequences and plain values.
        not_finite: gives the stand-in for nan and infinities, which JSON lacks; null by default.
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(item, not_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item, not_finite) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    return value if isinstance(value, str | int | float | None) else str(value)

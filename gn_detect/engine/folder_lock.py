"""The lock of a run's folder, into which one training at a time writes."""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from ..errors import UserError

# The file in a run's folder. It stays when the run ends: only the kernel's lock on it means anything.
LOCK = ".lock"

# Time after which all processes of a killed run have ended, data-loader workers too.
PATIENCE_SECONDS = 6.0
_RETRY_SECONDS = 0.1

logger = logging.getLogger(__name__)

_held: set[int] = set()  # descriptors of locks; a fork copies them, and the lock with them


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    # A data-loader worker that outlives its killed parent must not hold the folder.
    os.register_at_fork(after_in_child=_close_in_child)


class FolderLock:
    """The kernel's lock on a file of the folder, held by the first process of a training.

    The kernel releases it when the process ends, even when it is killed, so a file that a killed run left
    locks nothing, and no lock is broken by its age. filelock is not used: its older versions take every error
    for a lock of somebody else, and its newer ones fall back to the mere existence of the file.

    Args:
        folder: ``OUTPUT_DIR``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self._path = Path(folder), Path(folder) / LOCK
        self._descriptor, self._links = -1, 0
        self.is_held = False

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def take(self, patience: float = PATIENCE_SECONDS) -> None:
        """Lock the folder, which must exist; a second call changes nothing.

        On a file system without locks, warn and go on.

        Args:
            patience: seconds to wait for another process.

        Raises:
            UserError: another training holds the lock.
        """
        if self._descriptor >= 0:
            return
        end, announced = time.monotonic() + patience, False
        while True:
            try:
                self._descriptor = _open(self._path)
                _held.add(self._descriptor)
                self.is_held = _try_lock(self._descriptor)
            except OSError as error:
                reason = error.strerror or str(error)
                logger.warning("cannot lock %s (%s): see to it that no other run uses it", self._path, reason)
                break
            if self.is_held and self.is_there():
                break
            refused = not self.is_held  # else the file was deleted between the two calls
            self.release()
            if refused and time.monotonic() >= end:
                raise UserError(
                    "folder-in-use",
                    f"OUTPUT_DIR {self.folder} is in use by another training ({_holder(self._path)}); wait "
                    "for its end or stop it, or give this run another OUTPUT_DIR",
                )
            if refused and not announced:
                logger.info("%s is in use by another training; waiting a moment for its end", self.folder)
                announced = True
            time.sleep(_RETRY_SECONDS)
        if self._descriptor < 0:
            return
        self._links = os.fstat(self._descriptor).st_nlink
        if self.is_held:
            _sign(self._descriptor)

    def is_there(self) -> bool:
        """Return whether the locked file is still in the folder; False once somebody deleted it."""
        if self._descriptor < 0:
            return self.folder.is_dir()
        was_deleted = self._links > 0 and os.fstat(self._descriptor).st_nlink == 0
        return self._path.exists() and not was_deleted

    def release(self) -> None:
        if self._descriptor in _held:  # not in a process that was forked, which has closed it
            _held.remove(self._descriptor)
            os.close(self._descriptor)
        self._descriptor, self._links, self.is_held = -1, 0, False


def is_in_use(folder: str | Path) -> bool:
    """Return whether a training holds the lock of ``folder``; False where the system cannot say.

    This tries a shared lock, so that two callers at once do not take each other for a training.
    """
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        return not _try_lock(descriptor, shared=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    """Open the file to lock. Another user's file may be readable only, which is enough for the kernel."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)


def _try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file until it is closed; return False if another process holds the lock.

    A shared lock, which Windows lacks, allows other shared ones. A file system without locks raises OSError.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # after the text, which others may read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    except NotImplementedError as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    return True


def _sign(descriptor: int) -> None:
    """Write the holder's process and host, for the message of other processes."""
    text = f"process {os.getpid()} on {socket.gethostname()}\n"
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text.encode())
    except OSError:  # the disk is full: the next write reports it
        pass


def _holder(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(300).decode("ascii", "replace").strip()
    except OSError:
        text = ""
    return text if re.fullmatch(r"process \d+ on [\w.-]+", text) else "of an unknown process"

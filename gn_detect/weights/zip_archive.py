"""Checkpoints that are zip archives: PyTorch's, and NumPy's ``.npz``."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import UserError
from .numpy_pickle import check_pickle

MAX_RATIO = 50  # of unpacked arrays to packed ones; weights hardly shrink at all
_SMALL = 1 << 24  # bytes; an unpacked archive of that size does no harm

_SEAL = b"gn_detect blake2b "
_DIGEST_BYTES = 16
_SEAL_LENGTH = len(_SEAL) + 2 * _DIGEST_BYTES
_LENGTH_BYTES = 2  # a zip archive's comment is preceded by its length
_END, _END_LENGTH = b"PK\x05\x06", 22  # signature and bytes of a zip archive's last record before the comment


class SealedFile:
    """Writes a zip archive without a comment to a file; :meth:`seal` adds a digest of all bytes as a comment.

    An archive's own sums cover the content of its records, not their names, sizes and padding.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._held = file, b""
        self._digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)

    def write(self, data: bytes | memoryview) -> int:
        """Write all but the last bytes so far: they may be the comment's length, which changes."""
        size = len(data)
        if size < _LENGTH_BYTES:
            data = self._held + bytes(data)
        else:
            self._put(self._held)
        whole = max(len(data) - _LENGTH_BYTES, 0)
        self._put(data[:whole])
        self._held = bytes(data[whole:])
        return size

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def seal(self) -> None:
        """Complete the archive."""
        self._digest.update(self._held)
        self._file.write(_SEAL_LENGTH.to_bytes(_LENGTH_BYTES, "little") + _SEAL)
        self._file.write(self._digest.hexdigest().encode())

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)


def _check_seal(path: Path) -> bool:
    """Compare a file with its digest, and return whether it has one.

    Raises:
        UserError: they differ, or the file was cut off within its comment, which zipfile does not mind.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END) - _SEAL_LENGTH - _LENGTH_BYTES
        if size < 0:
            return False
        file.seek(max(0, size - _END_LENGTH))
        _, end, rest = file.read().rpartition(_END)
        length = int.from_bytes(rest[_END_LENGTH - len(_END) - _LENGTH_BYTES :][:_LENGTH_BYTES], "little")
        if end and len(rest) - (_END_LENGTH - len(_END)) < length:
            raise UserError(
                "damaged-weights", f"cannot read {path}: its end is missing; copy or download it again"
            )
        file.seek(size)
        sealed_length, seal = file.read(_LENGTH_BYTES), file.read()
        if not seal.startswith(_SEAL):
            return False
        file.seek(0)
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        while size:
            chunk = file.read(min(size, 1 << 20))
            digest.update(chunk)
            size -= len(chunk)
    digest.update(bytes(_LENGTH_BYTES))
    whole = int.from_bytes(sealed_length, "little") == _SEAL_LENGTH
    if not whole or seal.removeprefix(_SEAL) != digest.hexdigest().encode():
        raise UserError(
            "damaged-weights",
            f"{path} is damaged: its content is not what was written; copy or download it again",
        )
    return True


def is_npz(path: Path) -> bool:
    """Check a zip archive, and return whether it holds NumPy arrays; otherwise it is PyTorch's.

    Raises:
        UserError: neither, damaged, or made to unpack to more than it holds.
        pickle.UnpicklingError: a pickle of PyTorch's that would make Python fail.
        Exception: damaged archives fail in many ways.
    """
    sealed = _check_seal(path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if entries and all(entry.filename.endswith(".npy") for entry in entries):
            return True  # reading compares the sums
        _check_torch(path, archive, entries)
        # The records' own sums, which torch.load does not read.
        if not sealed and (damaged := archive.testzip()) is not None:
            raise UserError("damaged-weights", f"{path} is damaged at {damaged}; copy or download it again")
        return False


def _check_torch(path: Path, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if not pickles:
        raise UserError(
            "not-weights", f"{path} is a zip archive, but neither of PyTorch nor of NumPy; unpack it"
        )
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UserError(
            "not-weights", f"{path} is a TorchScript program, which is not run; save its state dict instead"
        )
    # torch.save stores without compression, so the parts are no larger than the file.
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(
            "unsafe-file", f"refused to read {path}: it unpacks to more than PyTorch would have stored in it"
        )
    for entry in pickles:
        check_pickle(archive.read(entry))


def read_npz(path: Path) -> dict[str, Any]:
    """Read arrays by name (of tensorpack or BiT, for example); nothing is unpickled.

    Raises:
        UserError: made to unpack to more than it holds.
        Exception: arrays of other things than numbers; damaged archives fail in many ways.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > max(_SMALL, MAX_RATIO * path.stat().st_size):
            raise UserError("unsafe-file", f"refused to read {path}: it unpacks to {total} bytes")
        return {entry.filename.removesuffix(".npy"): _read_array(archive.read(entry)) for entry in entries}


def _read_array(data: bytes) -> np.ndarray:
    # ValueError for objects, and for a header that promises more than there is.
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"an array of format {version}")
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of type {dtype}, and only numbers are read (nothing was run)")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    file.seek(0)
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array

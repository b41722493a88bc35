"""Checkpoints that are zip archives: PyTorch's, and NumPy's ``.npz``."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

MAX_RATIO = 50
"""Of an unpacked array to the packed one; weights hardly shrink at all."""

_SMALL = 1 << 20
"""Bytes; what is no larger unpacked does no harm."""


def is_npz(path: Path) -> bool:
    """Whether a zip archive holds NumPy arrays; otherwise it is PyTorch's, and has been checked.

    Raises:
        UserError: neither, damaged, or made to unpack to more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"cannot read {path}: {error}; the file may be truncated: copy or download it again"
        ) from error
    if entries and all(entry.filename.endswith(".npy") for entry in entries):
        return True
    if not any(entry.filename.endswith("data.pkl") for entry in entries):
        raise UserError(f"{path} is a zip archive, but neither of PyTorch nor of NumPy; unpack it")
    # torch.save stores without compression, so the parts are no larger than the file.
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"refused to read {path}: it unpacks to more than PyTorch would have stored in it")
    return False


def read_npz(path: Path) -> dict[str, Any]:
    """Arrays by name (of tensorpack or BiT, for example); nothing is unpickled."""
    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.file_size > max(_SMALL, MAX_RATIO * entry.compress_size):
                    raise UserError(
                        f"refused to read {path}: {entry.filename} unpacks to {entry.file_size} bytes"
                    )
                arrays[entry.filename.removesuffix(".npy")] = _read_array(archive.read(entry))
    except (zipfile.BadZipFile, OSError, ValueError, EOFError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"cannot read {path} as .npz: {error}; copy or download it again") from error
    return arrays


def _read_array(data: bytes) -> np.ndarray:
    """Raises ValueError for objects, and for a header that promises more than there is."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"an array of format {version}")
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which would be unpickled")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    file.seek(0)
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array

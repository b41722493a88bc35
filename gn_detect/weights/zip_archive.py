"""Checkpoints that are zip archives: PyTorch's, and NumPy's ``.npz``."""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .pickle_check import check_pickle

MAX_RATIO = 50
"""Of unpacked arrays to packed ones; weights hardly shrink at all."""

_SMALL = 1 << 24
"""Bytes; what is no larger unpacked does no harm."""


def is_npz(path: Path) -> bool:
    """Whether a zip archive holds NumPy arrays; otherwise it is PyTorch's, and has been checked.

    Raises:
        UserError: neither, damaged, or made to unpack to more than it holds.
        pickle.UnpicklingError: a pickle of PyTorch's that would make Python fail.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if entries and all(entry.filename.endswith(".npy") for entry in entries):
                return True
            _check_torch(path, archive, entries)
            return False
    except (UserError, pickle.UnpicklingError):
        raise
    except Exception as error:  # damaged archives fail in many ways
        raise UserError(
            f"cannot read {path}: {error}; the file may be truncated: copy or download it again"
        ) from error


def _check_torch(path: Path, archive: zipfile.ZipFile, entries: list[zipfile.ZipInfo]) -> None:
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if not pickles:
        raise UserError(f"{path} is a zip archive, but neither of PyTorch nor of NumPy; unpack it")
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UserError(f"{path} is a TorchScript program, which is not run; save its state dict instead")
    # torch.save stores without compression, so the parts are no larger than the file.
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"refused to read {path}: it unpacks to more than PyTorch would have stored in it")
    for entry in pickles:
        check_pickle(archive.read(entry))


def read_npz(path: Path) -> dict[str, Any]:
    """Arrays by name (of tensorpack or BiT, for example); nothing is unpickled.

    Raises:
        UserError: damaged, arrays of other things than numbers, or made to unpack to more than it holds.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > max(_SMALL, MAX_RATIO * path.stat().st_size):
                raise UserError(f"refused to read {path}: it unpacks to {total} bytes")
            return {
                entry.filename.removesuffix(".npy"): _read_array(archive.read(entry)) for entry in entries
            }
    except UserError:
        raise
    except Exception as error:  # damaged archives fail in many ways
        raise UserError(
            f"cannot read {path} as .npz: {_first_line(error)}; copy or download it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


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
    if dtype.kind not in "biuf":
        raise ValueError(f"an array of type {dtype}, and only numbers are read (nothing was run)")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    file.seek(0)
    array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    return array

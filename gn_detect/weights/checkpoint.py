"""Reading and writing checkpoint files. A file is data: nothing in it is ever run."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import UserError
from ..files import atomic_write
from .numpy_pickle import RefusedGlobal, load_numpy_pickle

MODEL_KEYS = ("model", "state_dict", "model_state", "model_state_dict", "blobs")
"""Where checkpoints of training programs keep the weights; the first that is a dict is read."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Added by DistributedDataParallel, torch.compile and Lightning; removed where all names have it."""

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch's magic number, pickled
_HDF5 = b"\x89HDF"
_FETCH_AGAIN = "the file may be truncated: copy or download it again"


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        tensors: weights by name, on the CPU, in the file's data types, wrapper prefixes removed.
        metadata: everything beside the weights: iteration, optimiser state, ...
        format: ``"pytorch"``, ``"safetensors"`` or ``"pickle"``.
        path: the file, for messages.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    format: str = "pytorch"
    path: Path = Path("checkpoint")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read ``.pth``/``.pt`` (zip or legacy), ``.safetensors`` or ``.pkl`` by what the file contains.

    ``{"model": ...}``, ``{"state_dict": ...}``, ``{"model_state": ...}``, ``{"blobs": ...}`` and a plain dict
    of tensors are recognised; what is not a tensor or a NumPy array goes to ``metadata``.

    Raises:
        UserError: no such file, a URL or zoo name, truncated or of another format, without tensors, or naming
            classes or functions other than tensors, arrays and containers; none of them is called.
    """
    path = _existing_file(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if head.startswith((_ZIP, _TORCH_LEGACY)):
        content, kind = _read_torch(path), "pytorch"
    elif head[8:9] == b"{":
        content, kind = _read_safetensors(path), "safetensors"
    elif head.startswith(_HDF5):
        raise UserError(f"{path} is an HDF5 file; export its weights to .pth, .safetensors or .pkl")
    elif not head:
        raise UserError(f"{path} is empty; copy or download it again")
    elif head.startswith(b"\x80") or path.suffix == ".pkl":
        content, kind = _read_pickle(path), "pickle"
    else:
        raise UserError(f"{path} is not a .pth, .safetensors or .pkl checkpoint; {_FETCH_AGAIN}")
    tensors, metadata = _split(content, path)
    return Checkpoint(_strip_wrappers(tensors), metadata, kind, path)


def save_weights(
    path: str | Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a checkpoint that :func:`read_checkpoint` and detectron2 read; the file is whole or absent.

    Args:
        path: ends in ``.pth`` or ``.pt`` (a dict ``{"model": state_dict, **metadata}``) or ``.safetensors``
            (metadata as JSON).
        state_dict: tensors by name, on any device.
        metadata: more to store; for ``.pth``, anything that ``torch.load(weights_only=True)`` reads, such as
            optimiser states; for ``.safetensors``, JSON values.

    Raises:
        UserError: another ending, metadata that the format cannot hold, or the disk is full or read-only.
    """
    path, metadata = Path(path), dict(metadata or {})
    if path.suffix not in (".pth", ".pt", ".safetensors"):
        raise UserError(f"cannot save weights as {path}: end the name in .pth or .safetensors")
    if "model" in metadata:
        raise UserError(f"cannot save {path}: the metadata key 'model' is taken by the weights; rename it")
    tensors = {name: tensor.detach().cpu() for name, tensor in state_dict.items()}
    if path.suffix == ".safetensors":
        try:
            header = {key: json.dumps(value) for key, value in metadata.items()}
        except (TypeError, ValueError) as error:
            raise UserError(f"cannot save {path}: {error}; save as .pth or leave it out") from error
        # Tied tensors may not share memory in this format, and views must be dense.
        dense = torch.contiguous_format
        copies = {name: tensor.clone(memory_format=dense) for name, tensor in tensors.items()}
        content = safetensors.torch.save(copies, header)
        with atomic_write(path, "wb") as file:
            file.write(content)
        return
    try:
        with atomic_write(path, "wb") as file:
            torch.save({"model": tensors, **metadata}, file)
    except RuntimeError as error:  # torch's writer reports a full disk so
        raise UserError(f"cannot write {path}: {_first_line(error)}; is the disk full?") from error


def _existing_file(path: str | Path) -> Path:
    if re.match(r"[A-Za-z][\w+.-]*://", str(path)):
        raise UserError(
            f"cannot load weights from {path}: there is no download and no model zoo yet; "
            f"fetch the file yourself and give its path as MODEL.WEIGHTS"
        )
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot load weights from {path}: it is a folder; give a file inside it")
    if not path.is_file():
        raise UserError(f"cannot load weights from {path}: no such file; check MODEL.WEIGHTS")
    return path


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            raise UserError(f"cannot read {path}: {_first_line(error)}; {_FETCH_AGAIN}") from error
        raise _refusal(path, refused[1].rstrip(".")) from error
    except Exception as error:  # truncated or damaged archives fail in many ways
        raise UserError(f"cannot read {path} with PyTorch: {_first_line(error)}; {_FETCH_AGAIN}") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            content: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}
            header = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path} as safetensors: {_first_line(error)}; {_FETCH_AGAIN}") from error
    return {**{key: _from_json(text) for key, text in header.items() if key not in content}, **content}


def _from_json(text: str) -> Any:
    """Our own metadata are JSON; other programs write plain strings."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return load_numpy_pickle(file)
    except RefusedGlobal as error:
        raise _refusal(path, error.name) from error
    except (pickle.UnpicklingError, OSError) as error:
        raise UserError(f"cannot read {path} as a pickle: {_first_line(error)}; {_FETCH_AGAIN}") from error


def _refusal(path: Path, name: str) -> UserError:
    return UserError(
        f"refused to read {path}: it names {name!r}, and a checkpoint may hold only tensors, arrays and "
        f"plain containers (nothing was run); save its state dict alone with torch.save"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def _split(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and the rest. Raises UserError when there are no weights."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors; save a state dict")
    # A weight may itself be called "model": only a dict is a container of weights.
    container = next((key for key in MODEL_KEYS if isinstance(content.get(key), dict)), None)
    weights = content if container is None else content[container]
    metadata = {} if container is None else {str(k): v for k, v in content.items() if k != container}
    tensors: dict[str, Tensor] = {}
    for key, value in weights.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        elif isinstance(value, np.ndarray):
            tensors[str(key)] = _as_tensor(value, key, path)
        elif container is None:
            metadata[str(key)] = value
    if not tensors:
        keys = ", ".join(repr(key) for key in list(weights)[:3]) or "none"
        raise UserError(f"{path} holds no tensors (keys: {keys}); give a checkpoint with a state dict")
    return tensors, metadata


def _as_tensor(array: np.ndarray, key: Any, path: Path) -> Tensor:
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UserError(f"{path}: {key!r} is {array.dtype}, not a type of PyTorch; store float32") from error


def _strip_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove prefixes that every name has, repeatedly: wrappers nest."""
    for prefix in WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors

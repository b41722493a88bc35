"""Reading and writing checkpoint files. A file is data: nothing in it is ever run."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..config import load_config
from ..errors import UserError
from ..files import atomic_write, cannot_write
from .convention import InputConvention
from .hub import CONFIG, is_hub, pull, shared_record
from .metadata import CheckpointMetadata, read_metadata, signature
from .mmdetection_config import norm_entries, standardised_by_config
from .numpy_pickle import RefusedPickle, check_pickle, load_numpy_pickle
from .stand_ins import STAND_INS, is_stand_in, known_to_torch, without_stand_ins
from .zip_archive import SealedFile, is_npz, read_npz
from .zoo import entry_of, resolve

T = TypeVar("T")

# The keys of the weights in files of training programs; the first one that holds a dict is read.
MODEL_KEYS = (
    "state_dict_ema", "model_ema",  # averaged weights are those meant for use
    "state_dict", "ema_state_dict",  # MMEngine swaps them: where both are there, the first is the average
    "model", "model_state", "model_state_dict", "blobs",
)  # fmt: skip
SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors")  # of files that can be written
# Added by DistributedDataParallel, torch.compile and Lightning; removed where all names have it.
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.")
_COUNTERS = {"steps", "n_averaged"}  # mmdetection's and PyTorch's number of updates of averaged weights

_ZIP = b"PK\x03\x04"
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch's magic number, pickled
_LEGACY_PICKLES = 5  # magic number, version, platform, content, keys of the storages that follow
# Files that are taken for a checkpoint by mistake, by their first bytes.
_OTHERS = {
    b"\x89HDF": "an HDF5 file; export its weights to .pth, .safetensors or .pkl",
    b"\x1f\x8b": "compressed with gzip; unpack it with gunzip",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it with git lfs pull",
    b"<": "a web page or XML, perhaps a server's message instead of the file; download it again",
    b"{": "JSON, and holds no weights; give a checkpoint",
}

_FETCH_AGAIN = "the file may be truncated: copy or download it again"


@dataclass
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        tensors: weights by name, on the CPU, in the file's data types, wrapper prefixes removed.
        metadata: everything besides the weights.
        format: ``"pytorch"``, ``"safetensors"``, ``"pickle"`` or ``"npz"``.
        path: the file, for messages.
        stored: the same weights by the file's own names, with wrapper prefixes and counters of averaging.
    """

    tensors: dict[str, Tensor]
    metadata: CheckpointMetadata = field(default_factory=CheckpointMetadata)
    format: str = "pytorch"
    path: Path = Path("checkpoint")
    stored: dict[str, Tensor] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read ``.pth``/``.pt`` (zip or legacy), ``.safetensors``, ``.pkl`` or ``.npz``, recognised by content.

    The weights are a plain dict of tensors, or stand under one of :data:`MODEL_KEYS`; the rest is metadata.
    Of ``hf://USER/REPO`` only ``model.safetensors`` and ``config.json`` are read, see :mod:`.hub`.

    Raises:
        UserError: no such file, a failed download, truncated or of another format, without tensors, or naming
            classes or functions other than tensors, arrays and containers; none of them is called.
    """
    entry, pulled = entry_of(path), None
    if is_hub(path):
        path, pulled = pull(path)
    else:
        path = resolve(path)
    if path.is_dir():
        raise UserError(
            "missing-weights", f"cannot load weights from {path}: it is a folder; give a file inside it"
        )
    if not path.is_file():
        raise UserError(
            "missing-weights",
            f"cannot load weights from {path}: no such file; check MODEL.WEIGHTS, or give zoo://NAME of "
            "gn-detect zoo list",
        )
    content, kind = _read(path) if pulled is None else (_read_safetensors(path), "safetensors")
    stored, others = _split(content, path, nested=kind != "safetensors")
    try:
        others = without_stand_ins(others)
    except RecursionError:
        raise _refusal(path, "it holds containers nested by the thousand") from None
    tensors = strip_wrappers(stored)
    metadata = read_metadata(norm_entries(others, tensors) | others, path)
    if pulled is not None:
        metadata = shared_record(metadata, path.with_name(CONFIG), pulled)
    if entry is not None:  # the catalogue knows better than the names what the weights were trained with
        cfg = load_config(entry.config, entry.overrides)
        convs = metadata.weight_standardization or standardised_by_config(cfg, tensors)
        convention = InputConvention.of_config(cfg)
        metadata = replace(metadata, input=convention, weight_standardization=convs)
    return Checkpoint(tensors, metadata, kind, path, stored)


def save_weights(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    metadata: CheckpointMetadata | Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint that :func:`read_checkpoint` and detectron2 read; the file is whole or absent.

    Args:
        path: ends in ``.pth`` or ``.pt`` (a dict ``{"model": state_dict, **metadata}``), ``.pkl`` (the same
            with NumPy arrays, as detectron2's model zoo has it) or ``.safetensors`` (metadata as JSON).
        state_dict: tensors by name, on any device.
        metadata: a record, or entries by key: for ``.pth``, anything that ``torch.load(weights_only=True)``
            reads, such as optimiser states; otherwise JSON values.

    Raises:
        UserError: another ending, metadata or a type that the format cannot hold, or the disk is full or
            read-only.
    """
    path = Path(path)
    content = metadata.to_dict() if isinstance(metadata, CheckpointMetadata) else dict(metadata or {})
    if path.suffix not in SUFFIXES:
        raise UserError(
            "wrong-ending", f"cannot save weights as {path}: end the name in {', '.join(SUFFIXES)}"
        )
    for key in MODEL_KEYS:  # read_checkpoint would take a dict there for the weights
        if key in content and (key == "model" or isinstance(content[key], dict)):
            raise UserError(
                "bad-argument", f"cannot save {path}: the metadata key '{key}' is taken by weights; rename it"
            )
    content = {key: _without_numpy(value) for key, value in content.items()} | signature()
    tensors = {name: _whole(tensor.detach().cpu()) for name, tensor in state_dict.items()}
    if path.suffix in (".safetensors", ".pkl"):
        convert = _as_pickle if path.suffix == ".pkl" else _as_safetensors
        data = convert(path, tensors, content)
        with atomic_write(path, "wb") as file:
            file.write(data)
    else:
        try:
            with atomic_write(path, "wb") as file:
                sealed = SealedFile(file)
                torch.save({"model": tensors, **content}, sealed)  # type: ignore[arg-type]  # only written to
                sealed.seal()
        except RuntimeError as error:  # torch's writer hides what the system said
            if not isinstance(error.__context__, OSError):
                raise
            raise cannot_write(path, error.__context__, "; nothing was changed") from error


def _whole(tensor: Tensor) -> Tensor:
    # A view of a part is stored alone, and an expanded tensor, which would be refused, in full.
    is_view = tensor.layout == torch.strided and (
        tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    )
    return tensor.clone(memory_format=torch.contiguous_format) if is_view else tensor


def _without_numpy(value: Any) -> Any:
    # NumPy's scalars become Python's: a file that names NumPy's functions is refused when it is read.
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {_without_numpy(key): _without_numpy(item) for key, item in value.items()}
    return type(value)(map(_without_numpy, value)) if type(value) in (list, tuple) else value


def _as_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    try:
        header = {key: json.dumps(value) for key, value in metadata.items()}
    except (TypeError, ValueError) as error:
        raise UserError(
            "wrong-ending", f"cannot save {path}: {error}; save as .pth or leave it out"
        ) from error
    # Tied tensors may not share memory in this format, and views must be dense.
    dense = torch.contiguous_format
    copies = {name: tensor.clone(memory_format=dense) for name, tensor in tensors.items()}
    return safetensors.torch.save(copies, header)


def _as_pickle(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    # Without ``matching_heuristics``, detectron2 takes the names as they are.
    try:
        json.dumps(metadata)  # the reader's restrictions, nearly
        arrays = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
    except (TypeError, ValueError) as error:
        raise UserError("wrong-ending", f"cannot save {path}: {error}; save as .pth") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}  # 0-dimensional ones became (1,)
    arrays = {name: array.reshape(shapes[name]) for name, array in arrays.items()}
    return pickle.dumps({"model": arrays, **metadata}, protocol=2)


def _read(path: Path) -> tuple[Any, str]:
    """Return the content of a file, and its format."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            size = file.seek(0, 2)
    except OSError as error:
        raise UserError("cannot-read", f"cannot read {path}: {error.strerror}") from error
    if head.startswith((_ZIP, _TORCH_LEGACY)):
        with _reading(path):
            if head.startswith(_TORCH_LEGACY):
                with path.open("rb") as file:
                    for _ in range(_LEGACY_PICKLES):
                        check_pickle(file)
            elif is_npz(path):
                with _reading(path, " as .npz"):
                    return read_npz(path), "npz"
        return _read_torch(path), "pytorch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors(path), "safetensors"
    if head.startswith((b"\x80", b"(", b"}", b"]")) or path.suffix == ".pkl":  # b"\x80": protocol 2 and on
        with _reading(path, " as a pickle"), path.open("rb") as file:
            return load_numpy_pickle(file, STAND_INS), "pickle"
    for start, remedy in _OTHERS.items():
        if head.lstrip().startswith(start):
            raise UserError("not-weights", f"{path} is {remedy}")
    if not head:
        raise UserError("damaged-weights", f"{path} is empty; copy or download it again")
    raise UserError(
        "not-weights", f"{path} is not a .pth, .safetensors, .pkl or .npz checkpoint; {_FETCH_AGAIN}"
    )


@contextmanager
def _reading(path: Path, how: str = "") -> Iterator[None]:
    """Turn all errors into a UserError: damaged files fail in many ways."""
    try:
        yield
    except UserError:
        raise
    except RefusedPickle as error:
        raise _refusal(path, str(error)) from error
    except Exception as error:
        raise UserError(
            "damaged-weights", f"cannot read {path}{how}: {_first_line(error)}; {_FETCH_AGAIN}"
        ) from error


def _read_torch(path: Path) -> Any:
    with _reading(path, " with PyTorch"), known_to_torch():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            if refused is not None:
                raise _refusal(path, f"it names {refused[1].rstrip('.')!r}") from error
            reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # after much advice
            text = _first_line(error) if reason is None else reason[1].rstrip(". ")
            raise UserError("damaged-weights", f"cannot read {path}: {text}; {_FETCH_AGAIN}") from error


def _read_safetensors(path: Path) -> dict[str, Any]:
    with _reading(path, " as safetensors"), safetensors.safe_open(path, framework="pt", device="cpu") as file:
        names = file.keys()  # the file itself cannot be iterated over
        tensors: dict[str, Any] = {name: file.get_tensor(name) for name in names}
        header = file.metadata() or {}
    return {key: _from_json(text) for key, text in header.items()} | tensors


def _from_json(text: str) -> Any:
    try:  # our own metadata are JSON; other programs write plain strings
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(
        "unsafe-file",
        f"refused to read {path}: {reason}, and a checkpoint may hold only tensors, arrays and "
        f"plain containers (nothing was run); save its state dict alone with torch.save",
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].partition(". ")[0].rstrip(".") if text else type(error).__name__


def _split(content: Any, path: Path, nested: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights, which may be ``nested`` in a dict, and the rest."""
    if not isinstance(content, dict):
        raise UserError(
            "not-weights",
            f"{path} holds a {type(content).__name__}, not a dict of tensors; save a state dict",
        )
    # A weight may itself be called "model": only a dict is a container of weights.
    containers = (key for key in MODEL_KEYS if nested and isinstance(content.get(key), dict))
    container = next(containers, None)
    weights = content if container is None else content[container]
    metadata = {} if container is None else {str(k): v for k, v in content.items() if k != container}
    tensors: dict[str, Tensor] = {}
    for key, value in weights.items():
        if is_stand_in(key) or (container is not None and is_stand_in(value)):
            raise _refusal(path, f"its weights hold {str(key)!r}, an object of another library")
        if isinstance(value, Tensor):
            tensors[str(key)] = _checked(value.detach(), key, path)
        elif isinstance(value, np.ndarray):
            tensors[str(key)] = _as_tensor(value, key, path)
        elif container is None:
            metadata[str(key)] = value
    if not tensors:
        keys = ", ".join(repr(key) for key in list(weights)[:3]) or "none"
        raise UserError(
            "not-weights", f"{path} holds no tensors (keys: {keys}); give a checkpoint with a state dict"
        )
    odd = next((name for name in tensors if not name.isprintable()), None)
    if odd is not None:
        raise UserError("not-weights", f"{path}: {odd!r} is no name of a tensor; save the state dict again")
    return tensors, metadata


def _checked(tensor: Tensor, key: Any, path: Path) -> Tensor:
    # A file can describe a tensor of terabytes that all lie on one stored number.
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise UserError("not-weights", f"{path}: {key!r} is not a dense tensor; store dense weights")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(
            "unsafe-file",
            f"refused to read {path}: {key!r} has shape {tuple(tensor.shape)}, more than is stored",
        )
    return tensor


def _as_tensor(array: np.ndarray, key: Any, path: Path) -> Tensor:
    if not array.dtype.isnative:  # written on another machine
        array = array.astype(array.dtype.newbyteorder("="))
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UserError(
            "not-weights", f"{path}: {key!r} is {array.dtype}, not a type of PyTorch; store float32"
        ) from error


def strip_wrappers(tensors: dict[str, T]) -> dict[str, T]:
    """Remove the prefixes that every name has, repeatedly: wrappers nest. Counters of averaging go."""
    if any(name.startswith(WRAPPER_PREFIXES) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in _COUNTERS}
    for prefix in WRAPPER_PREFIXES * 2:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return tensors

"""Stand-ins for harmless objects in checkpoints: a run's log, options, configs, NumPy's numbers.

Training programs store them with the weights. Nothing of theirs is imported: each exact name below means
a class of our own, which keeps the values that a pickle gives it and does nothing. Any other name is refused.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from .numpy_pickle import ArrayStandIn, DtypeStandIn, array_from_bytes


class StandIn:
    """An object of another library. It holds its state, of which nothing is an attribute here."""

    __slots__ = ("state",)
    state: Any
    name: ClassVar[str]  # ``module.class`` of the object

    def __new__(cls, *arguments: Any, **keywords: Any) -> StandIn:
        """Keep the state alone: the result of the real constructor is not known."""
        self = object.__new__(cls)
        self.state = None
        return self

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Ignore the arguments that the pickle gives to the constructor."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def content(self) -> Any:
        """Return the object's attributes, which may hold further stand-ins."""
        return dict(self.state) if isinstance(self.state, dict) else {}


class _Node(StandIn):
    """A value, a list or a dict of omegaconf: its content is kept, and not its types and parents."""

    __slots__ = ()

    def content(self) -> Any:
        state = self.state if isinstance(self.state, dict) else {}
        return state.get("_content", state.get("_val"))


class _PlainDict:
    """``collections.defaultdict``: a plain dict, so that the pickle can fill it."""

    def __new__(cls, *arguments: Any) -> Any:
        return {}


class _Dtype(DtypeStandIn):
    """``numpy.dtype``: of numbers and text."""

    __slots__ = ()
    kinds = "biufcUS"


class _Array:
    """``numpy.core.multiarray._reconstruct``: an empty array, whose content arrives as its state."""

    def __new__(cls, *arguments: Any) -> Any:
        return _NDARRAY()


class _Scalar:
    """``numpy.core.multiarray.scalar``: a number or text of Python."""

    def __new__(cls, dtype: Any = None, data: Any = b"") -> Any:
        if not isinstance(dtype, DtypeStandIn):
            raise pickle.UnpicklingError("a number of NumPy's without a type")
        return array_from_bytes(data, dtype).item()


_NUMBERS = (
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
    *("float16", "float32", "float64", "bool", "bool_", "str_", "bytes_"),
)
_DTYPES = (
    *(f"{kind}{bits}DType" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    *("Float16DType", "Float32DType", "Float64DType", "BoolDType", "StrDType", "BytesDType"),
)
_NODES = ("AnyNode", "BooleanNode", "BytesNode", "FloatNode", "IntegerNode", "StringNode", "UnionNode")
_TYPES = ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple", "long", "unicode")  # 2 of Python 2

_KINDS: dict[tuple[str, str], type] = {
    # mmengine: the log of a run.
    ("mmengine.logging.history_buffer", "HistoryBuffer"): StandIn,
    ("mmengine.logging.message_hub", "MessageHub"): StandIn,
    # Options of the command line.
    ("argparse", "Namespace"): StandIn,
    # omegaconf: configs, and the types that its nodes note.
    ("omegaconf.dictconfig", "DictConfig"): _Node,
    ("omegaconf.listconfig", "ListConfig"): _Node,
    **{("omegaconf.nodes", name): _Node for name in _NODES},
    ("omegaconf.base", "Metadata"): StandIn,
    ("omegaconf.base", "ContainerMetadata"): StandIn,
    **{("typing", name): StandIn for name in ("Any", "Dict", "List", "Tuple")},
    **{("builtins", name): StandIn for name in _TYPES},
    ("collections", "defaultdict"): _PlainDict,
    # NumPy's types. Its numbers and arrays are below: numpy_pickle has its own for them.
    **{("numpy", name): StandIn for name in _NUMBERS},
    **{("numpy.dtypes", name): StandIn for name in _DTYPES},
}
_NUMPY_KINDS: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
}


def _made(module: str, name: str, kind: type) -> type:
    """Return a class under the name of the original, by which PyTorch finds it."""
    attributes = {"__module__": module, "__qualname__": name, "__slots__": (), "name": f"{module}.{name}"}
    return type(name, (kind,), attributes)


STAND_INS: dict[tuple[str, str], type] = {key: _made(*key, kind) for key, kind in _KINDS.items()}

_NDARRAY = _made("numpy", "ndarray", ArrayStandIn)
_OF_TORCH: list[Any] = [
    _NDARRAY,
    *STAND_INS.values(),
    *(_made(*key, kind) for key, kind in _NUMPY_KINDS.items()),
    # Python 2's name, which protocol 2 writes.
    *(_made("__builtin__", name, StandIn) for module, name in _KINDS if module == "builtins"),
]


@contextlib.contextmanager
def known_to_torch() -> Iterator[None]:
    """Let ``torch.load(weights_only=True)`` make stand-ins of these names, and know no others."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(_OF_TORCH)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def is_stand_in(value: Any) -> bool:
    """Return whether a value, or a type, stands for an object of another library."""
    kinds = (StandIn, ArrayStandIn, DtypeStandIn)
    return isinstance(value, kinds) or (isinstance(value, type) and issubclass(value, kinds))


def without_stand_ins(value: Any) -> Any:
    """Replace the stand-ins in nested containers by plain values; dicts and lists stay the same objects.

    A namespace, a log and a config become dicts, lists and numbers; types become names.

    Raises:
        RecursionError: containers in containers by the thousand.
    """
    return _plain(value, {})


def _plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    # ``done`` keeps the values alive, so that no other gets their id.
    if id(value) in done:
        return done[id(value)][1]
    if isinstance(value, type):
        return getattr(value, "name", value.__name__) if is_stand_in(value) else value
    done[id(value)] = (value, value)
    new: Any = value
    if isinstance(value, StandIn):
        done[id(value)] = (value, value.name)  # where it holds itself
        new = _plain(value.content(), done)
    elif isinstance(value, ArrayStandIn):
        new = value.array
    elif isinstance(value, DtypeStandIn):
        new = str(value.dtype)
    elif isinstance(value, dict):
        for key, item in list(value.items()):
            if is_stand_in(key):
                del value[key]
                key = str(_plain(key, done))
            value[key] = _plain(item, done)
    elif isinstance(value, list):
        value[:] = [_plain(item, done) for item in value]
    elif isinstance(value, (tuple, set, frozenset)) and not isinstance(value, torch.Size):
        items = [_plain(item, done) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            new = tuple(items) if isinstance(value, tuple) else items
    done[id(value)] = (value, new)
    return new

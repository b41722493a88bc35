"""Reads pickles of NumPy arrays (Detectron, Caffe2 and detectron2 model zoos) without running what they name.

A pickle is a program: it names functions and calls them. Here every name it may use is replaced by a small
stand-in of our own, so that NumPy's unpickling code is not reached either; any other name is refused.
Files of NumPy 1 (``numpy.core``), NumPy 2 (``numpy._core``) and Python 2 are read.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

from .pickle_check import check_pickle

_MAX_SIZE = 1 << 40
"""Of one dimension, which may be too large for NumPy where another one is 0."""


class RefusedGlobal(pickle.UnpicklingError):
    """The pickle names something else than arrays and containers; ``name`` is ``module.attribute``."""

    def __init__(self, name: str) -> None:
        super().__init__(f"refused global {name}")
        self.name = name


def load_numpy_pickle(file: IO[bytes], stand_ins: Mapping[tuple[str, str], type] | None = None) -> Any:
    """Read one pickle of nested dicts, lists, tuples, numbers, strings and numeric NumPy arrays.

    Args:
        file: binary file at the pickle's start. Python 2 strings are decoded as latin-1.
        stand_ins: further classes by module and name, which the object may then hold.

    Returns:
        The object, with arrays as writable ``np.ndarray`` in native byte order.

    Raises:
        RefusedGlobal: the pickle names a class or function outside the list; nothing was called.
        pickle.UnpicklingError: the pickle is truncated, malformed, or holds arrays that are not numeric.
    """
    try:
        data = file.read()
        check_pickle(data, only_arrays=True)
        unpickler = _NumpyUnpickler(io.BytesIO(data), encoding="latin1")
        unpickler.stand_ins = stand_ins or {}
        return _plain(unpickler.load(), {})
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a malformed pickle can make any opcode fail in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


class _NumpyUnpickler(pickle.Unpickler):
    """Resolves the few allowed names to stand-ins."""

    stand_ins: Mapping[tuple[str, str], type]

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        allowed = _ALLOWED.get((module, name), self.stand_ins.get((module, name)))
        if allowed is None:
            raise RefusedGlobal(f"{module}.{name}")
        return allowed if isinstance(allowed, type | str) else _Function(allowed)


class _Function:
    """One of our functions in a pickle's hands, which may only call it.

    A pickle can set attributes on what it is given, and must not reach those of the function; nor could this
    be ``functools.partial``, which a pickle can make call itself for ever.
    """

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for a function")


class DtypeStandIn:
    """Stands in for ``np.dtype``: numbers and bools only, with a byte order."""

    kinds = "biuf"

    def __init__(self, code: str) -> None:
        if not isinstance(code, str):
            raise pickle.UnpicklingError("an array type that is not one of numbers")
        self.dtype = np.dtype(code)
        if self.dtype.kind not in self.kinds:
            raise pickle.UnpicklingError(f"an array of type {code!r}: only numbers are read")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class ArrayStandIn:
    """Stands in for ``np.ndarray`` while its shape, type and bytes arrive in ``__setstate__``."""

    array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran_order, data = state[-4:]
        self.array = array_from_bytes(data, dtype, shape, "F" if fortran_order else "C")


def array_from_bytes(
    data: bytes | bytearray | str, dtype: DtypeStandIn, shape: tuple[int, ...], order: str
) -> np.ndarray:
    """Return a writable array in native byte order; ``data`` is text where Python 2 wrote it.

    Raises:
        pickle.UnpicklingError: shape and type want another number of bytes.
    """
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)  # str: bytes written by Python 2
    if any(not 0 <= size <= _MAX_SIZE for size in shape) or math.prod(shape) * dtype.dtype.itemsize != len(
        raw
    ):
        raise pickle.UnpicklingError(f"an array of shape {shape} has {len(raw)} bytes")
    array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return np.array(array, dtype=dtype.dtype.newbyteorder("="), order="C")


def _make_dtype(code: str, align: bool = False, copy: bool = False) -> DtypeStandIn:
    return DtypeStandIn(code)


def _make_array(subtype: Any, shape: Any, code: Any) -> ArrayStandIn:
    return ArrayStandIn()


def _make_scalar(dtype: DtypeStandIn, data: bytes | str) -> np.ndarray:
    return array_from_bytes(data, dtype, (), "C")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes in protocols 0 to 2


def _bytes(data: Any = b"", encoding: str | None = None) -> bytes:
    """Never of a number, for which Python's own makes as many bytes."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray | list | tuple):
        raise pickle.UnpicklingError(f"bytes of {data!r}")
    return bytes(data)


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Replace the stand-ins in nested containers by what they stand for; what is shared stays shared."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, ArrayStandIn):
        if value.array is None:
            raise pickle.UnpicklingError("an array without data")
        return value.array
    if isinstance(value, DtypeStandIn):
        return value.dtype
    new: Any
    if isinstance(value, dict):
        new = done[id(value)] = {}
        new.update((key, _plain(item, done)) for key, item in value.items())
    elif isinstance(value, list):
        new = done[id(value)] = []
        new.extend(_plain(item, done) for item in value)
    elif isinstance(value, tuple):
        new = done[id(value)] = tuple(_plain(item, done) for item in value)
    else:
        new = value
    return new


_ALLOWED: dict[tuple[str, str], type | str | Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): _make_array,
    ("numpy.core.multiarray", "scalar"): _make_scalar,
    ("numpy.core.numeric", "_frombuffer"): array_from_bytes,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _make_dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}

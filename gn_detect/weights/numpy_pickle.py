"""Read pickles of NumPy arrays (Detectron, Caffe2 and detectron2 model zoos) without running what they name.

A pickle is a program: it names functions and calls them. Here every name that it may use is replaced by a
small stand-in of our own, so that NumPy's unpickling code is not reached either; any other name is refused.
Files of NumPy 1 (``numpy.core``), NumPy 2 (``numpy._core``) and Python 2 are read.

Before that, :func:`check_pickle` follows the instructions of a pickle without carrying them out. Neither this
unpickler nor PyTorch's with ``weights_only`` calls what a file names, but a hostile file could still make
Python itself fail: a memo index of billions reserves as much memory; tuples nested a million deep overflow
the stack when they are hashed, and tuples of the same tuples take for ever.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

import numpy as np

MAX_INSTRUCTIONS = 1_000_000  # the largest published checkpoints have some ten thousand
MAX_DEPTH = 64  # of containers in containers
MAX_VALUES = 50_000_000  # in one value, with those that it holds several times counted as often
_MAX_SIZE = 1 << 40  # of one dimension, which may be too large for NumPy where another one is 0

_REFUSED = {
    "PERSID": "a persistent id",
    "BINPERSID": "a persistent id",
    "EXT1": "a code of the extension registry",
    "EXT2": "a code of the extension registry",
    "EXT4": "a code of the extension registry",
    "NEXT_BUFFER": "a buffer outside the file",
    "READONLY_BUFFER": "a buffer outside the file",
}
_GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_STORES = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_FETCHES = {"GET", "BINGET", "LONG_BINGET"}


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[int, bool, list[bool]]:
    """Return how many values it pops, whether also those above a mark, and which pushed ones are marks."""
    mark, before = pickletools.markobject, list(opcode.stack_before)
    pops = before.index(mark) if mark in before else len(before)
    return pops, mark in before, [kind is mark for kind in opcode.stack_after]


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes}


class RefusedPickle(pickle.UnpicklingError):
    """Well-formed, but it names other things than arrays and containers, or no honest program wrote it."""


def load_numpy_pickle(file: IO[bytes], stand_ins: Mapping[tuple[str, str], type]) -> Any:
    """Read one pickle of nested dicts, lists, tuples, numbers, strings and numeric NumPy arrays.

    Args:
        file: binary file at the pickle's start. Python 2 strings are decoded as latin-1.
        stand_ins: further classes by module and name, which the object may then hold.

    Returns:
        The object, with arrays as writable ``np.ndarray`` in native byte order.

    Raises:
        RefusedPickle: the pickle names a class or function outside the list; nothing was called.
        pickle.UnpicklingError: the pickle is truncated, malformed, or holds arrays that are not numeric.
    """
    try:
        data = file.read()
        check_pickle(data, only_arrays=True)
        unpickler = _NumpyUnpickler(io.BytesIO(data), encoding="latin1")
        unpickler.stand_ins = stand_ins
        return _plain(unpickler.load(), {})
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a malformed pickle can make any opcode fail in any way
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error


def check_pickle(data: bytes | IO[bytes], *, only_arrays: bool = False) -> None:
    """Follow the instructions up to the first pickle's end, without carrying them out.

    Args:
        data: the pickle, or a file at its start, which is then read up to its end.
        only_arrays: refuse instructions that arrays in plain containers do not need, too.

    Raises:
        RefusedPickle: more, deeper or other instructions than a checkpoint needs.
        pickle.UnpicklingError: truncated or malformed.
    """
    follower = _Follower()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if number >= MAX_INSTRUCTIONS:
                raise RefusedPickle(f"it has more than {MAX_INSTRUCTIONS} instructions")
            if only_arrays and opcode.name in _REFUSED:
                raise RefusedPickle(f"it holds {_REFUSED[opcode.name]}")
            follower.follow(opcode.name, argument)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise pickle.UnpicklingError(f"a malformed pickle: {error}") from error


class _Value:
    """The depth of a value and the number of values in it; shared by all places that refer to it."""

    __slots__ = ("count", "depth")

    def __init__(self) -> None:
        self.depth, self.count = 1, 1

    def add(self, items: list[_Value]) -> None:
        for item in items:
            self.count += item.count
            if item.depth >= self.depth:
                self.depth = item.depth + 1
        if self.depth > MAX_DEPTH:
            raise RefusedPickle(f"it has containers nested more than {MAX_DEPTH} deep")
        if self.count > MAX_VALUES:
            raise RefusedPickle(f"it repeats values more than {MAX_VALUES} times")


class _Follower:
    """The unpickler's stack and memo, with None for marks."""

    def __init__(self) -> None:
        self.stack: list[_Value | None] = []
        self.marks = 0
        self.memo: dict[int, _Value] = {}

    def follow(self, name: str, argument: object) -> None:
        if name in _STORES:
            index = len(self.memo) if name == "MEMOIZE" else argument
            # Python numbers them one after the other, and reserves memory up to the largest.
            if not isinstance(index, int) or index > 2 * len(self.memo) + 16:
                raise RefusedPickle(f"it has a memo index of {index}")
            self.memo[index] = _value(self.stack[-1])
        elif name in _FETCHES:
            assert isinstance(argument, int)
            self.stack.append(self.memo[argument])
        elif name == "DUP":
            self.stack.append(_value(self.stack[-1]))
        else:
            self._apply(name)

    def _apply(self, name: str) -> None:
        popped: list[_Value] = []
        pops, from_mark, pushes = _EFFECTS[name]
        if from_mark or (name == "POP" and self.stack and self.stack[-1] is None):
            while (value := self.stack.pop()) is not None:
                popped.append(value)
            self.marks -= 1
            pops = 0 if name == "POP" else pops
        popped += [_value(self.stack.pop()) for _ in range(pops)]
        result = popped.pop() if name in _GROWING else _Value()
        if popped:
            result.add(popped)
        for is_mark in pushes:
            self.stack.append(None if is_mark else result)
            self.marks += is_mark
        if self.marks > MAX_DEPTH:  # containers whose ends are still to come
            raise RefusedPickle(f"it has containers nested more than {MAX_DEPTH} deep")


def _value(item: _Value | None) -> _Value:
    if item is None:
        raise ValueError("a mark where a value should be")
    return item


class _NumpyUnpickler(pickle.Unpickler):
    """Resolves the few allowed names to stand-ins."""

    stand_ins: Mapping[tuple[str, str], type]

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins")
        allowed = _ALLOWED.get((module, name), self.stand_ins.get((module, name)))
        if allowed is None:
            full = f"{module}.{name}"
            raise RefusedPickle(f"it names {full!r}")
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

    def __init__(self, code: str, align: Any = False, copy: Any = False) -> None:
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
    data: bytes | bytearray | str, dtype: DtypeStandIn, shape: tuple[int, ...] = (), order: str = "C"
) -> np.ndarray:
    """Return a writable array in native byte order; ``data`` is text where Python 2 wrote it.

    Raises:
        pickle.UnpicklingError: shape and type want another number of bytes.
    """
    raw = data.encode("latin1") if isinstance(data, str) else bytes(data)
    valid = all(0 <= size <= _MAX_SIZE for size in shape)
    if not valid or math.prod(shape) * dtype.dtype.itemsize != len(raw):
        raise pickle.UnpicklingError(f"an array of shape {shape} has {len(raw)} bytes")
    array = np.frombuffer(raw, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return np.array(array, dtype=dtype.dtype.newbyteorder("="), order="C")


def _bytes(data: Any = b"", encoding: str | None = None) -> bytes:
    """Never of a number, for which Python's own makes as many bytes."""
    if isinstance(data, str):
        return data.encode("latin1")
    if not isinstance(data, bytes | bytearray | list | tuple):
        raise pickle.UnpicklingError(f"bytes of {data!r}")
    return bytes(data)


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Replace the stand-ins of arrays and types in nested containers; shared values stay shared."""
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
    ("numpy.core.multiarray", "_reconstruct"): lambda subtype, shape, code: ArrayStandIn(),
    ("numpy.core.multiarray", "scalar"): lambda dtype, data: array_from_bytes(data, dtype),
    ("numpy.core.numeric", "_frombuffer"): array_from_bytes,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): lambda code, align=False, copy=False: DtypeStandIn(code),
    # How Python 3 writes bytes in protocols 0 to 2.
    ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "bytes"): _bytes,
    ("builtins", "bytearray"): _bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}

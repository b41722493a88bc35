"""Looks through a pickle before anything of it is carried out: size, depth and kind of its instructions.

Neither the unpickler of ``numpy_pickle`` nor PyTorch's with ``weights_only`` calls what a file names. What is
left to a hostile file is to make Python itself fail: a memo index of billions reserves as much memory; tuples
nested a million deep overflow the stack when they are hashed, and tuples of the same tuples take for ever.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import IO

MAX_INSTRUCTIONS = 1_000_000
"""The largest published checkpoints have some ten thousand."""

MAX_DEPTH = 64
"""Of containers in containers."""

MAX_VALUES = 50_000_000
"""In one value, with those that it holds several times counted as often."""

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


class RefusedPickle(pickle.UnpicklingError):
    """Well-formed, but no checkpoint of an honest program looks so."""


def check_pickle(data: bytes | IO[bytes], *, only_arrays: bool = False) -> None:
    """Follow the instructions up to the first pickle's end, without carrying them out.

    Args:
        data: the pickle, or a file that stands at its start and will stand behind its end.
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
            follower.follow(opcode, argument)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise pickle.UnpicklingError(f"a malformed pickle: {error}") from error


class _Value:
    """How deep a value is, and how many values it holds; shared by all places that refer to it."""

    def __init__(self, items: list[_Value]) -> None:
        self.depth, self.count = 0, 1
        self.add(items)

    def add(self, items: list[_Value]) -> None:
        self.depth = max(self.depth, 1 + max((item.depth for item in items), default=0))
        self.count += sum(item.count for item in items)
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

    def follow(self, opcode: pickletools.OpcodeInfo, argument: object) -> None:
        name = opcode.name
        if name in _STORES:
            index = len(self.memo) if name == "MEMOIZE" else argument
            # Python numbers them one after the other, and reserves memory up to the largest.
            if not isinstance(index, int) or index > 2 * len(self.memo) + 16:
                raise RefusedPickle(f"it has a memo index of {index}")
            self.memo[index] = self._top()
        elif name in _FETCHES:
            assert isinstance(argument, int)
            self.stack.append(self.memo[argument])
        elif name == "DUP":
            self.stack.append(self._top())
        else:
            self._apply(name, opcode)

    def _top(self) -> _Value:
        top = self.stack[-1]
        if top is None:
            raise ValueError("a mark where a value should be")
        return top

    def _apply(self, name: str, opcode: pickletools.OpcodeInfo) -> None:
        popped: list[_Value] = []
        before = list(opcode.stack_before)
        if pickletools.markobject in before or (name == "POP" and self.stack and self.stack[-1] is None):
            while (value := self.stack.pop()) is not None:
                popped.append(value)
            self.marks -= 1
            before = before[: before.index(pickletools.markobject)] if before else []
            if name == "POP":
                before = []
        for _ in before:
            value = self.stack.pop()
            if value is None:
                raise ValueError("a mark where a value should be")
            popped.append(value)
        if name in _GROWING:
            result = popped[-1]
            result.add(popped[:-1])
        else:
            result = _Value(popped)
        for kind in opcode.stack_after:
            self.stack.append(None if kind is pickletools.markobject else result)
        self.marks += pickletools.markobject in opcode.stack_after
        if self.marks > MAX_DEPTH:  # containers whose ends are still to come
            raise RefusedPickle(f"it has containers nested more than {MAX_DEPTH} deep")

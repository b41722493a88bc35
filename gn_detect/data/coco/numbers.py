"""Numbers in JSON: which values are numbers, integers and coordinates."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np

NUMBERS = frozenset((int, float))

# The farthest that a coordinate may be from the image's corner, in pixels.
FARTHEST = 1e6

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*", re.ASCII | re.IGNORECASE)
_LONGEST_NUMBER = 100  # characters


def as_number(value: Any) -> int | float | None:
    """Return the number that a JSON value is, or that its text spells; None for all else, also for a bool."""
    if type(value) in NUMBERS:
        return value
    if isinstance(value, str) and len(value) <= _LONGEST_NUMBER and _NUMBER.fullmatch(value):
        return int(value) if value.strip().lstrip("+-").isdigit() else float(value)
    return as_number(value.item()) if isinstance(value, np.generic) else None


def as_integer(value: Any) -> int | None:
    """Return the integer that a JSON value is (1, 1.0, ``"1"``); None for anything else."""
    number = as_number(value)
    if isinstance(number, float):
        return int(number) if number.is_integer() else None
    return number


def is_integer(value: Any) -> TypeGuard[int]:
    """Return whether a value is an integer that fits into 64 bits; a bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_area(value: Any) -> bool:
    """Return whether a value is a possible number of square pixels."""
    return type(value) in NUMBERS and 0 <= value <= FARTHEST**2


def extent_of(numbers: Sequence[Any]) -> tuple[float, float] | None:
    """Return the least and the greatest coordinate; None if one is no number, not finite or too far away."""
    if not NUMBERS.issuperset(map(type, numbers)):
        return None
    low, high = min(numbers), max(numbers)
    # A nan is the least if it comes first, and in the sum otherwise.
    near = low >= -FARTHEST and high <= FARTHEST and math.isfinite(sum(numbers))
    return (low, high) if near else None

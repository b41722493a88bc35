"""Types of config values: strict, but text is read as the literal that the key expects.

YAML reads ``1e-3`` and ``(60000, 80000)`` as strings, and everything on a command line is text; detectron2's
configs rely on both being read as Python literals.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from .yaml_text import LARGEST, parse_yaml

_LONG_NUMBER = re.compile(r"0[xob][0-9a-f_]{64}", re.IGNORECASE)
"""A long integer that is not decimal: Python bounds the length of decimal ones alone."""


def parse_literal(text: str) -> Any:
    """The Python or YAML literal that ``text`` spells, or ``text`` itself."""
    if len(text) > LARGEST or _LONG_NUMBER.search(text):
        return text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        pass
    try:
        return parse_yaml(text)
    except yaml.YAMLError:
        return text


def _from_text(value: Any) -> Any:
    return parse_literal(value) if isinstance(value, str) else value


def _to_tuple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_to_tuple(item) for item in value)
    return value


def _sequence(value: Any) -> Any:
    return _to_tuple(_from_text(value))


def _names(value: Any) -> Any:
    """A single name stands for a list of one."""
    value = _sequence(value) if isinstance(value, str) and value.strip()[:1] in ("(", "[") else value
    return (value,) if isinstance(value, str) else _to_tuple(value)


def _increasing(values: tuple[float, ...]) -> tuple[float, ...]:
    if any(b <= a for a, b in zip(values, values[1:], strict=False)):
        raise ValueError("must increase from left to right")
    return values


def _of_64_bits(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("must fit into 64 bits")
    return value


Bool = Annotated[bool, Strict(), BeforeValidator(_from_text)]
Int = Annotated[int, Strict(), AfterValidator(_of_64_bits), BeforeValidator(_from_text)]
Float = Annotated[float, Strict(), Field(allow_inf_nan=False), BeforeValidator(_from_text)]
Str = Annotated[str, Strict()]

Count = Annotated[Int, Field(ge=0)]
PositiveInt = Annotated[Int, Field(gt=0)]
# Sizes of tensors are bounded: a file of a few lines must not make something huge.
Channels = Annotated[Int, Field(gt=0, le=2**14)]
Layers = Annotated[Int, Field(ge=0, le=64)]
Bins = Annotated[Int, Field(gt=0, le=64)]  # of a pooled feature, in each direction
Samples = Annotated[Int, Field(ge=0, le=64)]  # of each bin, in each direction
Amount = Annotated[Int, Field(gt=0, le=10**6)]  # of boxes, images or parts that are computed at once
Side = Annotated[Int, Field(gt=0, le=2**15)]  # of an image, pixels
NonNegative = Annotated[Float, Field(ge=0)]
Positive = Annotated[Float, Field(gt=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
PossiblyInfinite = Annotated[float, Strict(), Field(gt=0), BeforeValidator(_from_text)]
BoolOrAuto = Annotated[Literal["auto", True, False], BeforeValidator(_from_text)]

AsTuple = BeforeValidator(_sequence)
Bools = Annotated[tuple[Bool, ...], AsTuple]
Ints = Annotated[tuple[Int, ...], AsTuple]
Floats = Annotated[tuple[Float, ...], AsTuple]
Lengths = Annotated[tuple[Side, ...], Field(min_length=1, max_length=1000), AsTuple]
Milestones = Annotated[tuple[PositiveInt, ...], AsTuple, AfterValidator(_increasing)]
Thresholds = Annotated[tuple[Positive, ...], AsTuple, AfterValidator(_increasing)]
Pair = Annotated[tuple[Float, Float], AsTuple]
FloatsPerLevel = Annotated[
    tuple[Annotated[tuple[Positive, ...], Field(min_length=1, max_length=64)], ...],
    Field(min_length=1, max_length=64),
    AsTuple,
]
BoxWeights = Annotated[tuple[Positive, Positive, Positive, Positive], AsTuple]
PerChannel = Annotated[tuple[Float, Float, Float], AsTuple]
PositivePerChannel = Annotated[tuple[Positive, Positive, Positive], AsTuple]
Names = Annotated[tuple[Str, ...], BeforeValidator(_names)]


def _key(attribute: str) -> str:
    # A trailing underscore keeps clear of Python's keywords and of pydantic's own attributes.
    return attribute.rstrip("_").upper()


class Section(BaseModel):
    """A group of keys: upper case in YAML, lower case as attributes, read-only."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=_key, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """``SOLVER:`` with nothing below it changes nothing, and text may spell a mapping."""
        value = _from_text(value)
        return {} if value is None else value


def fields(section: type[BaseModel] | BaseModel) -> Iterator[tuple[str, str]]:
    """(key, attribute) of every field."""
    model = section if isinstance(section, type) else type(section)
    for attribute, field in model.model_fields.items():
        yield field.alias or attribute, attribute


def value_at(section: BaseModel, key: str) -> Any:
    """The value of a dotted key such as ``MODEL.RPN.NMS_THRESH``."""
    value: Any = section
    for part in key.split("."):
        value = getattr(value, dict(fields(cast(BaseModel, value)))[part])
    return value


def to_plain(value: Any) -> Any:
    """Sections as dictionaries with YAML's keys, and tuples as lists."""
    if isinstance(value, BaseModel):
        return {key: to_plain(getattr(value, attribute)) for key, attribute in fields(value)}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value

"""Types of config values, and the declaration of a key.

Types are strict, but text is read as the literal that the key expects: YAML reads ``1e-3`` and
``(60000, 80000)`` as text, everything on a command line is text, and detectron2's configs rely on both being
read as Python literals.
"""

from __future__ import annotations

import ast
import re
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from .yaml_text import LARGEST, parse_yaml

# Python bounds the length of decimal integers alone.
_LONG_NUMBER = re.compile(r"0[xob][0-9a-f_]{64}", re.IGNORECASE)


def parse_literal(text: str) -> Any:
    """Return the Python or YAML literal that ``text`` spells, or ``text`` itself."""
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


def from_text(value: Any) -> Any:
    return parse_literal(value) if isinstance(value, str) else value


def as_tuple(value: Any) -> Any:
    return _to_tuple(from_text(value))


def as_names(value: Any) -> Any:
    if isinstance(value, str) and value.strip()[:1] in ("(", "["):
        value = from_text(value)
    return (value,) if isinstance(value, str) else _to_tuple(value)  # one name is a list of one


def _to_tuple(value: Any) -> Any:
    return tuple(map(_to_tuple, value)) if isinstance(value, list | tuple) else value


ONE_VALUE = "detectron2's; other values are not implemented, and are refused."
NEVER_READ = "Accepted because detectron2's full configs contain it, and never read."


def key(default: Any, description: str, implemented: tuple[Any, ...] = (), **options: Any) -> Any:
    """Declare a key.

    Args:
        default: detectron2's, or ours for keys that it lacks.
        description: one line for ``gn-detect config explain`` and docs/config.md.
        implemented: the values that this version has, where detectron2 has more; none: all of the type.
        options: pydantic's, such as the bounds ``ge`` and ``lt``.
    """
    extra: dict[str, Any] = {"implemented": implemented}
    return Field(default, description=description, json_schema_extra=extra, **options)


def only(value: Any) -> Any:
    """Declare a key of detectron2 with the one value that is implemented."""
    return key(value, ONE_VALUE, (value,))


def unread(default: Any) -> Any:
    """Declare a key, or a group of keys, that nothing reads: it may hold any value of its type."""
    return key(default, NEVER_READ)


def _yaml_name(attribute: str) -> str:
    # A trailing underscore keeps clear of Python's keywords and of pydantic's own attributes.
    return attribute.rstrip("_").upper()


class Section(BaseModel):
    """A read-only group of keys: upper case in YAML; as attributes in lower case, and also in upper case."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=_yaml_name, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _read_text(cls, value: Any) -> Any:
        value = from_text(value)
        return {} if value is None else value  # "SOLVER:" with nothing below it changes nothing

    if not TYPE_CHECKING:  # a type checker would accept every attribute

        def __getattr__(self, name: str) -> Any:
            for attribute, field in type(self).model_fields.items():
                if name == field.alias:
                    return getattr(self, attribute)
            return super().__getattr__(name)


def value_at(section: BaseModel, key: str) -> Any:
    """Return the value of a dotted key such as ``MODEL.RPN.NMS_THRESH``."""
    return attrgetter(key)(section)


def to_plain(value: Any) -> Any:
    """Return sections as dictionaries with YAML's keys, and tuples as lists."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {field.alias: to_plain(getattr(value, name)) for name, field in fields.items()}
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return list(map(to_plain, value))
    return value

"""Keys explained: type, default, what they accept, what they do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from ..errors import UserError
from .descriptions import DESCRIPTIONS
from .load import known_keys, nearest_key
from .schema import Root
from .supported import NEVER_READ, SUPPORTED, is_unread
from .types import to_plain, value_at

_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class KeyFact:
    """Attributes:
    key: dotted.
    type: in words, limits included.
    default: as YAML.
    allowed: the values that are implemented; empty for anything of the type.
    text: what the key does.
    """

    key: str
    type: str
    default: str
    allowed: list[str]
    text: str

    def __str__(self) -> str:
        lines = [self.key, f"  {self.text}", f"  type     {self.type}", f"  default  {self.default}"]
        if self.allowed:
            lines.append(f"  allowed  {', '.join(self.allowed)}")
        return "\n".join(lines)


def explain(key: str) -> list[KeyFact]:
    """The facts of a key, or of every key of a group such as ``MODEL.GN``.

    Raises:
        UserError: there is no such key; the nearest one is named.
    """
    wanted = key.upper().strip(".")
    found = [fact for fact in facts() if fact.key == wanted or fact.key.startswith(f"{wanted}.")]
    if not found:
        near = nearest_key(wanted)
        hint = f"did you mean {near}?" if near else "gn-detect config reference lists all"
        raise UserError(f"{key}: unknown key; {hint}")
    return found


def search(words: str) -> list[KeyFact]:
    """Return the facts of keys that have all ``words``, or else any of them, in their name or text.

    Those with them in the name come first; accepted keys that are never read are left out.
    """
    read = [fact for fact in facts() if not is_unread(fact.key, NEVER_READ)]
    wanted = _plain(words).split()
    for enough in (all, any) if " " in words.strip() else (all,):
        named = [fact for fact in read if enough(word in _plain(fact.key) for word in wanted)]
        found = [
            fact for fact in read if enough(word in _plain(f"{fact.key} {fact.text}") for word in wanted)
        ]
        if found:
            return named + [fact for fact in found if fact not in named]
    return []


def _plain(text: str) -> str:
    return text.lower().replace("_", " ").replace(".", " ")


def facts() -> Iterator[KeyFact]:
    """Every key, in the order of the schema."""
    schema = Root.model_json_schema()
    defaults = Root()
    for key in known_keys():
        value = value_at(defaults, key)
        if isinstance(value, BaseModel):
            continue
        field = _field(schema, key)
        supported = SUPPORTED.get(key, ())
        allowed = list(map(_yaml, supported or _choices(field)))
        yield KeyFact(key, _type(field), _yaml(value), allowed, _text(key, supported))


def _text(key: str, supported: tuple[Any, ...]) -> str:
    if key in DESCRIPTIONS:
        return DESCRIPTIONS[key]
    if is_unread(key, NEVER_READ):
        return "Accepted, as detectron2's full configs have it, and never read."
    assert len(supported) == 1, key  # tests/cli/test_surface.py
    return "detectron2's; other values are not implemented, and are refused."


def _field(schema: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The JSON schema of a dotted key."""
    field = dict(schema)
    for part in key.split("."):
        reference = field.get("$ref")
        if reference:
            field = schema["$defs"][reference.rpartition("/")[2]]
        field = field["properties"][part]
    return field


def _choices(field: Mapping[str, Any]) -> list[Any]:
    if field.get("type") == "boolean":
        return []
    return list(field.get("enum", ()))


def _type(field: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    kind = field.get("type")
    if kind == "array":
        items = field.get("prefixItems")
        if items:
            return f"{len(items)} of: {_type(items[0])}"
        return f"list of: {_type(field.get('items', {}))}"
    names = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "True or False",
        "object": "mapping",
        "null": "none",
    }
    bounds = [f"{words} {field[bound]:g}" for bound, words in _BOUNDS.items() if bound in field]
    bounds += [f"at least {field['minimum']:g}"] if "minimum" in field else []
    bounds += [f"at most {field['maximum']:g}"] if "maximum" in field else []
    bounds += [f"above {field['exclusiveMinimum']:g}"] if "exclusiveMinimum" in field else []
    bounds += [f"below {field['exclusiveMaximum']:g}"] if "exclusiveMaximum" in field else []
    name = names.get(str(kind), "one of the values" if "enum" in field else "anything")
    return " ".join([name, " and ".join(bounds)]).strip()


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(to_plain(value), default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


def reference() -> str:
    """All keys that are read as Markdown, a table for each group."""
    lines = [
        "# Config reference",
        "",
        "Made from the schema by `gn-detect config reference`; a test fails when it is stale. One key or one",
        "group: `gn-detect config explain KEY`. YAML files have these keys as nested groups, with",
        "detectron2's names and meanings; `_BASE_` names a file to build on; `KEY VALUE` pairs behind a",
        "command come last. A value that is not implemented is refused by key and value.",
    ]
    groups: dict[str, list[KeyFact]] = {}
    for fact in facts():
        if not is_unread(fact.key, NEVER_READ):
            groups.setdefault(fact.key.rpartition(".")[0], []).append(fact)
    for name, members in groups.items():
        lines += ["", f"## {name or 'Top level'}", "", "| key | type | default | |", "|---|---|---|---|"]
        lines += map(_row, members)
    lines += ["", "## Accepted and never read", ""]
    lines.append("Of architectures that are not implemented; detectron2's full configs hold them:")
    lines.append(", ".join(f"`{key}`" for key in NEVER_READ) + ".")
    return "\n".join(lines) + "\n"


def _row(fact: KeyFact) -> str:
    allowed = f" Allowed: {', '.join(f'`{value}`' for value in fact.allowed)}." if fact.allowed else ""
    cells = (f"`{fact.key}`", fact.type, f"`{fact.default}`", f"{fact.text}{allowed}")
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

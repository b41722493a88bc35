"""YAML from untrusted files: safe types alone, and nothing small that becomes large."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

# Most characters. A whole config takes 6,000; PyYAML reads some 30,000 in a second.
LARGEST = 1 << 17
# Most keys and values, with aliases written out; 16 characters of a text count as one value.
_MOST_NODES, _CHARACTERS = 20_000, 16
# Most levels of lists and groups.
_DEEPEST = 32
# Most characters of a number; the time to read one grows with the square of its length.
_LONGEST_NUMBER = 64

_TOO_DEEP = f"more than {_DEEPEST} levels of lists and groups"


def _problem(text: str, mark: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, mark)


class _Loader(yaml.SafeLoader):
    """Safe YAML with ``!!python/tuple``, which detectron2 writes; a repeated key is an error."""

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # At a bracket PyYAML looks ahead 1024 characters, for a time that grows with their square.
        if self.flow_level >= _DEEPEST:
            raise yaml.scanner.ScannerError(None, None, _TOO_DEEP, self.get_mark())
        super().fetch_flow_collection_start(token_class)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise _problem(f"{key} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_tuple(self, node: yaml.Node) -> tuple[Any, ...]:
        if not isinstance(node, yaml.SequenceNode):
            raise _problem("a tuple needs a list", node.start_mark)
        return tuple(self.construct_sequence(node, deep=True))

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        if len(node.value) > _LONGEST_NUMBER:
            raise _problem("a number is too long", node.start_mark)
        if node.tag.endswith(":int"):
            return self.construct_yaml_int(node)
        return self.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_tuple)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _Loader.construct_number)


def parse_yaml(text: str) -> Any:
    """Return the value that YAML ``text`` spells, None for an empty one.

    All YAML from outside the package goes through here: files, texts on the command line, and the configs in
    checkpoints and exported models.

    Raises:
        yaml.YAMLError: it is not YAML, names a type that is not plain, or is too large for a config with its
            aliases written out; ``problem`` holds the reason.
    """
    if len(text) > LARGEST:
        raise yaml.MarkedYAMLError(problem=f"more than {LARGEST} characters, too many for a config")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        weight, depth = _measure(node, {})
        if weight > _MOST_NODES:
            problem = f"aliases (*name) make more than {_MOST_NODES} values of it"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        if depth > _DEEPEST:
            raise RecursionError
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.MarkedYAMLError(problem=_TOO_DEEP) from None
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's constructors trust the text after a tag: "!!bool maybe" is a KeyError.
        raise yaml.MarkedYAMLError(problem=f"a value does not fit its type ({error})") from error
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the numbers of values and levels of a node, with aliases written out."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise yaml.MarkedYAMLError(problem="an alias leads back to itself", problem_mark=node.start_mark)
        return found
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        parts, own = [], 1 + len(node.value) // _CHARACTERS
    else:
        pairs = isinstance(node, yaml.MappingNode)
        parts, own = [part for item in node.value for part in (item if pairs else (item,))], 1
    below = [_measure(part, known) for part in parts]
    found = own + sum(weight for weight, _ in below), 1 + max((depth for _, depth in below), default=0)
    known[id(node)] = found
    return found

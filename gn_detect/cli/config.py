"""``gn-detect config``: the merged config, and the meaning of each key."""

from __future__ import annotations

import argparse
import re

from ..config import dump_config, load_config
from ..config.explain import KeyFact, explain, reference, search
from ..config.load import known_keys
from ..config.types import to_plain
from ..errors import UserError
from .output import Result
from .parser import key_of_habit

EXAMPLES = """
gn-detect config --config-file quick/demo.yaml SOLVER.BASE_LR 0.01
gn-detect config explain SOLVER.BASE_LR
gn-detect config explain MODEL.GN
gn-detect config explain learning rate                                # every key about it
gn-detect config reference                                            # every key: docs/config.md
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", metavar="FILE", help="YAML with detectron2's keys")
    add(
        "overrides",
        nargs="*",
        metavar="explain KEY|WORD | reference | KEY VALUE",
        help="KEY VALUE by default",
    )


def run(args: argparse.Namespace) -> Result:
    words = args.overrides
    if words[:1] == ["explain"]:
        if len(words) < 2:
            raise UserError(
                "missing-argument",
                "explain needs a key or words, such as gn-detect config explain SOLVER.BASE_LR",
            )
        facts = _explain(" ".join(words[1:]))
        return Result([vars(fact) for fact in facts])
    if words == ["reference"]:
        text = reference()
        print(text, end="")
        return Result({"markdown": text})
    cfg = load_config(args.config_file, words)
    print(dump_config(cfg), end="")
    return Result(to_plain(cfg))


def _explain(wanted: str) -> list[KeyFact]:
    """Print a key or group, or the keys about some words; the UserError for none names the nearest key."""
    habit = "" if wanted.upper() in known_keys() else key_of_habit(wanted)
    meant = [key for key in known_keys() if key in re.findall(r"[A-Z0-9_.]+[A-Z0-9_]", habit)]
    try:
        first = explain(wanted) if not meant else [fact for key in meant for fact in explain(key)]
        others = []
    except UserError:
        first, others = [], search(wanted)
        if not others:
            raise
    if meant:
        print(f"the name of {wanted} here is {habit}\n")
        others = [fact for fact in search(wanted) if fact not in first]
    if not first and len(others) == 1:
        first, others = others, []
    if first:
        print("\n\n".join(map(str, first)), end="\n\n" if others else "\n")
    if others:
        have = "key has" if len(others) == 1 else "keys have"
        print(f"{len(others)} {'more ' if first else ''}{have} '{wanted}' in name or meaning:\n")
        print("\n".join(f"{fact.key}  {fact.default}\n  {fact.text}" for fact in others))
    return first + others

"""``gn-detect config``: the merged config, and what each key means."""

from __future__ import annotations

import argparse

from ..config import dump_config, load_config
from ..config.explain import explain, reference
from ..config.types import to_plain
from ..errors import UserError
from .output import Result

HELP = "Print the config that a file and KEY VALUE pairs make, or explain a key."

EXAMPLES = """
gn-detect config --config-file quick/demo.yaml SOLVER.BASE_LR 0.01
gn-detect config explain SOLVER.BASE_LR
gn-detect config explain MODEL.GN
gn-detect config reference                                            # every key, as docs/config.md has it
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument("--config-file", metavar="FILE", help="YAML with detectron2's keys")
    parser.add_argument(
        "overrides", nargs="*", metavar="explain KEY | reference | KEY VALUE", help="KEY VALUE by default"
    )


def run(args: argparse.Namespace) -> Result:
    """Print what was asked for.

    Raises:
        UserError: an unknown key, or a config that is not valid.
    """
    words = args.overrides
    if words[:1] == ["explain"]:
        if len(words) != 2:
            raise UserError("explain needs one key, such as gn-detect config explain SOLVER.BASE_LR")
        facts = explain(words[1])
        print("\n\n".join(map(str, facts)))
        return Result([vars(fact) for fact in facts])
    if words == ["reference"]:
        text = reference()
        print(text, end="")
        return Result({"markdown": text})
    cfg = load_config(args.config_file, words)
    print(dump_config(cfg), end="")
    return Result(to_plain(cfg))

"""``gn-detect completion``: a script that completes commands and flags in a shell."""

from __future__ import annotations

import argparse

from ..errors import UserError
from .output import Result

EXAMPLES = """
eval "$(gn-detect completion bash)"              # in ~/.bashrc; needs shtab, the extra "completion"
gn-detect completion zsh > ~/.zfunc/_gn-detect
gn-detect completion fish > ~/.config/fish/completions/gn-detect.fish
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def run(args: argparse.Namespace) -> Result:
    from .main import COMMANDS, make_parser

    try:
        import shtab
    except ImportError:
        raise UserError("missing-package", "shell completion needs shtab: pip install shtab") from None
    script = shtab.complete(make_parser(COMMANDS), shell=args.shell)
    print(script)
    return Result({"shell": args.shell, "script": script})

"""``gn-detect completion``: a script with which a shell completes commands and flags."""

from __future__ import annotations

import argparse

from ..errors import UserError
from .output import Result

HELP = "Print a script with which bash, zsh or fish complete commands and flags."

EXAMPLES = """
eval "$(gn-detect completion bash)"              # in ~/.bashrc; needs shtab, the extra "completion"
gn-detect completion zsh > ~/.zfunc/_gn-detect
gn-detect completion fish > ~/.config/fish/completions/gn-detect.fish
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def run(args: argparse.Namespace) -> Result:
    """Print the script.

    Raises:
        UserError: shtab is not installed.
    """
    from .main import make_parser  # which knows this module, too

    try:
        import shtab
    except ImportError:
        raise UserError("shell completion needs shtab: pip install shtab") from None
    script = shtab.complete(make_parser(), shell=args.shell)
    print(script)
    return Result({"shell": args.shell, "script": script})

"""The parser of all commands, whose errors are one line that says what was meant, or where it is told."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import NoReturn

from ..config.load import known_keys
from ..config.supported import NEVER_READ, is_unread
from ..errors import UserError

_KEYS_OF_OTHERS = {
    "LR": "SOLVER.BASE_LR",
    "LEARNING_RATE": "SOLVER.BASE_LR",
    "BATCH_SIZE": "SOLVER.IMS_PER_BATCH",
}
"""What other tools have as flags, and call otherwise."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves examples as they are, and tells the defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        default = action.default
        known = isinstance(default, int | float | str) and not isinstance(default, bool)
        if not action.option_strings or not known or default == argparse.SUPPRESS or "default" in told:
            return told
        return f"{told} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Raises where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Refuse a command line, for argparse's reason.

        Raises:
            UserError: always.
        """
        wrong = re.match("(.*invalid choice: '(.*?)') ", message)
        choices = [str(choice) for action in self._actions for choice in action.choices or ()]
        near = get_close_matches(wrong[2], choices, 1) if wrong else []
        if wrong and near:
            raise UserError(f"{wrong[1]}; did you mean {near[0]}?")
        raise UserError(f"{message}; {self.prog} --help shows how")


def check_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse a flag that the command does not have, before argparse misses what the flag stands for.

    Args:
        parser: of all commands.
        words: of the command line; behind ``--`` none is a flag.

    Raises:
        UserError: an unknown flag, or one in front of the command.
    """
    commands = _commands(parser)
    position = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    command = commands.get(words[position]) if position < len(words) else None
    for index, word in enumerate(words):
        flag = word.partition("=")[0]
        if word == "--" or (index > position and command is None):
            return
        scope = command if command is not None and index > position else parser
        if not re.match("--?[A-Za-z]", word) or flag in scope._option_string_actions:
            continue
        raise UserError(f"unknown flag {flag}; {_meant(scope, flag)}")


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next(dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction))


def _meant(scope: argparse.ArgumentParser, flag: str) -> str:
    """What to write instead: a flag that begins or ends alike or looks so, a config key, or where to look."""
    flags = [name for name in scope._option_string_actions if name.startswith("--") and name != "--help"]
    near = [name for name in flags if name.startswith(flag) or flag.endswith(name[1:])]
    near = near or get_close_matches(flag, flags, 1, cutoff=0.7)
    if near:
        return f"did you mean {' or '.join(near[:3])}?"
    keys = _keys_called(flag) if any(a.dest in ("overrides", "inputs") for a in scope._actions) else []
    if keys:
        return f"it is a config key, given behind the command: {' or '.join(keys[:3])}"
    if any(isinstance(action, argparse._SubParsersAction) for action in scope._actions):
        return f"a command's own flags stand behind its name; {scope.prog} --help shows how"
    return f"{scope.prog} --help lists them"


def _keys_called(flag: str) -> list[str]:
    """Config keys whose last part is the flag's name."""
    name = flag.strip("-").replace("-", "_").upper()
    if name in _KEYS_OF_OTHERS:
        return [_KEYS_OF_OTHERS[name]]
    return [k for k in known_keys() if k.rpartition(".")[2] == name and not is_unread(k, NEVER_READ)]

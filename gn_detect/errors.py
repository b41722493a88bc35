"""The exception for mistakes that a user can make and correct."""

from __future__ import annotations

from .text import printable


class UserError(Exception):
    """Bad input that a user can correct: a file, key, image or value.

    The message is one line that names the item and the remedy. The command line prints it as
    ``error: <message>`` and exits with status 2. Control characters in the message become escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class Diverged(UserError):
    """The losses or weights of a training are no longer finite."""

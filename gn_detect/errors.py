"""The exception for mistakes that a user can make and can mend."""

from __future__ import annotations

from .text import printable


class UserError(Exception):
    """Bad input: a file, key, image or value that a user can correct.

    The message is one line that names the item and the remedy. The command line prints it as
    ``error: <message>`` and exits with status 2; library callers can catch it. Control characters of names
    in the message are shown as their escapes.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class Diverged(UserError):
    """A training whose losses or weights are no longer finite."""

"""Compare the class names of a dataset with those of a model: labels mean something only by their names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LISTED = 20  # names that a message shows of a list


def match_names(names: Sequence[str], known: Sequence[str]) -> list[int]:
    """Return the position in ``known`` of each of ``names``; equal lists match by position.

    Raises:
        ValueError: a name is not in ``known``, or several classes share one.
    """
    if list(names) == list(known):
        return list(range(len(known)))
    position = {name: label for label, name in enumerate(known)}
    unknown = [name for name in names if name not in position]
    if unknown:
        raise ValueError(f"not among them: {list_names(unknown)}")
    for side in (names, known):
        shared = [name for name, count in Counter(side).items() if count > 1]
        if shared:
            raise ValueError(f"several share the name {shared[0]}")
    return [position[name] for name in names]


def list_names(names: Sequence[str], limit: int = LISTED) -> str:
    """Return the first ``limit`` names for a message."""
    return ", ".join(names) if len(names) <= limit else ", ".join([*names[:limit], "..."])

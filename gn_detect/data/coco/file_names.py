"""Find the file that an image's name obviously means, where no file has exactly that name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, unquote_plus

_MOST_DECODED = 3  # times that % is decoded: %2520 comes from a name that was encoded twice
_DEEPEST = 20  # components of a path that are looked for


def missing_names(folder: Path, names: Iterable[str], outside: bool = True) -> dict[str, str | None]:
    r"""Return the names that no file has, each with the name of the file that it obviously means.

    A name is read again without a query (``?d=path/x.jpg`` means ``path/x.jpg``), with ``%20`` and ``+``
    decoded, with ``/`` for ``\``, without leading folders that are not here, and in another case or Unicode
    form. Folders are listed once, and only those that a name leads to; no file is opened.

    Args:
        folder: to which names are relative.
        names: all names of the dataset: a file that has a name of its own in the dataset is no answer.
        outside: names may lead out of the folder; a file there is missing otherwise, as it is not read.

    Returns:
        Names relative to ``folder`` with ``/``; None where nothing or more than one file would do.
    """
    unique = list(dict.fromkeys(names))
    folders = _Folders(folder)
    missing = [name for name in unique if not folders.holds(name) or (leads_out(name) and not outside)]
    if not missing:
        return {}
    taken = set(map(os.path.normpath, set(unique) - set(missing)))
    found = {name: folders.reading(name) for name in missing}
    uses = Counter(found.values())
    return {
        name: other if other and uses[other] == 1 and os.path.normpath(other) not in taken else None
        for name, other in found.items()
    }


def leads_out(name: str) -> bool:
    """Return whether a name is absolute or has a ``..`` in it, and may so lead out of its folder."""
    path = Path(name)
    return bool(path.anchor) or ".." in path.parts


def nearby_file(path: str | Path) -> Path | None:
    """Return the file that a path obviously means; None where that is unclear, or the path is right."""
    path = Path(path)
    folder = next((parent for parent in path.parents if parent.is_dir()), None)
    if folder is None:
        return None
    found = missing_names(folder, [os.path.relpath(path, folder)])
    name = next(iter(found.values()), None)
    return None if name is None else folder / name


class _Folders:
    """Listings of a folder and of those below it, each read when it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.listed: dict[str, frozenset[str]] = {}
        self.folded: dict[str, defaultdict[str, list[str]]] = {}

    def names(self, folder: str) -> frozenset[str]:
        if folder not in self.listed:
            try:
                self.listed[folder] = frozenset(os.listdir(self.root / folder))
            except (OSError, ValueError):  # no folder, no right to list it, or no path at all
                self.listed[folder] = frozenset()
        return self.listed[folder]

    def holds(self, name: str) -> bool:
        folder, last = os.path.split(name)
        return last in self.names(folder)

    def reading(self, name: str) -> str | None:
        """Return the one entry that the readings of a name lead to; None for several."""
        found = {hit for parts in _readings(name) if (hit := self._longest(parts))}
        return found.pop() if len(found) == 1 else None

    def _longest(self, parts: list[str]) -> str | None:
        """Return the entry at the end of a path; as few leading folders as possible are taken off."""
        for first in range(len(parts)):
            hits = self._below("", parts[first:])
            if hits:
                return hits[0] if len(hits) == 1 else None
        return None

    def _below(self, folder: str, parts: list[str]) -> list[str]:
        if not parts:
            return [folder]
        names = self.names(folder)
        here = [parts[0]] if parts[0] in names else self._alike(folder, parts[0])
        paths = [f"{folder}/{name}" if folder else name for name in here]
        return [hit for path in paths for hit in self._below(path, parts[1:])]

    def _alike(self, folder: str, name: str) -> list[str]:
        """Return the entries whose names differ in case or Unicode form alone."""
        if folder not in self.folded:
            self.folded[folder] = defaultdict(list)
            for entry in self.names(folder):
                self.folded[folder][_fold(entry)].append(entry)
        return self.folded[folder].get(_fold(name), [])


def _readings(name: str) -> Iterator[list[str]]:
    """Yield the components of each path that a name may mean."""
    texts = [name, unquote_plus(name)] if "+" in name else [name]
    for query in re.findall(r"[?&]d=([^&]+)", name):
        texts += [query, unquote_plus(query)]
    if "?" in name:
        texts.append(name.partition("?")[0])
    for text in dict.fromkeys(texts):
        decoded = [text]
        while len(decoded) <= _MOST_DECODED and (shorter := unquote(decoded[-1])) != decoded[-1]:
            decoded.append(shorter)
        for form in decoded:
            parts = [part for part in form.strip().replace("\\", "/").split("/") if part not in ("", ".")]
            if ".." in parts:
                parts = parts[len(parts) - parts[::-1].index("..") :]
            if parts:
                yield parts[-_DEEPEST:]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

"""The catalogue of published weights, and the local files of its names."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field

from ..config.yaml_text import parse_yaml
from ..errors import UserError
from .download import download, verify

ZOO, DETECTRON2, CATALOG = "zoo://", "detectron2://", "catalog://"
DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"

Percent = Annotated[float, Field(gt=0, lt=100)]


class ZooEntry(BaseModel):
    """One file of published weights; ``model_zoo/catalog.yaml`` explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["backbone", "detector"]
    scheme: Literal["detectron2", "Detectron", "torchvision", "mmdetection", "BiT", "tensorpack"]
    url: Annotated[str, Field(pattern=r"^https://")]
    bytes: int | None = None
    checksum: Annotated[str, Field(pattern=r"^(|md5-url|md5:[0-9a-f]{32}|sha256:[0-9a-f]{8,64})$")] = ""
    config: str
    overrides: tuple[str, ...] = ()
    schedule: str = ""
    box_ap: Percent | None = None
    mask_ap: Percent | None = None
    top1_error: Percent | None = None
    memory: float | None = None
    seconds: float | None = None
    licence: str
    source: str
    aliases: tuple[str, ...] = ()

    @property
    def file(self) -> Path:
        """Return the file in the cache, by host and path of the URL: no two entries have the same."""
        return cache_folder() / _relative(self.url)


def cache_folder() -> Path:
    """Return ``GN_DETECT_CACHE``, by default ``~/.cache/gn_detect``."""
    return Path(os.environ.get("GN_DETECT_CACHE") or "~/.cache/gn_detect").expanduser()


@cache
def read_catalog() -> dict[str, ZooEntry]:
    """Return all entries by name."""
    package = Path(str(resources.files("gn_detect")))
    folders = (package / "model_zoo", package.parent / "model_zoo")
    path = next((folder / "catalog.yaml" for folder in folders if (folder / "catalog.yaml").is_file()), None)
    if path is None:
        raise UserError("missing-package", "the model zoo's catalog.yaml is missing: install gn_detect again")
    content = parse_yaml(path.read_text(encoding="utf-8"))
    return {name: ZooEntry(name=name, **fields) for name, fields in content.items()}


def find_entry(name: str) -> ZooEntry:
    """Return the entry of a name, with or without ``zoo://``.

    Raises:
        UserError: there is no such entry; similar names are given.
    """
    name = name.removeprefix(ZOO)
    catalog = read_catalog()
    if name in catalog:
        return catalog[name]
    near = difflib.get_close_matches(name, catalog, n=3, cutoff=0.3)
    hint = f"did you mean {' or '.join(near)}?" if near else "gn-detect zoo list shows all"
    raise UserError("unknown-weights", f"the model zoo has no {name!r}; {hint}")


def is_remote(path: str | Path) -> bool:
    """Return whether ``path`` has a scheme, such as ``zoo://``, and is no file."""
    return re.match(r"[A-Za-z][\w+.-]*:/", str(path)) is not None and not Path(path).exists()


def entry_of(path: str | Path) -> ZooEntry | None:
    """Return the entry that ``path`` names in any way, or None."""
    if is_remote(path):
        if str(path).startswith("hf:"):  # on the Hub, see .hub
            return None
        return _look_up(_with_two_slashes(path))[0]
    return next((entry for entry in read_catalog().values() if entry.file == Path(path)), None)


def resolve(path: str | Path) -> Path:
    """Return the local file for a path, a name of the zoo or a URL, downloaded if it is not there yet.

    Args:
        path: a file; ``zoo://NAME``; detectron2's ``detectron2://...`` and ``catalog://...``; or
            ``https://...``.

    Raises:
        UserError: unknown name or scheme, or the download failed (with the place to put the file by hand).
    """
    if not is_remote(path):
        return Path(path)
    entry, url = _look_up(_with_two_slashes(path))
    if entry is None:
        file = cache_folder() / _relative_to_one(url)
        return file if file.is_file() else download(url, file)
    return fetch(entry)


def fetch(entry: ZooEntry) -> Path:
    """Return the file of an entry, downloaded and checked if it is not there yet."""
    if not entry.file.is_file():
        download(entry.url, entry.file, size=entry.bytes, checksum=entry.checksum)
    return entry.file


def check(entry: ZooEntry) -> str:
    """Compare a downloaded file with its entry, and say in words which facts agree.

    Raises:
        UserError: it is not there, or is not the published one.
    """
    if not entry.file.is_file():
        raise UserError(
            "missing-weights", f"{entry.name} is not downloaded: gn-detect zoo download {entry.name}"
        )
    return verify(entry.file, size=entry.bytes, checksum=entry.checksum)


def _with_two_slashes(path: str | Path) -> str:
    # pathlib makes one of them.
    return re.sub(r"^([A-Za-z][\w+.-]*):/+", r"\1://", str(path))


def _look_up(text: str) -> tuple[ZooEntry | None, str]:
    """Return the entry, if the catalogue has one, and the URL."""
    if text.startswith(ZOO):
        entry = find_entry(text)
        return entry, entry.url
    if text.startswith(CATALOG):
        name = text.removeprefix(CATALOG)
        for entry in read_catalog().values():
            if name in entry.aliases:
                return entry, entry.url
        raise UserError(
            "unknown-weights", f"the model zoo does not know {text}; gn-detect zoo list shows what it has"
        )
    if text.startswith(DETECTRON2):
        text = DETECTRON2_URL + text.removeprefix(DETECTRON2)
    if not text.startswith("https://"):
        raise UserError(
            "unknown-weights",
            f"cannot load {text}: only hf://, zoo://, detectron2://, catalog:// and https:// are known",
        )
    return next((entry for entry in read_catalog().values() if entry.url == text), None), text


def _relative_to_one(url: str) -> Path:
    """Return :func:`_relative`, with digits of the URL where another URL could have the same path."""
    parts, plain = urlsplit(url), _relative(url)
    if not parts.query and plain.as_posix() == parts.netloc + parts.path:
        return plain
    digits = hashlib.sha256(url.encode()).hexdigest()[:12]
    return plain.with_name(f"{plain.stem}-{digits}{plain.suffix}")


def _relative(url: str) -> Path:
    """Return ``host/path`` with nothing in it that leads out of the cache."""
    parts = urlsplit(url)
    names = [parts.hostname or "unknown", *unquote(parts.path).split("/")]
    clean = [re.sub(r"[^\w.+@=-]", "_", name) for name in names if name not in ("", ".", "..")]
    return Path(*clean)

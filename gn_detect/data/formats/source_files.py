"""Read the label files of other tools: bounded, in any usual encoding, and without what XML may define."""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ...errors import UserError
from ...files import open_file
from ..coco.rules import shown

# Most bytes of a file. XML takes about ten times as much memory; 100,000 objects of CVAT have 30 MB.
LARGEST_TEXT, LARGEST_XML, LARGEST_JSON = 1 << 26, 1 << 28, 1 << 30

# Most tags of an XML file, each of which takes up to a kilobyte.
_MOST_TAGS = 2_000_000

# Encodings that an XML file may name, in addition to those of its first bytes.
_XML_ENCODINGS = {"ascii", "us-ascii", "iso-8859-1", "latin-1", "windows-1252", "gbk", "gb2312", "shift_jis"}

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def damaged(path: Path, reason: str, remedy: str) -> UserError:
    """Return the error for a label file that breaks its own format."""
    return UserError("damaged-labels", f"{path}: {reason}; {remedy}")


def label_files(folder: Path, pattern: str) -> list[Path]:
    """Return the files of a pattern in a folder and those below it, sorted; hidden ones are left out."""
    found = (path for path in folder.rglob(pattern) if path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def read_labels(path: Path, largest: int = LARGEST_TEXT) -> str:
    r"""Return the text of a file, with ``\n`` between lines.

    It is UTF-8 or UTF-16 with a byte order mark, else UTF-8, else Windows' cp1252 where all that is not ASCII
    would be letters.

    Raises:
        UserError: it cannot be read, has more than ``largest`` bytes, or its encoding is not clear.
    """
    return _decode(read_bytes(path, largest), path).replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: Path, largest: int) -> bytes:
    """Return the bytes of a file; a UserError names one that cannot be read or has more than ``largest``."""
    try:
        with open_file(path) as file:
            content = file.read(largest + 1)
    except OSError as error:
        raise UserError("cannot-read", f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > largest:
        reason = f"{path} has more than {largest >> 20} MB, too many for a file of labels"
        raise UserError("oversized-file", f"{reason}; export it in parts")
    return content


def _decode(content: bytes, path: Path, declared: str = "") -> str:
    marked = [encoding for mark, encoding in _MARKS if content.startswith(mark)]
    encoding = (marked or [declared or "utf-8"])[0]
    try:
        return content.decode(encoding)
    except UnicodeDecodeError:
        pass
    if encoding == "utf-8":
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            text = ""
        if text and all(character.isalpha() for character in text if character > "\x7f"):
            return text
    raise damaged(path, f"its encoding is not {encoding}, and unclear", "save it as UTF-8")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; a UserError names one that is too large or deep, or is not JSON."""
    text = read_labels(path, LARGEST_JSON)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise UserError("not-json", f"{path} is not JSON ({error.msg}, {where}); export it again") from error
    except (ValueError, RecursionError) as error:
        raise UserError("not-json", f"cannot read {path} as JSON: {error}; export it again") from error


def read_xml(path: Path) -> ElementTree.Element:
    """Return the root of an XML file. A document type, which can define entities, is refused unread.

    Raises:
        UserError: it cannot be read, is too large, is not XML, or has a document type.
    """
    content = read_bytes(path, LARGEST_XML)
    named = re.match(rb"\s*<\?xml[^>]*?encoding\s*=\s*[\"']([\w.-]+)[\"']", content)
    encoding = named[1].decode("ascii", "replace").lower() if named else ""
    text = _decode(content, path, encoding if encoding in _XML_ENCODINGS else "")
    if defines := re.search(r"<!(DOCTYPE|ENTITY|ELEMENT|ATTLIST|NOTATION)", text, re.IGNORECASE):
        line = text.count("\n", 0, defines.start()) + 1
        raise UserError(
            "unsafe-file",
            f"{path} has a document type (<!{defines[1]}, line {line}), which no labels need and which can "
            "name other files; remove it",
        )
    if text.count("<") > _MOST_TAGS:
        raise UserError("oversized-file", f"{path} has more than {_MOST_TAGS} tags; export it in parts")
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text.removeprefix("\ufeff"))  # with its encoding
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise damaged(path, f"it is not XML ({error})", "export it again") from error


def child_text(element: ElementTree.Element, name: str) -> str:
    """Return the text of a child, without blanks; empty if there is none."""
    return (element.findtext(name) or "").strip()


def as_finite(value: Any) -> float | None:
    """Return the finite number that a JSON value or a text is; None for others."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value) if not isinstance(value, str) or len(value) <= 100 else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def finite_numbers(file: Path, given: Iterable[Any], what: str) -> list[float]:
    """Return JSON values or texts as numbers; the UserError for another names ``file`` and ``what``."""
    numbers = []
    for value in given:
        number = as_finite(value)
        if number is None:
            raise damaged(file, f"{what} has {shown(value)} in place of a number", "draw it again")
        numbers.append(number)
    return numbers


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of each line that is not blank."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()

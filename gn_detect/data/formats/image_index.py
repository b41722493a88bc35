"""Find the images that labels name, inside of one folder."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from ...errors import UserError
from ..coco.faults import DataError
from ..coco.rules import MOST_PIXELS
from ..images import DAMAGED, IMAGE_SUFFIXES, cannot_read, exif_orientation, open_image

_MOST_FILES = 5_000_000


class ImageIndex:
    """The images of a folder and of those below it, hidden ones left out.

    Attributes:
        root: the folder; no image is taken from elsewhere, unless ``allow_outside``.
    """

    def __init__(self, root: Path, allow_outside: bool = False) -> None:
        self.root, self.allow_outside = root, allow_outside
        self._by_name: dict[str, list[Path]] | None = None

    def all(self, below: Path | None = None) -> list[Path]:
        """Return all images in a folder, by default the root, sorted."""
        found: list[Path] = []
        for place, folders, names in os.walk(self.root if below is None else below):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            images = (name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)
            found += (Path(place, name) for name in images if not name.startswith("."))
            if len(found) > _MOST_FILES:
                raise UserError("bad-argument", f"{self.root} holds more than {_MOST_FILES} images")
        return sorted(found)

    def holds(self, path: Path) -> bool:
        """Return whether a path leads into the root, ``..`` included; links are not followed."""
        root = os.path.abspath(self.root)
        return os.path.commonpath([root, os.path.abspath(path)]) == root

    def place(self, path: Path) -> Path:
        """Return a path in the one spelling that each file of the root has; others absolute."""
        if self.holds(path):
            return self.root / os.path.relpath(os.path.abspath(path), os.path.abspath(self.root))
        return Path(os.path.abspath(path))

    def common_folder(self, paths: Iterable[Path]) -> Path:
        """Return the folder of all paths of :meth:`place`; relative to the working folder if the root is."""
        folder = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
        return self.place(Path(folder))

    def check(self, path: Path, what: str) -> None:
        """Refuse a path outside of the root (UserError), unless that is allowed."""
        if not (self.allow_outside or self.holds(path)):
            raise UserError(
                "image-outside",
                f"{what} leads out of the folder {self.root}, to {path}; give the folder that holds both, or "
                "--images FOLDER, or set DATASETS.ALLOW_OUTSIDE True (import: --allow-outside) if you trust "
                "the file",
            )

    def find(self, name: str, near: Path, what: str) -> tuple[Path, bool]:
        """Return the file of an image, and whether it is in another folder than its name says.

        The name is taken relative to ``near`` and to the root, then as the only file in the root with the
        longest equal end of the path: names of another computer, of an upload or of a URL.

        Args:
            name: as the labels spell it.
            near: the folder of the labels.
            what: names the entry in messages, with its file.

        Raises:
            UserError: there is no such file, several would do, or it lies outside.
        """
        if not name or "\0" in name or len(name) > 4096:
            raise DataError("malformed", f"{what} has the image name {name[:60]!r}; give the name of a file")
        outside = None
        for folder in (near, self.root):
            path = Path(os.path.normpath(folder / name))
            if os.path.isfile(path):
                if self.allow_outside or self.holds(path):
                    return path, False
                outside = path
        if outside is not None:
            self.check(outside, f"{what} has the image {name!r}, which")
        best = next(filter(None, map(self._longest_end, _spellings(name))), [])
        if len(best) == 1:
            return best[0], "/" in name or "\\" in name
        if best:
            raise UserError(
                "ambiguous-image",
                f"{what} has the image {name!r}, and {len(best)} files have that name, such as {best[0]} and "
                f"{best[1]}; name its folder",
            )
        raise DataError(
            "missing-image",
            f"{what} has the image {name!r}, which is not in {self.root}; restore it, or name the folder by "
            "--images",
        )

    def _longest_end(self, name: str) -> list[Path]:
        if self._by_name is None:
            self._by_name = defaultdict(list)
            for path in self.all():
                self._by_name[path.name].append(path)
        wanted = [part for part in re.split(r"[/\\]", name) if part not in ("", ".")][::-1]
        files = self._by_name.get(wanted[0], []) if wanted else []
        if len(files) < 2:
            return files
        lengths = []
        for path in files:
            parts = path.parts[::-1]
            same = next((i for i, (a, b) in enumerate(zip(parts, wanted, strict=False)) if a != b), None)
            lengths.append(min(len(parts), len(wanted)) if same is None else same)
        return [path for path, length in zip(files, lengths, strict=True) if length == max(lengths)]


def _spellings(name: str) -> list[str]:
    """Return a name, and what it may mean: Label Studio's ``?d=``, a URL's escapes, an upload's prefix."""
    texts = [name]
    if query := re.search(r"[?&]d=([^&]+)", name):
        texts.append(query[1])
    elif re.match(r"[\w.+-]{2,}://", name):
        texts.append(name.partition("?")[0])
    texts += [unquote(text) for text in texts if "%" in text]
    texts += [re.sub(r"(^|[/\\])[0-9a-f]{8}-([^/\\]+)$", r"\1\2", text) for text in texts]
    return list(dict.fromkeys(texts))


def image_size(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (width, height) of an image file, upright and as stored; pixels are not read.

    Raises:
        UserError: the file is missing, damaged or too large.
    """
    try:
        with open_image(path) as image:
            stored = image.size
            turned = exif_orientation(image) in (5, 6, 7, 8)
    except FileNotFoundError as error:
        raise DataError("missing-image", f"image {path} is missing; restore it") from error
    except DAMAGED as error:
        raise cannot_read(path, error) from error
    if stored[0] * stored[1] > MOST_PIXELS:
        raise DataError("image-size", f"image {path} has {stored[0]}x{stored[1]} pixels, too many to read")
    return (stored[::-1] if turned else stored), stored

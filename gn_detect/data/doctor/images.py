"""Read the image files of a dataset as training reads them, and hash their content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ...errors import Code, UserError
from ...files import open_file
from ...progress import progress_bar
from ..coco.faults import DataError
from ..images import is_deep, open_image, read_image


@dataclass(frozen=True, slots=True)
class Probe:
    """The facts about an image file.

    Attributes:
        sizes: (height, width) in pixels, upright and as stored; empty for a file that cannot be read.
        digest: of its bytes; empty for a missing file.
        error: the reason for a file that cannot be read.
        brightest: value from 0 to 255, as read, of greyscale with more than 8 bits; None for other images.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    digest: str = ""
    error: DataError | None = None
    brightest: int | None = None


Probes = Mapping[str, Probe]  # by path


def probe_images(paths: Iterable[str]) -> Probes:
    """Read every file once, on all processors (decoders work outside Python's lock)."""
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(probe_image, unique)
        bar = progress_bar(found, desc="reading images", total=len(unique))
        return dict(zip(unique, bar, strict=True))


def probe_image(path: str) -> Probe:
    """Read one file."""
    digest = ""
    try:
        with open_file(path) as file:
            digest = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
        pixels = read_image(path, "RGB")
        with open_image(path) as stored:
            sizes = (pixels.shape[:2], (stored.height, stored.width))
            return Probe(sizes, digest, brightest=int(pixels.max()) if is_deep(stored) else None)
    except DataError as error:
        return Probe(digest=digest, error=error)
    except (OSError, ValueError, UserError) as error:
        missing = isinstance(error, FileNotFoundError)
        code: Code = "missing-image" if missing else "unreadable-image"
        reason = getattr(error, "strerror", None) or str(error)
        return Probe(digest=digest, error=DataError(code, f"image {path} cannot be read: {reason}"))

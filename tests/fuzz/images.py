"""Seeded damage to image files of many formats and modes."""

from __future__ import annotations

import io
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gn_detect.data.doctor.reading import probe_image
from gn_detect.data.images import read_image
from gn_detect.errors import UserError
from tests.fuzz.trial import Tally

SIZE = (48, 36)
"""Width and height."""

FORMATS = {
    "PNG": ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"],
    "JPEG": ["RGB", "L", "CMYK"],
    "BMP": ["RGB", "L", "P", "1"],
    "GIF": ["P", "L", "RGB"],
    "TIFF": ["RGB", "L", "CMYK", "I;16", "F", "1", "RGBA"],
    "WEBP": ["RGB", "RGBA"],
    "PPM": ["RGB", "L"],
    "TGA": ["RGB", "RGBA"],
}


def encode(kind: str, mode: str, seed: int) -> bytes:
    """A noisy picture."""
    noise = np.random.default_rng(seed)
    width, height = SIZE
    if mode in ("I;16", "F"):
        values = noise.integers(0, 60000, (height, width))
        picture = Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.float32))
    else:
        picture = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)
    file = io.BytesIO()
    options: dict[str, Any] = {}
    if kind in ("PNG", "JPEG", "WEBP"):
        exif = Image.Exif()
        exif[274] = seed % 10
        options["exif"] = exif
    picture.save(file, format=kind, **options)
    return file.getvalue()


def damage(data: bytes, chance: random.Random) -> bytes:
    """Something cut off, overwritten, put in or put behind."""
    at = chance.randrange(len(data))
    early = min(at, chance.randrange(64))
    junk = chance.randbytes(chance.choice([1, 2, 8, 300]))
    return chance.choice(
        [
            data[:at],
            data[:early],
            data[:at] + junk + data[at + len(junk) :],
            data[:early] + junk + data[early + len(junk) :],
            data[:at] + junk + data[at:],
            data[:early] + b"\xff" * 4 + data[early + 4 :],
            data[:at] + bytes(len(data) - at),
            data + junk,
            b"",
            junk,
            data[::-1],
        ]
    )


def try_image(folder: Path, seed: int, tally: Tally) -> None:
    """One damaged file, read as training does, and probed by the doctor."""
    chance = random.Random(seed)
    kind = chance.choice(list(FORMATS))
    mode = chance.choice(FORMATS[kind])
    path = folder / f"{seed}.{chance.choice([kind.lower(), 'jpg', 'png', 'txt'])}"
    path.write_bytes(damage(encode(kind, mode, seed), chance))
    label = f"image {seed} ({kind} {mode})"
    tally.cases += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = SIZE[::-1] if chance.random() < 0.7 else None
        outcome = tally.attempt(label, read_image, path, "RGB", expected)
        probe = tally.attempt(label, probe_image, str(path))
    if isinstance(outcome, UserError):
        tally.refused += 1
        if probe is not None and (probe.error is not None or expected not in (None, *probe.sizes)):
            tally.named += 1
        else:
            tally.unnamed.append(f"{label}: {outcome}")
    elif outcome is not None:
        tally.passed += 1
        if outcome.dtype != np.uint8 or outcome.ndim != 3 or (expected and outcome.shape[:2] != expected):
            tally.failures.append(f"{label}: wrong success: {outcome.dtype} {outcome.shape}")
        if probe is not None and probe.error is not None:
            tally.failures.append(f"{label}: the doctor refuses what is read: {probe.error}")
    path.unlink()

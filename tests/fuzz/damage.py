"""Seeded damage to any file: to its bytes, to its text, to the values of a JSON or YAML tree."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from tests.fuzz.annotations import JUNK

MORE: list[Any] = [
    "NaN", "-5", "1e999", "1.0", "true", "$5_$9", r"\frac{", "a\nerror: forged", "\x1b]0;title\x07\x1b[2J",
    "\r", "é", "None", -5, 1.0, 1.5, 10**19, "9" * 5000, [[1, 2], [3, 4]], [1] * 1000, {"": 1}, "/dev/zero",
    "<b>", "\u202e", {"a": {"b": {"c": None}}},
]  # fmt: skip
"""Values that do not belong in files of a run, or do, where they stand."""

DEEP = 100_000


def junk(chance: random.Random) -> Any:
    """A value that does not belong."""
    return copy.deepcopy(chance.choice(JUNK + MORE))


def damage_tree(content: Any, chance: random.Random) -> Any:
    """``content`` with values replaced, left out, moved or renamed; sometimes another value at all."""
    if not isinstance(content, dict | list) or not content or chance.random() < 0.08:
        return junk(chance)
    for _ in range(chance.choice([1, 1, 1, 2, 5])):
        node, key = _place(content, chance)
        kind = chance.random()
        if kind < 0.6:
            node[key] = junk(chance)
        elif kind < 0.75:
            del node[key]
        elif kind < 0.85:
            other, place = _place(content, chance)
            node[key] = copy.deepcopy(other[place])
        elif isinstance(node, dict):
            node[
                chance.choice(["", "x", "iteration", "AP-\n$x$", "total_loss", "loss_\x1b[1m", str(key) * 3])
            ] = node.pop(key) if chance.random() < 0.5 else junk(chance)
        else:
            node.insert(chance.randrange(len(node) + 1), junk(chance))
        if not content:
            return content
    return content


def _place(content: Any, chance: random.Random) -> tuple[Any, Any]:
    """A container, and a key in it."""
    node = content
    while True:
        key = chance.choice(list(node)) if isinstance(node, dict) else chance.randrange(len(node))
        inner = node[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.2:
            return node, key
        node = inner


def dumps(content: Any, **options: Any) -> bytes:
    """JSON, with NaN and half surrogate pairs as Python writes them."""
    return json.dumps(content, **options).encode("utf-8", "surrogatepass")


def damage_text(text: bytes, chance: random.Random) -> bytes:
    """JSON or YAML that is cut off, of another encoding, or with something in it that does not belong."""
    at = chance.randrange(len(text) + 1)
    inserted = chance.choice(
        [
            b"NaN",
            b"1" * 5000,
            b"1e999",
            b"-Infinity",
            b"[" * DEEP,
            b'{"a":' * DEEP,
            b"null",
            b"\xef\xbb\xbf",
            b'"',
            b"\x00",
            b"\n",
            b"\r\n",
            b"\xff\xfe",
            b"\x1b[31m",
            b"\xe2\x80\xa8",
            b"0",
            b"-",
            b"}",
            b"]",
            b",",
        ]
    )
    return chance.choice(
        [
            lambda: text[:at],
            lambda: text[:at] + inserted + text[at:],
            lambda: text[:at] + inserted + text[at + len(inserted) :],
            lambda: text[at:],
            lambda: text.decode("utf-8", "replace").encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.replace(b"\n", b"\r\n"),
            lambda: text + text,
            lambda: text[::-1],
            lambda: text.replace(b": ", b":", 3),
        ]
    )()


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """A bit or byte flipped, something cut off, overwritten, put in or put behind."""
    at = chance.randrange(len(data))
    near = chance.choice(
        [at, max(0, len(data) - 1 - chance.randrange(300)), chance.randrange(min(300, len(data)))]
    )
    noise = chance.randbytes(chance.choice([1, 2, 8, 300]))
    flipped = bytearray(data)
    flipped[near] ^= 1 << chance.randrange(8)
    return chance.choice(
        [
            bytes(flipped),
            bytes(flipped),
            bytes(flipped),
            data[:near],
            data[:near] + noise + data[near + len(noise) :],
            data[:near] + noise + data[near:],
            data[:near] + bytes(len(noise)) + data[near + len(noise) :],
            data[:near] + data[near + len(noise) :],
            data + noise,
            data[near:],
        ]
    )


def remove(path: Path) -> None:
    """Whatever is there, if anything is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, chance: random.Random) -> str:
    """Put something in the place of a file that is none; returns what."""
    kind = chance.choice(
        ["missing", "folder", "empty", "noise", "fifo", "device", "dangling", "itself", "zip"]
    )
    remove(path)
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.touch()
    elif kind == "noise":
        path.write_bytes(chance.randbytes(3000))
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "itself":
        path.symlink_to(path.name)
    elif kind == "zip":
        path.write_bytes(b"PK\x03\x04" + chance.randbytes(100))
    return kind

"""``gn-detect zoo``: published weights listed, explained, downloaded and checked."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import UserError
from .output import Result

if TYPE_CHECKING:
    from ..weights.zoo import ZooEntry

EXAMPLES = """
gn-detect zoo list
gn-detect zoo info R-50-GN
gn-detect zoo download R-50-GN
gn-detect zoo verify
gn-detect zoo list --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "path prints the place of a file, also before its download"
    add("action", choices=["download", "info", "list", "path", "verify"], help=text)
    add("names", nargs="*", metavar="NAME", help="a name in the list; default: all, except for download")
    add("--all", action="store_true", help="download: all, several GB")
    add("--markdown", action="store_true", help="list: the table of model_zoo/README.md")


def run(args: argparse.Namespace) -> Result:
    from ..weights.zoo import check, fetch, find_entry, read_catalog

    entries = [find_entry(name) for name in args.names] or list(read_catalog().values())
    if args.action == "download" and bool(args.names) == args.all:
        raise UserError(
            "missing-argument",
            "name what to download, such as R-50-GN (gn-detect zoo list shows all), or --all",
        )
    if args.action == "verify" and not args.names:
        entries = [entry for entry in entries if entry.file.is_file()]
        if not entries:
            print("nothing is downloaded")
    if args.action == "list":
        print(as_markdown(entries) if args.markdown else _as_table(entries), end="")
    for entry in entries:
        if args.action == "info":
            lines = [f"  {label:13} {text}" for label, text in _facts(entry) if text]
            print("\n".join([entry.name, *lines]))
        elif args.action == "download":
            print(f"{entry.name}: {fetch(entry)}, {check(entry)}")
        elif args.action == "verify":
            print(f"{entry.name}: {check(entry)}")
        elif args.action == "path":
            print(entry.file)
    files = [{"file": str(entry.file), "is_downloaded": entry.file.is_file()} for entry in entries]
    return Result([entry.model_dump() | file for entry, file in zip(entries, files, strict=True)])


def _as_table(entries: Iterable[ZooEntry]) -> str:
    rows = [("name", "box/mask AP", "trained", "downloaded")]
    for entry in entries:
        here = "yes" if entry.file.is_file() else "-"
        rows.append((entry.name, _quality(entry), entry.schedule.replace("epochs", "ep") or "ImageNet", here))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)


def _facts(entry: ZooEntry) -> Iterator[tuple[str, str]]:
    """Yield labels and values with their units; an unknown value is empty."""
    from ..weights.download import MD5_BESIDE

    is_here = entry.file.is_file()
    size = entry.file.stat().st_size if is_here else entry.bytes
    schedule = entry.schedule
    if schedule.endswith("x"):
        schedule += ", where 1x is 90,000 iterations of 16 images"
    top1 = f"{entry.top1_error}% of ImageNet's val images" if entry.top1_error is not None else ""
    md5 = f"md5, at {entry.url}.md5"
    yield "kind", entry.kind
    yield "names", f"{entry.scheme}'s"
    yield "url", entry.url
    yield "size", f"{size / 1e6:.1f} MB" if size else ""
    yield "checksum", {"": "none is published", MD5_BESIDE: md5}.get(entry.checksum, entry.checksum)
    yield "box AP", f"{entry.box_ap}% on COCO val" if entry.box_ap is not None else ""
    yield "mask AP", f"{entry.mask_ap}% on COCO val" if entry.mask_ap is not None else ""
    yield "top-1 error", top1
    yield "schedule", schedule
    yield "GPU memory", f"{entry.memory:g} GB for 2 images in training" if entry.memory else ""
    yield "training step", f"{entry.seconds:g} s for 16 images on 8 GPUs" if entry.seconds else ""
    yield "licence", entry.licence
    yield "source", entry.source
    yield "also called", " ".join(entry.aliases)
    yield "here" if is_here else "goes to", str(entry.file)
    keys = "".join(f" '{word}'" if " " in word else f" {word}" for word in entry.overrides)
    yield "use", f"--config-file {entry.config} --weights zoo://{entry.name}{keys}"


def as_markdown(entries: Iterable[ZooEntry]) -> str:
    """Return the catalogue as a Markdown table."""
    from ..weights.download import MD5_BESIDE

    lines = [
        "| name | box / mask AP | schedule | GB | s/iter | config | checksum | licence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in entries:
        cells = [
            f"[{entry.name}]({entry.url})",
            _quality(entry),
            entry.schedule or "ImageNet",
            _number(entry.memory),
            _number(entry.seconds),
            f"`{entry.config}`" + (" and keys" if entry.overrides else ""),
            {"": "none", MD5_BESIDE: "md5"}.get(entry.checksum, entry.checksum.partition(":")[0]),
            f"[{entry.licence}]({entry.source})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _quality(entry: ZooEntry) -> str:
    if entry.box_ap is not None:
        return f"{entry.box_ap} / {'-' if entry.mask_ap is None else entry.mask_ap}"
    return f"{entry.top1_error}% top-1 error" if entry.top1_error is not None else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"

"""Examine annotation files and their images, and report all faults as text or JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...text import printable
from ..coco.dataset import list_names, match_names
from ..coco.faults import FAULTS, NOTE, SEVERITIES, DataError, Finding
from ..datasets import DatasetSource
from .checks import LARGE, SMALL, Part, check_part
from .reading import Probes, Reading, probe_images, read_as_meant
from .repair import Repair, repair

EXAMPLES = 5  # of each kind of fault, in the text

_MOST_CLASSES, _LONGEST_NAME = 20, 32  # rows of the table of classes, and characters of a name in it


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's findings.

    Attributes:
        parts: one for each annotation file.
        findings: of the parts and between them.
        probes: of the image files; None if they were not opened.
        fix: the repaired copy of the first part.
    """

    parts: list[Part]
    findings: list[Finding]
    probes: Probes | None
    fix: Repair

    @property
    def healthy(self) -> bool:
        """Return whether there is no error and no warning; notes may be."""
        return all(finding.severity == NOTE for finding in self.findings)

    def kinds(self) -> dict[str, list[Finding]]:
        """Return the findings by kind: errors first, the most frequent first."""
        grouped: dict[str, list[Finding]] = {}
        for finding in self.findings:
            grouped.setdefault(finding.kind, []).append(finding)
        order = sorted(grouped, key=lambda k: (SEVERITIES.index(FAULTS[k].severity), -len(grouped[k])))
        return {kind: grouped[kind] for kind in order}

    def as_json(self) -> dict[str, Any]:
        """Return parts, a summary by kind, every finding, and the work of ``--fix``."""
        return {
            "parts": [
                {
                    "name": part.name,
                    "images_folder": str(part.rules.folder),
                    **_counts(part),
                    "classes": _classes(part),
                    "objects_per_image": _per_image(part),
                }
                for part in self.parts
            ],
            "summary": {
                kind: {**asdict(FAULTS[kind]), "count": len(found)} for kind, found in self.kinds().items()
            },
            "findings": [{"severity": f.severity, **asdict(f)} for f in self.findings],
            "fix": {
                "repairs": self.fix.num_changes,
                "removes": len(self.fix.removals),
                "removed": self.fix.removed,
            },
        }

    def __str__(self) -> str:
        lines = [line for part in self.parts for line in _table(part)]
        if self.probes is None:
            lines.append("images were not opened")
        severity = ""
        for kind, found in self.kinds().items():
            fault = FAULTS[kind]
            if fault.severity != severity:
                severity = fault.severity
                lines += ["", f"{severity.upper()}S"]
            lines.append(f"  {len(found)} x {fault.title} [{kind}]")
            for finding in found[:EXAMPLES]:
                part = f"{finding.part}: " if len(self.parts) > 1 else ""
                file = f"{finding.file_name}: " if finding.file_name else ""
                lines.append(f"      {part}{file}{finding.detail}")
            if len(found) > EXAMPLES:
                lines.append(f"      and {len(found) - EXAMPLES} more")
            lines.append(f"    -> {fault.remedy}" + (f"; --fix {fault.fix}" if fault.fix else ""))
        count = Counter(finding.severity for finding in self.findings)
        numbers = [f"{count[kind]} {kind}" + "s" * (count[kind] != 1) for kind in SEVERITIES]
        return "\n".join([*map(printable, lines), "", ", ".join(numbers) + self._hint()])

    def _hint(self) -> str:
        counts = {"repairs": self.fix.num_changes, "removes": len(self.fix.removals)}
        work = " and ".join(f"{verb} {count}" for verb, count in counts.items() if count)
        part = f" of {self.parts[0].name}" if len(self.parts) > 1 else ""
        return f"; --fix OUT.json {work} in a copy{part}" if work else ""


def examine(
    sources: Sequence[DatasetSource], *, open_images: bool = True, masks: bool = True, crowds: bool = True
) -> Diagnosis:
    """Look at every annotation and every image.

    Args:
        sources: of the parts, such as train and val, which are also compared with each other.
        open_images: read all image files; without, only the JSON is looked at.
        masks: objects must have a segmentation, if some has one (``MODEL.MASK_ON``).
        crowds: crowds stay crowds in the repaired copy; each becomes an object otherwise.

    Raises:
        UserError: a file is missing, not JSON or not COCO at all.
    """
    readings = [read_as_meant(source, names=open_images, masks=masks) for source in sources]
    probes = probe_images(path for reading in readings for path in _paths(reading)) if open_images else None
    parts = [
        check_part(source.name, reading, probes) for source, reading in zip(sources, readings, strict=True)
    ]
    findings = [finding for part in parts for finding in part.findings] + compare_parts(parts)
    reading = readings[0]
    fix = Repair.of(reading.content)
    if any(FAULTS[finding.kind].fix for finding in findings) or not crowds:
        fix = repair(reading.content, reading.rules, probes, leaked_paths(parts), reading.masks, crowds)
    fix.changes[:0] = reading.changes
    fix.num_changes += reading.num_changes
    return Diagnosis(parts, findings, probes, fix)


def _paths(reading: Reading) -> Iterator[str]:
    for entry in reading.content["images"]:
        with suppress(DataError):
            yield str(reading.rules.image_path(entry, ""))


def compare_parts(parts: Sequence[Part]) -> list[Finding]:
    """Find pictures and files that two parts share, and categories in which they differ."""
    findings = []
    for number, first in enumerate(parts):
        digests = {digest: image_id for image_id, digest in first.digests.items()}
        paths = {record.file_name: image_id for image_id, record in first.images.items()}
        for second in parts[number + 1 :]:
            names, known = ([name for _, name in sorted(p.categories.items())] for p in (second, first))
            try:
                match_names(names, known if number == 0 else names)
            except ValueError as error:
                detail = f"{first.name} has {list_names(known)}, and {second.name} has {list_names(names)}"
                findings.append(Finding("classes-differ", second.name, f"{detail}: {error}"))
            for image_id, record in second.images.items():
                same = digests.get(second.digests.get(image_id, ""), paths.get(record.file_name))
                if same is not None:
                    detail = f"image {image_id} of {second.name} is image {same} of {first.name}"
                    name = Path(record.file_name).name
                    findings.append(Finding("leak", second.name, detail, image_id, file_name=name))
    return findings


def leaked_paths(parts: Sequence[Part]) -> set[str]:
    """Return the files of the first part whose picture is in another part, too."""
    first, others = parts[0], parts[1:]
    digests = {digest for part in others for digest in part.digests.values()}
    paths = {record.file_name for part in others for record in part.images.values()}
    return {
        record.file_name
        for image_id, record in first.images.items()
        if record.file_name in paths or first.digests.get(image_id) in digests
    }


def _counts(part: Part) -> dict[str, int]:
    return {
        "images": len(part.images),
        "annotations": part.annotations,
        "crowds": part.crowds,
        "categories": len(part.categories),
    }


def _classes(part: Part) -> list[dict[str, Any]]:
    """Return number and sizes of the objects of each class without crowds, the most frequent first."""
    order = sorted(part.categories, key=lambda key: (-part.category_counts[key], key))
    return [{"id": key, "name": part.categories[key], **_sizes([key], part)} for key in order]


def _sizes(keys: Sequence[int], part: Part) -> dict[str, Any]:
    sides = np.array([side for key in keys for side in part.sides.get(key, ())])
    small, large = int((sides < SMALL).sum()), int((sides >= LARGE).sum())
    return {
        "objects": len(sides),
        "small": small,
        "medium": len(sides) - small - large,
        "large": large,
        "median_side": round(float(np.median(sides)), 1) if len(sides) else None,
    }


def _per_image(part: Part) -> dict[str, float] | None:
    """Return the least, median and largest number of objects of an image; None without an image."""
    counts = [part.image_counts[key] for key in part.images]
    return {"min": min(counts), "median": float(np.median(counts)), "max": max(counts)} if counts else None


def _table(part: Part) -> list[str]:
    """Return a heading, a row for each class, and the number of objects of an image."""
    counts = ", ".join(f"{value} {key}" for key, value in _counts(part).items())
    lines = [f"{part.name}: {counts}"]
    classes = _classes(part)
    rows = [(_fit(row["name"]), row) for row in classes[:_MOST_CLASSES]]
    if rest := [row["id"] for row in classes[_MOST_CLASSES:]]:
        rows.append((f"and {len(rest)} more", _sizes(rest, part)))
    if not rows:
        return lines
    width = max(len("class"), *(len(name) for name, _ in rows))
    lines.append(f"  {'class':{width}}  objects    small   medium    large  median side (pixels)")
    for name, row in rows:
        side = "" if row["median_side"] is None else f"{row['median_side']:13.1f}"
        numbers = "".join(f"{row[key]:9d}" for key in ("objects", "small", "medium", "large"))
        lines.append(f"  {name:{width}}{numbers}{side}")
    if spread := _per_image(part):
        values = ", ".join(f"{key} {value:g}" for key, value in spread.items())
        lines.append(f"  objects in an image: {values}")
    return lines


def _fit(name: str) -> str:
    """Return a name on one line of bounded length."""
    text = printable(name)
    return text if len(text) <= _LONGEST_NAME else f"{text[: _LONGEST_NAME - 3]}..."

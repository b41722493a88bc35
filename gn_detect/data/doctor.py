"""The dataset doctor: everything that is wrong with one or several annotation files and their images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..text import printable
from .coco_json import load_coco
from .coco_rules import Rules, image_file
from .datasets import DatasetSource
from .doctor_checks import Part, check_part
from .doctor_images import Probes, probe_images
from .faults import ERROR, FAULTS, NOTE, SEVERITIES, WARNING, DataError, Finding

EXAMPLES = 5
"""Of each kind of fault, in the text."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        parts: one for each annotation file.
        findings: of the parts and between them.
        probes: of the image files; None if they were not opened.
    """

    parts: list[Part]
    findings: list[Finding]
    probes: Probes | None

    @property
    def healthy(self) -> bool:
        """Whether there is no error and no warning; notes may be."""
        return all(finding.severity == NOTE for finding in self.findings)

    def kinds(self) -> dict[str, list[Finding]]:
        """Findings by kind: errors first, the most frequent first."""
        grouped: dict[str, list[Finding]] = {}
        for finding in self.findings:
            grouped.setdefault(finding.kind, []).append(finding)
        order = sorted(grouped, key=lambda k: (SEVERITIES.index(FAULTS[k].severity), -len(grouped[k])))
        return {kind: grouped[kind] for kind in order}

    def as_json(self) -> dict[str, Any]:
        """For machines: parts, a summary by kind, and every finding."""
        return {
            "parts": [
                {"name": part.name, "images_folder": str(part.rules.folder), **_counts(part)}
                for part in self.parts
            ],
            "summary": {
                kind: {**asdict(FAULTS[kind]), "count": len(found)} for kind, found in self.kinds().items()
            },
            "findings": [{"severity": f.severity, **asdict(f)} for f in self.findings],
        }

    def __str__(self) -> str:
        lines = [_heading(part) for part in self.parts]
        if self.probes is None:
            lines.append("images were not opened")
        for severity in SEVERITIES:
            kinds = {k: found for k, found in self.kinds().items() if FAULTS[k].severity == severity}
            if kinds:
                lines += ["", f"{severity.upper()}S"]
            for kind, found in kinds.items():
                lines += _section(kind, found, len(self.parts) > 1)
        count = Counter(finding.severity for finding in self.findings)
        repaired = sum(bool(FAULTS[finding.kind].repair) for finding in self.findings)
        hint = f"; --fix OUT.json repairs {repaired} of them in a copy" if repaired else ""
        total = f"{_number(count[ERROR], 'error')}, {_number(count[WARNING], 'warning')}"
        return "\n".join([*map(printable, lines), "", f"{total}, {_number(count[NOTE], 'note')}{hint}"])


def examine(sources: Sequence[DatasetSource], *, open_images: bool = True, masks: bool = True) -> Diagnosis:
    """Look at every annotation and, unless told not to, at every image.

    Args:
        sources: of the parts, such as train and val, which are also compared with each other.
        open_images: read all image files; without, only the JSON is looked at.
        masks: objects must have a segmentation (``MODEL.MASK_ON``).

    Raises:
        UserError: a file is missing, not JSON or not COCO at all.
    """
    contents = [load_coco(source.annotations) for source in sources]
    probes = None
    if open_images:
        probes = probe_images(
            path
            for source, content in zip(sources, contents, strict=True)
            for path in image_paths(content, source.images, source.allow_outside)
        )
    parts = [
        check_part(
            source.name,
            Rules(source.annotations, source.images, True, source.allow_outside),
            content,
            probes,
            masks,
        )
        for source, content in zip(sources, contents, strict=True)
    ]
    findings = [finding for part in parts for finding in part.findings]
    return Diagnosis(parts, findings + compare_parts(parts), probes)


def image_paths(content: dict[str, Any], folder: Path, allow_outside: bool) -> list[str]:
    """Paths of all images that have a usable file name."""
    names = [entry.get("file_name") for entry in content["images"] if isinstance(entry, dict)]
    paths = []
    for name in names:
        if isinstance(name, str) and name and "\0" not in name:
            with suppress(DataError):
                paths.append(str(image_file(folder, name, allow_outside)))
    return paths


def compare_parts(parts: Sequence[Part]) -> list[Finding]:
    """Pictures and files that two parts share, and categories in which they differ."""
    findings = []
    for number, first in enumerate(parts):
        digests = {digest: image_id for image_id, digest in first.digests.items()}
        paths = {record.file_name: image_id for image_id, record in first.images.items()}
        for second in parts[number + 1 :]:
            if sorted(first.categories.items()) != sorted(second.categories.items()):
                detail = f"{first.name} and {second.name} do not list the same categories"
                findings.append(Finding("classes-differ", second.name, detail))
            for image_id, record in second.images.items():
                same = digests.get(second.digests.get(image_id, ""), paths.get(record.file_name))
                if same is not None:
                    detail = f"image {image_id} of {second.name} is image {same} of {first.name}"
                    name = Path(record.file_name).name
                    findings.append(Finding("leak", second.name, detail, image_id, file_name=name))
    return findings


def leaked_paths(parts: Sequence[Part]) -> set[str]:
    """Files of the first part whose picture is in another part, too."""
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


def _heading(part: Part) -> str:
    shown = ", ".join(f"{value} {key}" for key, value in _counts(part).items())
    return f"{part.name}: {shown}"


def _section(kind: str, found: Sequence[Finding], name_part: bool) -> list[str]:
    fault = FAULTS[kind]
    lines = [f"  {len(found)} x {fault.title} [{kind}]"]
    for finding in found[:EXAMPLES]:
        part = f"{finding.part}: " if name_part else ""
        file = f"{finding.file_name}: " if finding.file_name else ""
        lines.append(f"      {part}{file}{finding.detail}")
    if len(found) > EXAMPLES:
        lines.append(f"      and {len(found) - EXAMPLES} more")
    repair = f"; --fix {fault.repair}" if fault.repair else ""
    return [*lines, f"    -> {fault.remedy}{repair}"]


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"

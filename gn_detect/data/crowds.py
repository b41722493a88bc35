"""Count the crowds of a dataset, which training leaves out, and tell real ones from single objects."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .coco_rules import Rules
from .doctor_masks import is_one_piece, measure_mask
from .faults import DataError

MANY = 0.05
"""Part of a dataset's annotations; of COCO's 1 in 80 is a crowd."""

_MEASURED, _SMALL = 50, 0.25
"""How many crowds are measured at most, and the largest part of its image that a small object has."""


@dataclass(frozen=True)
class Crowds:
    """Counts of a dataset.

    Attributes:
        objects: annotations, crowds among them.
        crowds: annotations with ``iscrowd`` 1.
        measured: crowds whose mask was looked at.
        single: those of them whose mask is one small piece.
    """

    objects: int = 0
    crowds: int = 0
    measured: int = 0
    single: int = 0

    @property
    def dubious(self) -> bool:
        """Whether crowds are many, or most are single small objects: some tools write 1 for every RLE."""
        return self.crowds > MANY * self.objects or 2 * self.single > self.measured

    def __add__(self, other: Crowds) -> Crowds:
        return Crowds(
            self.objects + other.objects,
            self.crowds + other.crowds,
            self.measured + other.measured,
            self.single + other.single,
        )

    def __str__(self) -> str:
        text = f"{self.crowds} of {self.objects} objects are crowds and left out of training"
        if not self.single:
            return text
        looked_at = "" if self.measured == self.crowds else f" of {self.measured} looked at"
        return f"{text}; {self.single}{looked_at} are one small object each"


def count_crowds(content: Mapping[str, Any], rules: Rules) -> Crowds:
    """Count the crowds of a file in canonical form; a crowd without a usable mask is not measured."""
    entries = [entry for entry in content["annotations"] if isinstance(entry, dict)]
    crowds = [entry for entry in entries if entry.get("iscrowd") == 1]
    images = (
        {image.get("id"): image for image in content["images"] if isinstance(image, dict)} if crowds else {}
    )
    found = []
    for entry in crowds[:_MEASURED]:
        with suppress(
            DataError, KeyError, ValueError, TypeError
        ):  # the rules say so, where the mask is needed
            image = rules.image({"file_name": "_", **images[entry.get("image_id")]}, 0)
            polygons, rle = rules.segmentation(entry.get("segmentation"), image, "")
            if not polygons and not rle:
                continue
            measures = measure_mask(polygons, rle, image)
            small = measures.area <= _SMALL * image.height * image.width
            found.append(small and is_one_piece(measures.rle))
    return Crowds(len(content["annotations"]), len(crowds), len(found), sum(found))

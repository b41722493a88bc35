"""Read the objects of each image of an annotation file, ready to be compared with detections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.coco.canonical import CocoFile, has_mask
from ..data.coco.reader import log_notes
from ..errors import UserError
from .coco_data import Json, prepare_ground_truth, read_annotations


@dataclass(frozen=True)
class Truth:
    """An annotation file by image, with ids as in :class:`.data.canonical.CocoFile`.

    Attributes:
        path: the file.
        file_names: by image id, relative to the folder of the images.
        sizes: (height, width) by image id, if the file has them.
        category_ids, class_names: in order of the ids. The id is appended to a name that several share.
        plain_names: the names as they stand in the file.
        objects: annotations by image id, with ``category_id``, ``bbox``, ``area``, ``iscrowd`` and, if they
            have masks, ``segmentation`` as compressed RLE; an empty list for an image without any.
        content: the file in canonical form.
    """

    path: Path
    file_names: dict[Any, str]
    sizes: dict[Any, tuple[int, int]]
    category_ids: list[int]
    class_names: list[str]
    plain_names: list[str]
    objects: dict[Any, list[Json]]
    content: CocoFile

    def image_id_of(self, path: str | Path) -> Any:
        """Return the id of the image whose file name is the longest end of ``path``.

        Raises:
            UserError: the file lists no such image, or several.
        """
        found = self._ids_of(path)
        if not found:
            raise UserError(
                "unlisted-image",
                f"{self.path} does not list the image {path}; leave it out, or --annotations, or give its "
                "folder, of which the listed images are taken",
            )
        if len(found) > 1:
            raise UserError(
                "ambiguous-image", f"{self.path} lists the image {path} {len(found)} times; number each once"
            )
        return found[0]

    def lists(self, path: str | Path) -> bool:
        """Return whether the file lists the image, once or several times."""
        return bool(self._ids_of(path))

    def _ids_of(self, path: str | Path) -> list[Any]:
        parts = Path(path).absolute().parts
        names = ("/".join(parts[start:]).lstrip("/") for start in range(len(parts)))
        return next((self._by_name[name] for name in names if name in self._by_name), [])

    @cached_property
    def _by_name(self) -> dict[str, list[Any]]:
        names: dict[str, list[Any]] = {}
        for image_id, name in self.file_names.items():
            names.setdefault(Path(name).as_posix().lstrip("/"), []).append(image_id)
        return names


def read_truth(path: str | Path, iou_type: str | None = None) -> Truth:
    """Read an annotation file.

    Args:
        path: COCO JSON.
        iou_type: ``"segm"`` reads masks, ``"bbox"`` does not. By default masks are read if each annotation
            has one.

    Raises:
        UserError: it is not COCO, or an annotation is incomplete.
    """
    file = read_annotations(path)
    log_notes(file)
    if iou_type is None:
        entries = file.content["annotations"]
        iou_type = "segm" if all(isinstance(e, dict) and has_mask(e) for e in entries) else "bbox"
    truth = prepare_ground_truth(file, iou_type)
    image_ids = {number: key for key, number in truth.images.items()}
    category_ids = {number: key for key, number in truth.categories.items()}
    objects: dict[Any, list[Json]] = {key: [] for key in truth.images}
    for entry in truth.coco["annotations"]:
        image_id = image_ids[entry["image_id"]]
        entry = {**entry, "image_id": image_id, "category_id": category_ids[entry["category_id"]]}
        objects[image_id].append(entry)
    names = {image["id"]: str(image.get("file_name", image["id"])) for image in file.content["images"]}
    sizes = {key: size for key, number in truth.images.items() if (size := truth.sizes[number]) is not None}
    plain = [category["name"] for category in truth.coco["categories"]]
    return Truth(Path(path), names, sizes, list(truth.categories), truth.labels, plain, objects, file)

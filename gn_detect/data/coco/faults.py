"""All kinds of faults of a dataset: severity, meaning and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...errors import Code, UserError
from ...text import printable

# ERROR: training or evaluation stops, or its numbers mean nothing. WARNING: it goes on with less or other
# data than meant. NOTE: usual in many datasets, and good to know.
SEVERITIES = ERROR, WARNING, NOTE = "error", "warning", "note"


class DataError(UserError):
    """An error in a dataset.

    Attributes:
        code: key of :data:`FAULTS`.
        detail: the message without the annotation file, which ``path`` puts before it.
    """

    def __init__(self, code: Code, message: str, path: Path | None = None) -> None:
        super().__init__(code, message if path is None else f"{path}: {message}")
        self.detail = printable(message)


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        title: names it, in the plural.
        remedy: for a person.
        repair: done by ``--fix`` without a loss; may be empty.
        removal: removed by ``--fix``, with a ``repair`` only where that is not possible; may be empty.
    """

    severity: str
    title: str
    remedy: str
    repair: str = ""
    removal: str = ""

    @property
    def fix(self) -> str:
        """Describe the work of ``--fix``; empty if only a person can decide."""
        if self.repair and self.removal:
            return f"{self.repair}; where it cannot, it removes {self.removal}"
        return self.repair or (f"removes {self.removal}" if self.removal else "")


_OBJECT = "the annotations"
_IMAGES = "the images and their annotations"
_FROM_MASK = "takes the mask's box, or cuts the box at the border where there is no mask"
_error, _warning, _note = (partial(Fault, severity) for severity in SEVERITIES)

FAULTS: dict[str, Fault] = {
    "malformed": _error(
        "entries without a field, or with a field of a wrong type",
        "complete them",
        "gives ids to annotations, names to categories and the files' sizes to images",
        "the entries, and the annotations of images and categories that go",
    ),
    "empty-list": _error("empty lists", "add images, categories and annotations"),
    "fractions": _error(
        "files whose boxes or polygons are fractions of the image",
        "multiply them by the image's width and height",
        "multiplies them by the image's width and height",
    ),
    "duplicate-category-id": _error(
        "category ids that are listed twice", "give each category its own id", removal="all but the first"
    ),
    "duplicate-image-id": _error(
        "image ids that are listed twice", "give each image its own id", removal="all but the first"
    ),
    "duplicate-annotation-id": _error(
        "annotation ids that occur twice", "give each annotation its own id", "gives new ids"
    ),
    "dangling-image": _error(
        "annotations of images that are not listed", "add the images or remove them", removal=_OBJECT
    ),
    "dangling-category": _error(
        "annotations of categories that are not listed", "add the categories or correct them", removal=_OBJECT
    ),
    "image-size": _error(
        "images of an impossible size in the JSON",
        "correct width and height",
        "takes the file's size if all annotations fit into it",
        _IMAGES,
    ),
    "missing-image": _error(
        "images whose file is missing", "restore the files or correct --images", removal=_IMAGES
    ),
    "misnamed-image": _error(
        "images whose file is there under a nearly equal name",
        "correct 'file_name'",
        "renames them in 'file_name'",
    ),
    "image-outside": _error(
        "images outside of the images folder (absolute names, or with ..)",
        "give names relative to the folder, or trust the file with DATASETS.ALLOW_OUTSIDE True",
        removal=_IMAGES,
    ),
    "unreadable-image": _error("images that cannot be read", "replace the files", removal=_IMAGES),
    "size-differs": _error(
        "images whose file has another size than the JSON says",
        "correct the size, or find out whether images were resized after they were annotated",
        "takes the file's size if all annotations fit into it and it is not that of the annotated picture "
        "resized",
        _IMAGES,
    ),
    "bad-box": _error("boxes that are not x, y, width, height", "correct 'bbox'", _FROM_MASK, _OBJECT),
    "box-outside": _error(
        "boxes outside the image",
        "correct 'bbox' (x, y, width, height in pixels)",
        "takes the mask's box",
        _OBJECT,
    ),
    "bad-flag": _error(
        "'iscrowd' or 'ignore' with a wrong value", "use 'iscrowd' 0 or 1", "sets 'iscrowd' 0 or 1"
    ),
    "bad-area": _error(
        "areas that are no positive number", "correct them", "takes the mask's area, or else the box's"
    ),
    "no-mask": _error(
        "objects without a segmentation among others that have one",
        "add one, or set MODEL.MASK_ON False (doctor: --no-masks)",
        removal=_OBJECT,
    ),
    "bad-polygon": _error(
        "polygons that are no list of finite numbers near the image",
        "correct them",
        removal="the polygons, and objects that have no other",
    ),
    "rle-size": _error(
        "RLE masks of another size than their image", "encode them at the image's size", removal=_OBJECT
    ),
    "bad-rle": _error("RLE masks that are damaged", "encode them again", removal=_OBJECT),
    "classes-differ": _error(
        "parts whose categories the first part does not know",
        "give both files the same names, or leave out what is not trained",
    ),
    "leak": _error(
        "images in two files, such as training and validation: AP on them says nothing about new ones",
        "remove them from one part",
        removal="them and their annotations from the first part",
    ),
    "crowds": _warning(
        "crowds ('iscrowd' 1), which training leaves out",
        "if each is one object (CVAT's brush, BlenderProc and pycococreator write 1 for every RLE), set "
        "'iscrowd' 0: gn-detect doctor --fix OUT.json --no-crowds does that",
    ),
    "some-fractions": _warning(
        "boxes within the first pixel of the image, as if they were fractions of it, among boxes in pixels",
        "multiply them by the image's width and height, or remove them",
    ),
    "box-empty": _warning(
        "boxes of no width or no height; training leaves them out",
        "correct them",
        "takes the mask's box",
        _OBJECT,
    ),
    "box-overlaps-border": _warning(
        "boxes that reach out of the image by more than 1 pixel", "correct them", _FROM_MASK
    ),
    "box-mask": _warning(
        "boxes that disagree with their mask", "find out which is right", "takes the mask's box"
    ),
    "area-mask": _warning(
        "areas that disagree with their mask", "compute them again", "takes the mask's area"
    ),
    "short-polygon": _warning(
        "polygons of less than 3 points or an odd count of numbers; training leaves them out",
        "complete them",
        removal="the polygons, and objects that have no other",
    ),
    "polygon-outside": _warning("polygons that reach out of the image by more than 1 pixel", "correct them"),
    "empty-mask": _warning("masks without a pixel", "draw them again", removal=_OBJECT),
    "crowd-without-rle": _warning(
        "crowds whose mask is no RLE", "encode them, or set 'iscrowd' 0", "encodes the polygons"
    ),
    "duplicate-annotation": _warning(
        "annotations that repeat another one of their image", "remove them", removal=_OBJECT
    ),
    "duplicate-file": _warning(
        "files that several images of one part name", "list each file once, with all its objects"
    ),
    "duplicate-picture": _warning("pictures that are equal to another one of their part", "keep one"),
    "dark-images": _warning(
        "sets of 16-bit greyscale images that fill a small part of the 16 bits: their high byte is read",
        "scale all of them by one factor, to the whole 16 bits or to 8-bit files",
    ),
    "duplicate-category-name": _warning(
        "category names that several ids share", "merge them, or give them different names"
    ),
    "other-form": _note(
        "fields in another form than COCO's, which is read all the same",
        "other tools may not read it",
        "writes COCO's form",
    ),
    "boxes-alone": _note(
        "files in which no object has a mask", "training and evaluation take the boxes alone"
    ),
    "crossing-polygon": _note(
        "polygons that cross themselves; masks are the even-odd fill", "look at some of them"
    ),
    "unused-category": _note(
        "categories without an object", "they cost nothing; the model cannot learn them here"
    ),
    "empty-image": _note("images without an object", "training leaves them out by default"),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one entry.

    Attributes:
        kind: key of :data:`FAULTS`.
        part: name of the dataset.
        detail: the entry and its fault in one line.
    """

    kind: str
    part: str
    detail: str
    image_id: int | None = None
    annotation_id: int | None = None
    category_id: int | None = None
    file_name: str | None = None

    @property
    def severity(self) -> str:
        """Return one of :data:`SEVERITIES`."""
        return FAULTS[self.kind].severity

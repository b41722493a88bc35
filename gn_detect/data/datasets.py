"""Names of datasets, and the places of their files."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from .demo.dataset import ensure_demo_dataset
from .formats.recognise import describe_foreign

if TYPE_CHECKING:
    from ..config import Config

# Annotation file and images folder of each name, relative to the datasets root.
BUILT_IN = {
    "coco_2017_train": ("coco/annotations/instances_train2017.json", "coco/train2017"),
    "coco_2017_val": ("coco/annotations/instances_val2017.json", "coco/val2017"),
    "coco_2017_val_100": ("coco/annotations/instances_val2017_100.json", "coco/val2017"),
    "coco_2014_train": ("coco/annotations/instances_train2014.json", "coco/train2014"),
    "coco_2014_val": ("coco/annotations/instances_val2014.json", "coco/val2014"),
    "coco_2014_minival": ("coco/annotations/instances_minival2014.json", "coco/val2014"),
    "coco_2014_valminusminival": ("coco/annotations/instances_valminusminival2014.json", "coco/val2014"),
    "demo_train": ("demo/instances_train.json", "demo/images_train"),
    "demo_val": ("demo/instances_val.json", "demo/images_val"),
}

_GENERATED = ("demo_train", "demo_val")


@dataclass(frozen=True)
class DatasetSource:
    """Place of a dataset.

    Attributes:
        name: name of the dataset.
        annotations: COCO JSON.
        images: folder of the JSON's relative file names.
        allow_outside: file names may lead out of the folder (``DATASETS.ALLOW_OUTSIDE``).
    """

    name: str
    annotations: Path
    images: Path
    allow_outside: bool = False


def datasets_root(cfg: Config | None = None) -> Path:
    """Return the built-in datasets' folder.

    It is ``DATASETS.ROOT``, else $GN_DETECT_DATASETS, else $DETECTRON2_DATASETS, else ./datasets. If the
    root in the config no longer exists, the environment counts.
    """
    named = os.environ.get("GN_DETECT_DATASETS") or os.environ.get("DETECTRON2_DATASETS") or ""
    root = "" if cfg is None else cfg.datasets.root
    if root and (not named or Path(root).expanduser().is_dir()):
        named = root
    return Path(named or "datasets").expanduser()


def resolve_dataset(cfg: Config, name: str) -> DatasetSource:
    """Return the files of a dataset: ``DATASETS.REGISTER`` first, then the built-in names.

    The first use of the demo dataset generates it.

    Raises:
        UserError: the name is unknown, or the annotation file or the images folder is missing.
    """
    registered, outside = cfg.datasets.registered, cfg.datasets.allow_outside
    if name in registered:
        entry = registered[name]
        files = (Path(entry.annotations).expanduser(), Path(entry.images).expanduser())
        source = DatasetSource(name, *files, outside)
        remedy = f"correct DATASETS.REGISTER.{name}"
    elif name in BUILT_IN:
        root = datasets_root(cfg)
        if name in _GENERATED:
            if cfg.datasets.root and not root.absolute().parent.is_dir():  # gone, or of another machine
                raise UserError(
                    "missing-annotations", f"dataset {name}: {root} is gone; correct DATASETS.ROOT"
                )
            ensure_demo_dataset(root)
        annotations, images = BUILT_IN[name]
        source = DatasetSource(name, root / annotations, root / images, outside)
        key = "DATASETS.ROOT" if cfg.datasets.root else "GN_DETECT_DATASETS"
        remedy = f"put it there or set {key} to the folder that holds it"
    else:
        known = [*registered, *BUILT_IN]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"the nearest names are {', '.join(near)}" if near else f"known names are {', '.join(known)}"
        remedy = "add your own under DATASETS.REGISTER"
        raise UserError("unknown-dataset", f"unknown dataset {name!r}; {hint}; {remedy}")
    if source.annotations.is_dir():
        found = describe_foreign(source.annotations)
        raise UserError("foreign-format", f"dataset {name}: {source.annotations} is no COCO file: {found}")
    if not source.annotations.is_file():
        missing = f"annotation file {source.annotations} is missing"
        raise UserError("missing-annotations", f"dataset {name}: {missing}; {remedy}")
    if not source.images.is_dir():
        missing = f"images folder {source.images} is missing"
        raise UserError("missing-images-folder", f"dataset {name}: {missing}; {remedy}")
    return source

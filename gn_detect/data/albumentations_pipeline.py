"""A user's pipeline of albumentations 2 as an augmentation (``INPUT.ALBUMENTATIONS``).

The file is one that ``albumentations.save`` wrote, as JSON or YAML. Only transforms of a list are built; none
of them opens a file, and their numbers are bounded. The package is albumentations (MIT), the optional extra
``albumentations``. AlbumentationsX is another package, under the AGPL.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random as python_random
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import yaml

from ..config.yaml_text import parse_yaml
from ..errors import UserError
from ..files import read_text
from ..text import shortened
from .transforms import LabelledImage, Mask, drawn, mask_bounds

_LARGEST = 1 << 16  # bytes of a file
_MOST = 32  # transforms, groups included
_DEEPEST = 8  # levels of groups
_LARGEST_NUMBER = 1000.0  # a blur of 1000 pixels takes some seconds

# Transforms that change no more than the values of pixels.
OF_PIXELS = (
    "AdvancedBlur", "AutoContrast", "Blur", "CLAHE", "ChannelDropout", "ChannelShuffle",
    "ChromaticAberration", "ColorJitter", "Defocus", "Downscale", "Emboss", "Equalize", "FancyPCA",
    "GaussNoise", "GaussianBlur", "HueSaturationValue", "ISONoise", "Illumination", "ImageCompression",
    "InvertImg", "MedianBlur", "MotionBlur", "MultiplicativeNoise", "Posterize", "RGBShift",
    "RandomBrightnessContrast", "RandomGamma", "RandomToneCurve", "RingingOvershoot", "SaltAndPepper",
    "Sharpen", "ShotNoise", "Solarize", "ToGray", "ToSepia", "UnsharpMask",
)  # fmt: skip
# Transforms that also move or cover objects. None crops, pads or resizes: other keys of INPUT choose sizes.
OF_OBJECTS = (
    "Affine", "CoarseDropout", "D4", "ElasticTransform", "GridDistortion", "HorizontalFlip",
    "OpticalDistortion", "Perspective", "PixelDropout", "RandomRotate90", "Rotate", "SafeRotate",
    "ShiftScaleRotate", "SquareSymmetry", "Transpose", "VerticalFlip",
)  # fmt: skip
GROUPS = ("OneOf", "Sequential")
_RESIZING = {"fit_output": True, "keep_size": False, "crop_border": True}  # the result may have any size
_NO_UPDATE = "NO_ALBUMENTATIONS_UPDATE"


class AlbumentationsPipeline:
    """Augmentation by the transforms of a file; see :mod:`gn_detect.data.augmentation`.

    Masks are transformed as bitmaps, and boxes are the tight ones of the masks. Without masks albumentations
    transforms the boxes. What the file says of boxes, keypoints and its seed is not used.

    Args:
        path: JSON or YAML as ``albumentations.save`` writes it.

    Raises:
        UserError: the file is damaged, or has a transform or a value that is not allowed, or albumentations 2
            is not installed.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        outermost = _read(path)
        self._moves_objects = bool(_checked_names(outermost, path) & {*OF_OBJECTS})
        self._steps, self._probability = outermost["transforms"], outermost.get("p", 1.0)
        self._compose = self._build()

    def __getstate__(self) -> dict[str, Any]:
        """Return the values without the package's objects: unpickling them would import the package."""
        return {name: value for name, value in self.__dict__.items() if name != "_compose"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compose = self._build()

    def _build(self) -> Any:
        package = import_albumentations()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of arguments that it does not know; strict refuses them
                steps = [package.from_dict({"transform": step}) for step in self._steps]
                boxes = package.BboxParams(format="pascal_voc", clip=True, filter_invalid_bboxes=True)
                return package.Compose(steps, bbox_params=boxes, p=self._probability, strict=True)
        except Exception as error:  # its checks raise many types
            raise self._refused(error) from error

    def __call__(self, labelled: LabelledImage, random: np.random.Generator) -> LabelledImage:
        import cv2

        moves, masks, size = self._moves_objects, labelled.masks, labelled.size
        given: dict[str, Any] = {"image": np.ascontiguousarray(labelled.image), "bboxes": np.empty((0, 5))}
        if moves and masks:
            given["masks"] = np.stack([drawn(mask, *size) for mask in masks]).view(np.uint8)
        elif moves and masks is None:
            given["bboxes"] = np.column_stack([labelled.boxes, np.arange(len(labelled))])
        # One stream for all transforms: with a seed each would get a stream of its own, all of them equal.
        self._compose.set_random_state(random, python_random.Random(int(random.integers(2**63))))
        threads = cv2.getNumThreads()
        cv2.setNumThreads(0)  # its threads do not survive the fork of a worker, and workers are enough
        try:
            found = self._compose(**given)
        except Exception as error:  # OpenCV's and others
            raise self._refused(error) from error
        finally:
            cv2.setNumThreads(threads)
        image = found["image"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise self._refused("it does not return RGB images of 8 bits")
        result = replace(labelled, image=image)
        if not moves:
            return result
        if masks is None:
            kept = found["bboxes"][:, 4].astype(np.int64)
            return replace(result, boxes=found["bboxes"][:, :4], labels=labelled.labels[kept])
        bitmaps: list[Mask] = [np.asarray(mask, dtype=bool) for mask in found["masks"]] if masks else []
        boxes = np.array([mask_bounds(bitmap, *result.size) for bitmap in bitmaps]).reshape(-1, 4)
        return replace(result, boxes=boxes, masks=bitmaps).select(boxes[:, 2] > 0)

    def _refused(self, reason: object) -> UserError:
        return _not_a_pipeline(self.path, f"albumentations refuses it: {reason}")


def fingerprint(path: str) -> str:
    """Return a digest of a pipeline file, for the comparison of runs."""
    return hashlib.sha256(_text(path).encode()).hexdigest()[:16]


def import_albumentations() -> Any:
    """Return the module albumentations, which must not ask a server for a newer version when it is imported.

    Raises:
        UserError: version 2 of the package is not installed.
    """
    try:
        version = importlib.metadata.version("albumentations")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("2."):
        raise UserError(
            "missing-package",
            f"INPUT.ALBUMENTATIONS needs albumentations 2, and finds {version}: "
            "pip install 'albumentations>=2,<3'",
        )
    before = os.environ.get(_NO_UPDATE)
    os.environ[_NO_UPDATE] = "1"
    try:
        import albumentations
    finally:
        if before is None:
            del os.environ[_NO_UPDATE]
        else:
            os.environ[_NO_UPDATE] = before
    return albumentations


def _text(path: str) -> str:
    try:
        return read_text(path, _LARGEST)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(
            "cannot-read", f"INPUT.ALBUMENTATIONS {path}: cannot be read ({reason}); correct the path"
        ) from None


def _not_a_pipeline(path: str, problem: str) -> UserError:
    problem = shortened(" ".join(problem.split()), 300)
    return UserError(
        "not-a-pipeline",
        f"INPUT.ALBUMENTATIONS {path}: {problem}; write it with albumentations.save() of version 2",
    )


def _read(path: str) -> dict[str, Any]:
    """Return the outermost transform of a file as plain values."""
    text = _text(path)
    try:
        content = json.loads(text) if text.lstrip().startswith("{") else parse_yaml(text)
    except yaml.YAMLError as error:
        raise _not_a_pipeline(path, f"not YAML: {getattr(error, 'problem', error)}") from None
    except (ValueError, RecursionError) as error:
        raise _not_a_pipeline(path, f"not JSON: {error}") from None
    found = content.get("transform") if isinstance(content, dict) else None
    if not isinstance(found, dict) or found.get("__class_fullname__") != "Compose":
        raise _not_a_pipeline(path, "it has no 'transform' that is a Compose")
    return found


def _checked_names(outermost: dict[str, Any], path: str) -> set[str]:
    """Return the names of all transforms inside the outermost one, each of which is checked."""
    names: list[str] = []
    used = {key: outermost[key] for key in ("p", "transforms") if key in outermost}
    groups = [(used, "Compose", 0)]
    while groups:
        group, group_name, depth = groups.pop()
        _check_values({key: value for key, value in group.items() if key != "transforms"}, group_name, path)
        if not isinstance(group.get("transforms"), list):
            raise _not_a_pipeline(path, f"{group_name} has no list of 'transforms'")
        for step in group["transforms"]:
            name = step.get("__class_fullname__") if isinstance(step, dict) else None
            if name not in (*OF_PIXELS, *OF_OBJECTS, *GROUPS):
                raise UserError(
                    "refused-transform",
                    f"INPUT.ALBUMENTATIONS {path}: the transform {shortened(repr(name))} is not one of those "
                    "that are allowed; leave it out (docs/your-data.md lists them)",
                )
            names.append(name)
            if len(names) > _MOST or depth > _DEEPEST:
                problem = f"it has more than {_MOST} transforms, or more than {_DEEPEST} groups in each other"
                raise _not_a_pipeline(path, problem)
            if name in GROUPS:
                groups.append((step, name, depth + 1))
            else:
                _check_values(step, name, path)
    return {*names}


def _check_values(arguments: dict[str, Any], name: str, path: str) -> None:
    """Refuse values that make a transform slow or its result large; albumentations checks the others."""
    waiting = [*arguments.items()]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict | list | tuple):
            waiting += value.items() if isinstance(value, dict) else ((key, each) for each in value)
            continue
        fits = not isinstance(value, int | float) or -_LARGEST_NUMBER <= value <= _LARGEST_NUMBER
        if key == "p":
            fits = isinstance(value, int | float) and 0 <= value <= 1
        if not fits or (key in _RESIZING and value == _RESIZING[key]):
            problem = f"{shortened(key)} of {name} is {shortened(repr(value))}"
            raise _not_a_pipeline(
                path,
                f"{problem}, but p is from 0 to 1, numbers are at most {_LARGEST_NUMBER:.0f}, and the image "
                "keeps its size",
            )

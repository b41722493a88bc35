"""Detections by a file that ``gn-detect export`` wrote, with onnxruntime or PyTorch, on the CPU."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.predictor import ImagePredictor
from ..errors import UserError
from ..modeling.mask_rcnn import image_size, rescale
from ..structures import Detections
from ..text import printable
from .write import INPUTS, METADATA_FILE, MIN_SIDE, SUFFIXES, ExportMetadata, not_ours, require

Program = Callable[[Tensor, Tensor], list[Tensor]]  # see ExportableDetector.forward


class ExportedPredictor(ImagePredictor):
    """A predictor whose model is an exported file; it prepares images and pastes masks as Predictor does.

    Args:
        path: ``.onnx`` or ``.pt2``.
        trust: needed for ``.pt2``, which is a program. Pickles in it are refused in any case, but PyTorch
            evaluates its symbolic sizes and calls the functions that it names.

    Attributes:
        report: the file and what runs it.

    Raises:
        UserError: no such file, not one of ours, not trusted, or onnxruntime is missing.
    """

    def __init__(self, path: str | Path, *, trust: bool = False) -> None:
        path = Path(path)
        if path.suffix not in SUFFIXES:
            raise UserError(
                "wrong-ending", f"--model {path} must be {' or '.join(SUFFIXES)}, written by gn-detect export"
            )
        if not path.is_file():
            raise UserError(
                "missing-weights", f"{path}: no such file; make one with gn-detect export --output {path}"
            )
        if path.suffix == ".onnx":
            self._program, metadata, runtime = _load_onnx(path)
        else:
            self._program, metadata, runtime = _load_pt2(path, trust)
        self._path = path
        self._divisibility = metadata.size_divisibility
        self.cfg = metadata.config
        self.class_names = metadata.class_names
        self.category_ids = metadata.category_ids
        self.score_thresholds = metadata.score_thresholds
        self.report = printable(
            f"{path}: exported by gn_detect {metadata.version}, run by {runtime} on the CPU"
        )

    def _detector(self) -> ExportedPredictor:
        return self

    def detect(
        self,
        images: Sequence[Tensor],
        original_sizes: Sequence[tuple[int, int]] | None = None,
        paste: bool = True,
    ) -> list[Detections]:
        """Return the detections of each image; see :meth:`gn_detect.modeling.MaskRCNN.detect`."""
        sizes = [image_size(image) for image in images] if original_sizes is None else original_sizes
        return [self._detect(image, size, paste) for image, size in zip(images, sizes, strict=True)]

    def _detect(self, prepared: Tensor, original: tuple[int, int], paste: bool) -> Detections:
        size = image_size(prepared)
        height, width = (-(-side // self._divisibility) * self._divisibility for side in size)
        if min(height, width) < MIN_SIDE:
            raise UserError(
                "thin-image",
                f"{original[1]} x {original[0]} pixels become {size[1]} x {size[0]}, and an exported "
                f"detector needs sides of {MIN_SIDE}; use --config-file and --weights for such images",
            )
        padded = prepared.new_zeros(1, 3, height, width)
        padded[0, :, : size[0], : size[1]] = prepared
        outputs = self._program(padded, torch.tensor(size))
        if not _is_of(len(self.class_names), outputs):
            raise UserError(
                "not-exported", f"{self._path} gives no detections of its own classes; export it again"
            )
        return rescale(Detections(*outputs), size, original, paste)


def _is_of(classes: int, outputs: list[Tensor]) -> bool:
    """Return whether the outputs of a program are boxes, scores, labels and perhaps masks of equal length."""
    if len(outputs) not in (3, 4) or [tensor.dim() for tensor in outputs] != [2, 1, 1, 3][: len(outputs)]:
        return False
    boxes, _, labels = outputs[:3]
    known = labels.dtype == torch.int64 and bool(((labels >= 0) & (labels < classes)).all())
    return known and boxes.shape[1] == 4 and len({len(tensor) for tensor in outputs}) == 1


def _load_onnx(path: Path) -> tuple[Program, ExportMetadata, str]:
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of graph nodes that it removes
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a dozen types without a common parent
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            "not-exported", f"{path} is no ONNX model that onnxruntime can run: {reason}; export it again"
        ) from error
    metadata = ExportMetadata.from_strings(session.get_modelmeta().custom_metadata_map, path)
    if [given.name for given in session.get_inputs()] != list(INPUTS):
        raise UserError("not-exported", f"{path} has other inputs than {', '.join(INPUTS)}; export it again")

    def run(image: Tensor, size: Tensor) -> list[Tensor]:
        found = session.run(None, dict(zip(INPUTS, (image.numpy(), size.numpy()), strict=True)))
        return [torch.from_numpy(array) for array in found]

    return run, metadata, f"onnxruntime {onnxruntime.__version__}"


def _load_pt2(path: Path, trust: bool) -> tuple[Program, ExportMetadata, str]:
    metadata = ExportMetadata.from_strings(_read_pt2_metadata(path), path)
    if not trust:
        raise UserError(
            "untrusted-program",
            f"{path} is a program that PyTorch runs; add --trust if you know who exported it, "
            "or use an ONNX file",
        )
    try:
        module = torch.export.load(path).module()
    except Exception as error:  # many types, none of them documented
        raise UserError(
            "not-exported",
            f"{path} cannot be loaded by PyTorch {torch.__version__}, which reads files of its own "
            "release; export it again",
        ) from error

    def run(image: Tensor, size: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(module(image, size))

    return run, metadata, f"PyTorch {torch.__version__}"


# The members of PyTorch's archive with one program, without compiled libraries and older formats' pickles.
_MEMBERS = re.compile(
    r"models/model\.json|extra/gn_detect\.json"
    r"|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)"
    r"|data/sample_inputs/model\.pt"
    r"|archive_(format|version)|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/(serialization_id|version)"
)


def _read_pt2_metadata(path: Path) -> Any:
    """Return the metadata of an archive that holds no pickle; torch.export.load would unpickle anything."""
    try:
        with zipfile.ZipFile(path) as archive:
            listed = archive.namelist()
        roots, members = {name.partition("/")[0] for name in listed}, [n.partition("/")[2] for n in listed]
        strange = sorted(name for name in members if not _MEMBERS.fullmatch(name))
        if strange:
            raise UserError(
                "not-exported",
                f"{path} holds {strange[0]}, which gn_detect does not export; it was not loaded",
            )
        if len(roots) > 1 or len(set(members)) < len(members):
            raise UserError(
                "not-exported",
                f"{path} holds a part twice, or two programs; it was not loaded, export it again",
            )
        # What is read here is what will be loaded: other readers may take a crafted archive for another one.
        reader = torch._C.PyTorchFileReader(str(path))
        if sorted(reader.get_all_records()) != sorted(members):
            raise ValueError("PyTorch finds other parts")
        for kind in ("weights", "constants"):
            entries = json.loads(reader.get_record(f"data/{kind}/model_{kind}_config.json"))["config"]
            if any(entry["use_pickle"] is not False for entry in entries.values()):
                raise UserError(
                    "unsafe-file", f"{path} holds {kind} as pickles, which are not loaded; export it again"
                )
        if reader.get_record("data/sample_inputs/model.pt"):
            raise UserError(
                "unsafe-file", f"{path} holds pickled sample inputs, which are not loaded; export it again"
            )
        return json.loads(reader.get_record(f"extra/{METADATA_FILE}"))
    except (
        OSError, zipfile.BadZipFile, RuntimeError, RecursionError, KeyError, TypeError, AttributeError,
        ValueError,
    ) as error:  # fmt: skip
        raise not_ours(path) from error

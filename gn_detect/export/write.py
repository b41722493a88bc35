"""A whole detector as one file for other programs: ONNX, or PyTorch's exported program (``.pt2``)."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from ..config import dump_config, without_paths
from ..config.load import parse_config
from ..config.shared import shared_values
from ..errors import UserError
from ..files import atomic_write
from ..layers import fold_standardization
from ..modeling.freezing import freeze
from ..modeling.mask_rcnn import MaskRCNN
from ..weights import CheckpointMetadata, InputConvention, norm_settings, save_weights
from ..weights.metadata import program_version

if TYPE_CHECKING:
    from ..config import Config
    from ..engine.predictor import Predictor

SUFFIXES = (".onnx", ".pt2")
SAFE = ".safetensors"  # weights, classes and config, for gn_detect itself
INPUTS = ("image", "size")
OUTPUTS = ("boxes", "scores", "labels", "masks")  # a model without masks has the first three
METADATA_FILE = "gn_detect.json"  # in a .pt2; an ONNX file has the same keys as metadata_props

# Lowest side of a padded image in pixels. The exporter takes sizes of 1 for constants, and smaller images
# have feature maps of 1 x 1.
MIN_SIDE = 64
_LARGEST_DIVISOR = 1024  # an image is padded to a multiple; a ResNet with an FPN has 32 or 64


class ExportableDetector(nn.Module):
    """The detector as a function of tensors, for one image.

    Args:
        model: in evaluation mode, on the CPU; it is copied.
    """

    def __init__(self, model: MaskRCNN) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        fold_standardization(self.model)
        freeze(self.model)  # F.batch_norm asks for the number of RoIs, which a program does not know
        heads = self.model.roi_heads
        for name in ("box_head", "mask_head", "res5"):
            head = getattr(heads, name, None)
            if isinstance(head, nn.ModuleList):  # a cascade's
                setattr(heads, name, nn.ModuleList(map(_NeverEmpty, head)))
            elif head is not None:
                setattr(heads, name, _NeverEmpty(head))

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Return the detections of :meth:`MaskRCNN.detect`, neither scaled to the original pixels nor pasted.

        Args:
            image: (1, 3, H, W) uint8 in ``INPUT.FORMAT`` order; H and W are multiples of the model's
                ``size_divisibility``, at least :data:`MIN_SIDE`.
            size: (2,) int64, height and width of the image without its padding. The padding is at the right
                and the bottom and may hold anything.

        Returns:
            boxes (D, 4) float32 ``xyxy`` in pixels of ``image``, scores (D,) float32, best first, labels (D,)
            int64, and for a model with masks (D, S, S) float32 probabilities inside the boxes.
        """
        model = self.model
        pixels = (image - model.pixel_mean) / model.pixel_std
        row = torch.arange(image.shape[2], device=image.device) < size[0]
        column = torch.arange(image.shape[3], device=image.device) < size[1]
        pixels = torch.where(row[:, None] & column, pixels, 0.0)
        features = model.backbone(pixels.contiguous(memory_format=model.memory_format))
        sizes: Any = [size]  # boxes are clipped by numbers or by a tensor
        proposals = model.proposal_generator.propose(features, sizes)
        found = model.roi_heads.detect(features, proposals, sizes)[0]
        outputs = (found.boxes, found.scores, found.labels)
        return (*outputs, found.masks) if isinstance(found.masks, Tensor) else outputs


class _NeverEmpty(nn.Module):
    """A head that gets one more RoI, of zeros: onnxruntime cannot normalise the groups of none."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *inputs: Tensor) -> Tensor:
        count = inputs[0].shape[0]
        more = [torch.cat([x, x.new_zeros(1, *x.shape[1:])]) for x in inputs]
        found: Tensor = self.head(*more)
        return found.narrow(0, 0, count)


@dataclass(frozen=True)
class ExportMetadata:
    """The facts about the detector in an exported file."""

    config: Config  # its INPUT keys say how images are prepared
    class_names: list[str]
    category_ids: list[int]
    score_thresholds: list[float]  # by label; empty if the weights do not hold them
    size_divisibility: int  # H and W are multiples of it
    version: str  # of gn_detect

    def to_strings(self) -> dict[str, str]:
        """Return the metadata as ONNX stores them: JSON, and the config as YAML."""
        return {
            "gn_detect_version": self.version,
            "class_names": json.dumps(self.class_names),
            "category_ids": json.dumps(self.category_ids),
            "score_thresholds": json.dumps(self.score_thresholds),
            "size_divisibility": str(self.size_divisibility),
            "input_format": self.config.input.format,
            "pixel_mean": json.dumps(self.config.model.pixel_mean),
            "pixel_std": json.dumps(self.config.model.pixel_std),
            "config": dump_config(without_paths(self.config)),
        }

    @classmethod
    def from_strings(cls, strings: Any, path: Path) -> ExportMetadata:
        """Undo :meth:`to_strings`.

        Raises:
            UserError: ``path`` is no file of ours.
        """
        try:
            found = cls(
                parse_config(strings["config"]),
                json.loads(strings["class_names"]),
                json.loads(strings["category_ids"]),
                json.loads(strings.get("score_thresholds", "[]")),  # older files have none
                int(strings["size_divisibility"]),
                str(strings["gn_detect_version"]),
            )
            count = found.config.model.roi_heads.num_classes
            scores = found.score_thresholds
            for values, kind in ((found.class_names, str), (found.category_ids, int), (scores, float)):
                lengths = (count, 0) if values is scores else (count,)
                if not isinstance(values, list) or len(values) not in lengths:
                    raise ValueError("number of classes")
                if any(type(value) is not kind for value in values):
                    raise ValueError("types of classes")
            if not 1 <= found.size_divisibility <= _LARGEST_DIVISOR:
                raise ValueError("size divisibility")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, UserError) as error:
            raise not_ours(path) from error
        return found


def not_ours(path: Path) -> UserError:
    """Return the error for a file that :func:`export_detector` did not write."""
    return UserError(
        "not-exported", f"{path} is no detector that gn_detect exported; make one with gn-detect export"
    )


def export_detector(predictor: Predictor, path: str | Path) -> None:
    """Write the detector to ``path``, ``.onnx`` or ``.pt2``.

    The file takes images of any size, see :meth:`ExportableDetector.forward`, and holds
    :class:`ExportMetadata`. It runs without gn_detect: fused norms are PyTorch's or ONNX's group norm in it.

    Args:
        predictor: on the CPU.

    Raises:
        UserError: another suffix, packages are missing, or PyTorch's exporter fails.
    """
    path = check_target(path)
    if predictor.cfg.test.aug.enabled:
        raise UserError(
            "unsupported-value",
            "TEST.AUG.ENABLED True cannot be exported: a file detects in one image; set it to False",
        )
    metadata = ExportMetadata(
        predictor.cfg,
        predictor.class_names,
        predictor.category_ids,
        predictor.score_thresholds,
        predictor.model.size_divisibility,
        program_version(),
    ).to_strings()
    program = export_program(predictor.model)
    if path.suffix == ".onnx":
        content = _to_onnx(program, metadata)
        with atomic_write(path, "wb") as file:
            file.write(content)
    else:
        program.example_inputs = None  # would be a pickle, which a reader should not have to trust
        with atomic_write(path, "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(metadata)})


def export_weights(predictor: Predictor, path: str | Path, results: dict[str, float]) -> CheckpointMetadata:
    """Write the detector's weights as safetensors, and return the record that is in the file.

    The record holds classes, results and the part of the config that belongs to weights: no paths, no names
    of data sets and nothing of a training.

    Args:
        predictor: its model is written.
        path: ends in ``.safetensors``.
        results: AP by name, see :class:`CheckpointMetadata`.

    Raises:
        UserError: the file cannot be written.
    """
    cfg = predictor.cfg
    metadata = replace(
        norm_settings(predictor.model),
        class_names=predictor.class_names,
        category_ids=predictor.category_ids,
        score_thresholds=predictor.score_thresholds,
        results=results,
        input=InputConvention.of_config(cfg),
        config=yaml.safe_dump(shared_values(cfg), sort_keys=False, default_flow_style=None),
    )
    save_weights(path, predictor.model.state_dict(), metadata)
    return metadata


def check_target(path: str | Path) -> Path:
    """Return the path of a file to export; refuse another suffix or missing packages."""
    path = Path(path)
    if path.suffix not in (*SUFFIXES, SAFE):
        raise UserError("wrong-ending", f"--output {path} must end in {', '.join(SUFFIXES)} or {SAFE}")
    if path.suffix == ".onnx":
        require("onnx", "onnxscript")
    return path


def require(*modules: str) -> None:
    """Refuse to go on without the packages ``modules``."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise UserError(
            "missing-package",
            f"ONNX needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}",
        )


def export_program(model: MaskRCNN) -> torch.export.ExportedProgram:
    """Return the program of ``model`` with dynamic height and width.

    Raises:
        UserError: PyTorch's exporter fails.
    """
    unit = model.size_divisibility
    least = -(-MIN_SIDE // unit)
    sides = {2: torch.export.Dim("rows", min=least), 3: torch.export.Dim("columns", min=least)}
    if unit > 1:
        sides = {dim: unit * side for dim, side in sides.items()}
    # Any size but a special one: two different sides, more than the least.
    height, width = 5 * MIN_SIDE, 7 * MIN_SIDE
    example = (torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.tensor([height, width]))
    with _exporter("torch.export"):
        program = torch.export.export(
            ExportableDetector(model).eval(),
            example,
            dynamic_shapes={"image": sides, "size": None},
            strict=False,
        )
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
                node.meta.pop("stack_trace", None)  # names the files of this machine
    return program


def _to_onnx(program: torch.export.ExportedProgram, metadata: dict[str, str]) -> bytes:
    count = len(program.graph_signature.user_outputs)
    with _exporter("torch.onnx.export"):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(INPUTS),
            output_names=list(OUTPUTS[:count]),
            verbose=False,
        )
        assert converted is not None
        model = converted.model_proto
        for key, value in metadata.items():
            model.metadata_props.add(key=key, value=value)
        return bytes(model.SerializeToString())


@contextmanager
def _exporter(name: str) -> Iterator[None]:
    """Run PyTorch's exporter quietly; its errors become one line."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # many types, none of them documented
        raise UserError(
            "cannot-export",
            f"{name} of PyTorch {torch.__version__} cannot take this detector: {_reason(error)}; "
            "exports are tested with the PyTorch of constraints.txt",
        ) from error


def _reason(error: BaseException) -> str:
    """Return what cannot be exported, and the first cause; ONNX's exporter wraps both in advice."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    first = chain[-1]
    if len(chain) < 3:
        return _first_line(first) or type(first).__name__
    return f"{_first_line(chain[1])} ({type(first).__name__}: {_first_line(first)})"


def _first_line(error: BaseException) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return line if len(line) < 200 else f"{line[:200]} ..."

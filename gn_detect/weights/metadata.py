"""The record of everything that a checkpoint file says besides its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..ops import STANDARDIZATIONS
from .convention import InputConvention, plain_text

FORMAT_VERSION = 1  # of the files that we write
USUAL_EPS = 1e-5  # the default eps of GroupNorm in PyTorch, detectron2 and the config

_VERSION_KEY, _AUTHOR_KEY, _PROGRAM_KEY = "format_version", "__author__", "gn_detect_version"
_OURS = "gn_detect"
_TRAINING_STATE = {"optimizer", "losses"}  # a file with one of these is from a training
_MAX_COUNT = 2**40  # iterations and updates, far beyond any training
_MAX_FLOAT32 = 3.4e38  # GroupNorm adds eps in float32

IsValid = Callable[[Any], bool]


def _is_a(kind: type) -> IsValid:
    return lambda value: isinstance(value, kind)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MAX_COUNT)


def _is_eps(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MAX_FLOAT32


def _is_group_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_standardization(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    return isinstance(value[0], str) and value[0] in STANDARDIZATIONS and _is_eps(value[1])


def _is_list_of(is_valid: IsValid) -> IsValid:
    return lambda value: isinstance(value, list) and all(map(is_valid, value))


def _is_dict_of(is_valid: IsValid) -> IsValid:
    """Return a check for dicts with these values by name."""
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(key, str) for key in value)
        and all(map(is_valid, value.values()))
    )


_IS_DICT = _is_dict_of(_is_a(object))
_CONVERT = "write it again with gn-detect convert"


def _entry(
    words: str,
    is_valid: IsValid,
    default: Callable[[], Any] = lambda: None,
    *,
    refuse: str = "ours",
    remedy: str = "copy it again",
) -> Any:
    """Return a dataclass field that reads the entry of the same name from a file.

    Args:
        words: the kind of its values, for the error message.
        is_valid: the check of a value from a file.
        default: makes the value of files without this entry.
        refuse: files in which an invalid value is an error: ``"ours"``, ``"training"`` (ours, written by a
            training; in other files the name is free) or ``"any"``.
        remedy: for the error message.
    """
    kind = {"words": words, "is_valid": is_valid, "refuse": refuse, "remedy": remedy}
    return field(default_factory=default, metadata=kind)


@dataclass(frozen=True)
class CheckpointMetadata:
    """Everything that a checkpoint says besides its weights. Entries with their default are not in the file.

    Attributes:
        class_names, category_ids: indexed by label; the ids are those of the training JSON.
        score_thresholds: by label, the score with the best F1 in the evaluation of these weights.
        results: AP and AR in percent by name, such as ``bbox/AP``, in the evaluation of these weights.
        input: format, mean and deviation of the images, and the place of the stride.
        config: the model's whole config as YAML, without local paths.
        config_keys: in a file without a config, the config keys that no tensor implies.
        group_norm_eps: by name of the norm; empty if all norms have :data:`USUAL_EPS`.
        group_norm_groups: number of groups by name of the norm.
        weight_standardization: kind and eps by name of the convolution; the others are plain.
        iteration: the last one that was done, from 0.
        seed: random seed of the run.
        losses: losses since the last report.
        data: fingerprints of the datasets, by config key and name.
        optimizer, scaler: state dicts.
        trained: raw weights, if the checkpoint's tensors are their moving average.
        averaged_steps: number of updates of the average.
        author: another program's name, such as ``"torchvision"``.
        others: all other values of the file.
    """

    class_names: list[str] = _entry("a list of names", _is_list_of(_is_a(str)), list)
    category_ids: list[int] = _entry(
        "a list of whole numbers", _is_list_of(lambda value: type(value) is int), list
    )
    score_thresholds: list[float] = _entry(
        "a list of scores", _is_list_of(lambda value: _is_number(value) and 0 <= value <= 1), list
    )
    results: dict[str, float] = _entry("numbers by name", _is_dict_of(_is_number), dict)
    input: InputConvention | None = _entry("values by name", _IS_DICT)
    config: str | None = _entry("text", _is_a(str))
    config_keys: dict[str, Any] = _entry("values by key", _IS_DICT, dict)
    group_norm_eps: dict[str, float] = _entry(
        "the eps of each norm", _is_dict_of(_is_eps), dict, refuse="any", remedy=_CONVERT
    )
    group_norm_groups: dict[str, int] = _entry(
        "the number of groups of each norm", _is_dict_of(_is_group_count), dict, refuse="any", remedy=_CONVERT
    )
    weight_standardization: dict[str, list[Any]] = _entry(
        "the kind and the eps of each convolution",
        _is_dict_of(_is_standardization),
        dict,
        refuse="any",
        remedy=_CONVERT,
    )
    iteration: int | None = _entry("a whole number", _is_count, refuse="training")
    seed: int | None = _entry("a whole number", _is_count, refuse="training")
    losses: dict[str, list[float]] | None = _entry(
        "numbers by name", _is_dict_of(_is_list_of(_is_number)), refuse="training"
    )
    data: dict[str, Any] | None = _entry("values by name", _IS_DICT, refuse="training")
    optimizer: dict[str, Any] | None = _entry("an optimiser's state", _IS_DICT, refuse="training")
    scaler: dict[str, Any] | None = _entry("numbers by name", _is_dict_of(_is_number), refuse="training")
    trained: dict[str, Tensor] | None = _entry(
        "tensors by name", _is_dict_of(_is_a(Tensor)), refuse="training"
    )
    averaged_steps: int | None = _entry("a whole number", _is_count, refuse="training")
    author: str = ""
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def norm_eps(self) -> dict[str, float]:
        """Return the eps of each GroupNorm that the file names."""
        return dict.fromkeys(self.group_norm_groups, USUAL_EPS) | self.group_norm_eps

    @property
    def mmdetection_config(self) -> str:
        """Return the Python text of the config in a file of mmdetection, or ``""``."""
        return plain_text(self.others.get("meta"), "config", "cfg")

    def to_dict(self) -> dict[str, Any]:
        """Return the entries for a file; :func:`read_metadata` reads them."""
        content = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.metadata and entry.default_factory is not MISSING and value != entry.default_factory():
                content[entry.name] = value.as_metadata() if entry.name == "input" else value
        return content | self.others


def read_metadata(content: Mapping[str, Any], path: Path | str) -> CheckpointMetadata:
    """Read the entries of a file that are no weights.

    Another program's value of another type is left in ``others``.

    Args:
        content: keys and values, whatever the file has.
        path: of the file, for messages.

    Raises:
        UserError: a newer gn_detect wrote the file, or one of our entries has a value of another type.
    """
    others = dict(content)
    author = others.pop(_AUTHOR_KEY, "")
    author = author if isinstance(author, str) else ""
    allowed = {"any"}
    if author == _OURS:
        others.pop(_PROGRAM_KEY, None)
        found = others.pop(_VERSION_KEY, FORMAT_VERSION)
        if not isinstance(found, int) or found > FORMAT_VERSION:
            raise UserError(
                "newer-file",
                f"{path} has format version {found!r}, and this gn_detect reads up to {FORMAT_VERSION}; "
                "install a newer one",
            )
        allowed |= {"ours"} if _TRAINING_STATE.isdisjoint(others) else {"ours", "training"}
    values: dict[str, Any] = {}
    for entry in fields(CheckpointMetadata):
        if not entry.metadata or entry.name not in others:
            continue
        if entry.metadata["is_valid"](others[entry.name]):
            values[entry.name] = others.pop(entry.name)
        elif entry.metadata["refuse"] in allowed:
            raise UserError(
                "damaged-record",
                f"{path}: its '{entry.name}' is not {entry.metadata['words']}, so the file is damaged; "
                f"{entry.metadata['remedy']}",
            )
    if "input" in values:
        values["input"] = InputConvention.from_metadata(values["input"])
    return CheckpointMetadata(**values, author=author, others=others)


def signature() -> dict[str, Any]:
    """Return the entries that mark a file as ours."""
    return {_VERSION_KEY: FORMAT_VERSION, _AUTHOR_KEY: _OURS, _PROGRAM_KEY: program_version()}


def program_version() -> str:
    """Return the version of gn_detect."""
    try:
        return version("gn_detect")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"

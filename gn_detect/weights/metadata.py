"""The record of everything that a checkpoint file says besides its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from .convention import InputConvention, plain_text

FORMAT_VERSION = 1  # of the files that we write
USUAL_EPS = 1e-5  # the default eps of GroupNorm in PyTorch, detectron2 and the config

_VERSION_KEY, _AUTHOR_KEY, _PROGRAM_KEY = "format_version", "__author__", "gn_detect_version"
_OURS = "gn_detect"
_TRAINING_STATE = {"optimizer", "losses", "evaluate_first"}  # a file with one of these is from a training
_MAX_COUNT = 2**40  # iterations and updates, far beyond any training
_MAX_FLOAT32 = 3.4e38  # GroupNorm adds eps in float32

IsValid = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MAX_COUNT)


def _is_eps(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MAX_FLOAT32


def _is_group_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_list_of(kind: type) -> IsValid:
    """Return a check for lists of exactly this type: True is no id."""
    return lambda value: isinstance(value, list) and all(type(item) is kind for item in value)


def _is_dict_of(is_valid: IsValid) -> IsValid:
    return lambda value: (
        isinstance(value, dict)
        and all(isinstance(key, str) for key in value)
        and all(map(is_valid, value.values()))
    )


def _anything(value: Any) -> bool:
    return True


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _kind(words: str, is_valid: IsValid, *, refuse: str = "ours", remedy: str = "copy it again") -> Any:
    """Describe the values of an entry.

    Args:
        words: for the error message.
        is_valid: the check of a value from a file.
        refuse: the files in which another value is an error: ``"ours"``, ``"training"`` (ours, from a
            training; elsewhere the names are free) or ``"any"``.
        remedy: for the error message.
    """
    return {"words": words, "is_valid": is_valid, "refuse": refuse, "remedy": remedy}


_CONVERT = "write it again with gn-detect convert"


def _training(words: str, is_valid: IsValid) -> Any:
    return field(default=None, metadata=_kind(words, is_valid, refuse="training"))


@dataclass(frozen=True)
class CheckpointMetadata:
    """Everything that a checkpoint says besides its weights. Entries with their default are not in the file.

    Attributes:
        class_names, category_ids: by label; the ids are those of the training JSON.
        input: format, mean and deviation of the images, and the place of the stride.
        config: the model's whole config as YAML, without local paths.
        config_keys: in a file without a config, the config keys that no tensor implies.
        group_norm_eps: by name of the norm; empty if all norms have :data:`USUAL_EPS`.
        group_norm_groups: number of groups by name of the norm.
        iteration: the last one that was done, from 0.
        seed: of the run.
        best: value of ``SOLVER.BEST_CHECKPOINT_METRIC`` so far.
        losses: losses since the last report.
        evaluate_first: an evaluation was due when the run was interrupted.
        data: fingerprints of the datasets, by config key and name.
        optimizer, scaler: state dicts.
        trained: the trained weights, where those of the checkpoint are their average.
        averaged_steps: number of updates of the average.
        author: another program's name, such as ``"torchvision"``.
        others: all other values of the file.
    """

    class_names: list[str] = field(default_factory=list, metadata=_kind("a list of names", _is_list_of(str)))
    category_ids: list[int] = field(
        default_factory=list, metadata=_kind("a list of whole numbers", _is_list_of(int))
    )
    config: str | None = field(default=None, metadata=_kind("text", _is_text))
    input: InputConvention | None = field(
        default=None, metadata=_kind("values by name", _is_dict_of(_anything))
    )
    config_keys: dict[str, Any] = field(
        default_factory=dict, metadata=_kind("values by key", _is_dict_of(_anything))
    )
    group_norm_eps: dict[str, float] = field(
        default_factory=dict,
        metadata=_kind("the eps of each norm", _is_dict_of(_is_eps), refuse="any", remedy=_CONVERT),
    )
    group_norm_groups: dict[str, int] = field(
        default_factory=dict,
        metadata=_kind(
            "the number of groups of each norm", _is_dict_of(_is_group_count), refuse="any", remedy=_CONVERT
        ),
    )
    iteration: int | None = _training("a whole number", _is_count)
    seed: int | None = _training("a whole number", _is_count)
    best: float | None = _training("a number", _is_number)
    losses: dict[str, list[float]] | None = _training("numbers by name", _is_dict_of(_is_list_of_numbers))
    evaluate_first: bool | None = _training("True or False", lambda value: isinstance(value, bool))
    data: dict[str, Any] | None = _training("values by name", _is_dict_of(_anything))
    optimizer: dict[str, Any] | None = _training("an optimiser's state", _is_dict_of(_anything))
    scaler: dict[str, Any] | None = _training("numbers by name", _is_dict_of(_is_number))
    trained: dict[str, Tensor] | None = _training("tensors by name", _is_dict_of(_is_tensor))
    averaged_steps: int | None = _training("a whole number", _is_count)
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
            default = entry.default if entry.default_factory is MISSING else entry.default_factory()
            if entry.metadata and value != default:
                content[entry.name] = value.as_metadata() if entry.name == "input" else value
        return content | self.others


def read_metadata(content: Mapping[str, Any], path: Path) -> CheckpointMetadata:
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
                f"{path} has format version {found!r}, and this gn_detect reads up to {FORMAT_VERSION}; "
                "install a newer one"
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
                f"{path}: its '{entry.name}' is not {entry.metadata['words']}, so the file is damaged; "
                f"{entry.metadata['remedy']}"
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

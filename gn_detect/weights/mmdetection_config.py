"""The settings of layers in the config inside an mmdetection checkpoint, which no tensor implies.

The text is Python and is not run. It is split by hand: Python's own parser may crash on a hostile text, and
refuses one that was cut off or follows a file name, as old versions store it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UserError
from ..ops import STANDARDIZATIONS
from .convention import plain_text

if TYPE_CHECKING:
    from ..config import Config
    from .checkpoint import Checkpoint

# The assignments in each ``dict(...)``, as they are written, by its place such as ``model.backbone``.
Sections = dict[str, dict[str, str]]

# Each character is looked at once, whatever a hostile text holds: an open string ends with its line.
_TOKEN = re.compile(
    r"\#.*|'''[\s\S]*?(?:'''|\Z)|\"\"\"[\s\S]*?(?:\"\"\"|\Z)"
    r"|'(?:\\.|[^'\\\n])*'?|\"(?:\\.|[^\"\\\n])*\"?|[\w.+-]+|\S"
)
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_DEEPEST = 8  # brackets in each other that are read
_MOST = 32  # assignments of a section that are read; the sections wanted have few

_PLAIN, _STANDARDISED = {"", "Conv", "Conv2d"}, {"ConvWS", "ConvWS2d"}
_USUAL_EPS = 1e-5  # of mmcv's ConvWS and of its norms

_PARTS = ("backbone", "neck", "bbox_head", "mask_head")
# The layers that mmdetection builds with ``conv_cfg``: not the RPN, linear, upsampling or predicting layers.
_CONV = re.compile(
    r"(roi_head\.)?(backbone\..+|neck\.(lateral|fpn)_convs\.\d+\.conv\.weight"
    r"|bbox_head\.shared_convs\.\d+\.conv\.weight|mask_head\.convs\.\d+\.conv\.weight)"
)
_NORM = re.compile(r"((?:.+\.)?(?:(?:bn|gn)\d?|downsample\.1))\.weight")


def refuse_unknown_convs(checkpoint: Checkpoint) -> None:
    """Refuse a file whose convolutions are not known.

    Raises:
        UserError: the config has convolutions of another kind than plain ones and mmcv's ConvWS, or does not
            say which ones are of this kind.
    """
    sections = read_sections(checkpoint.metadata.mmdetection_config)
    used = {place for place, section in sections.items() if _type(section) in _STANDARDISED}
    for part in _PARTS:
        section = _section_of(sections, part, "conv_cfg")
        if _type(section) not in _PLAIN | _STANDARDISED:
            raise UserError(
                "unknown-network",
                f"{checkpoint.path}: its config has convolutions of the type {_type(section)} in its {part}, "
                "which gn_detect does not compute; give a checkpoint with plain ones or ConvWS",
            )
    known = {f"{place}.conv_cfg" for part in _PARTS for place in _places(part)}
    strange = sorted(place for place in used - known if place.startswith("model."))
    strange += sorted(place for place in known - set(sections) if _is_open(sections, place))
    if used and (strange or not _standardised_convs(sections, checkpoint.tensors)):
        place = strange[0] if strange else "conv_cfg"
        raise UserError(
            "unknown-network",
            f"{checkpoint.path}: its config names {_type(sections[min(used)])}, and it is not clear which "
            f"convolutions standardise their weights (see {place} in it); give "
            "one whose meta.config is the whole config, with ConvWS in the backbone, neck, bbox or mask head",
        )


def _standardised_convs(sections: Sections, tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return kind and eps by name of the convolutions that have mmcv's ConvWS."""
    found: dict[str, list[Any]] = {}
    for name in _conv_weights(tensors):
        section = _section_of(sections, _part(name), "conv_cfg")
        if _type(section) in _STANDARDISED:
            found[name.removesuffix(".weight")] = ["WS", _number(section.get("eps", ""))]
    return found


def standardised_by_config(cfg: Config, tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return kind and eps by name of the convolutions for which our config of a file has a ``CONV``.

    Args:
        tensors: weights with mmdetection's names; those of a backbone alone have torchvision's.
    """
    model = cfg.model
    kinds = {
        "backbone": model.resnets.conv,
        "neck": model.fpn.conv,
        "bbox_head": model.roi_box_head.conv,
        "mask_head": model.roi_mask_head.conv,
    }
    parts = {name: _part(name) for name in _conv_weights(tensors)}
    if not parts:
        parts = {name: "backbone" for name, tensor in tensors.items() if tensor.dim() == 4}
    chosen = {name.removesuffix(".weight"): kinds[part] for name, part in parts.items() if kinds[part]}
    return {name: [kind, STANDARDIZATIONS[kind]] for name, kind in chosen.items()}


def _conv_weights(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.dim() == 4 and _CONV.fullmatch(name)]


def norm_entries(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a config of mmdetection sets: eps and groups of GroupNorms, and standardised weights.

    Args:
        content: the entries of a file.
        tensors: its weights.

    Returns:
        Entries for :func:`gn_detect.weights.metadata.read_metadata`, which checks the values.
    """
    sections = read_sections(plain_text(content.get("meta"), "config", "cfg"))
    if not sections:
        return {}
    eps: dict[str, float] = {}
    groups: dict[str, int] = {}
    for name, tensor in tensors.items():
        norm = _NORM.fullmatch(name)
        if norm is None or tensor.dim() != 1 or f"{norm[1]}.running_mean" in tensors:
            continue
        section = _section_of(sections, _part(name), "norm_cfg")
        if _type(section) not in ("GN", "GroupNorm"):
            continue
        if section.get("eps"):
            eps[norm[1]] = _number(section["eps"])
        if re.fullmatch(r"[0-9]{1,6}", section.get("num_groups", "")):
            groups[norm[1]] = int(section["num_groups"])
    convs = _standardised_convs(sections, tensors)
    return {"group_norm_eps": eps, "group_norm_groups": groups, "weight_standardization": convs}


def read_sections(text: str) -> Sections:
    """Return the ``key=value`` of each ``dict(...)`` in a config of mmdetection; nothing is run.

    Of several configs in a row, as old versions store them, later values replace former ones. A name that
    stands for a section, such as ``norm_cfg=norm_cfg``, brings the values of that section so far.
    """
    sections: Sections = {}
    places: list[str] = []
    key = ""
    tokens = [token for token in _TOKEN.findall(text) if not token.startswith("#")]
    for token, following in zip(tokens, [*tokens, ""][1:], strict=True):
        if token in _OPENING:
            places.append(key)
            key = ""
        elif token in _CLOSING:
            del places[-1:]
            key = ""
        elif following in ("=", ":"):
            key = token.strip("'\"")
        elif token not in ("=", ":", ",") and key:
            if len(places) <= _DEEPEST:
                _assign(sections, ".".join(places), key, token)
            key = key if following in _OPENING else ""
    return sections


def _assign(sections: Sections, place: str, key: str, value: str) -> None:
    section = sections.setdefault(place, {})
    if key in section or len(section) < _MOST:
        section[key] = value
    inner = f"{place}.{key}".removeprefix(".")
    if value == "None":
        sections.pop(inner, None)
    elif place and value in sections:
        whole = sections.get(inner, {}) | sections[value]
        sections[inner] = whole if len(whole) <= _MOST else sections[value]


def _part(name: str) -> str:
    return name.removeprefix("roi_head.").partition(".")[0]


def _places(part: str) -> tuple[str, str]:
    """Return the places of a part's config, since version 2 and before."""
    return f"model.roi_head.{part}", f"model.{part}"


def _section_of(sections: Sections, part: str, key: str) -> dict[str, str]:
    found = (sections.get(f"{place}.{key}") for place in _places(part))
    return next((section for section in found if section), {})


def _is_open(sections: Sections, place: str) -> bool:
    """Return whether a name stands there that the text does not explain."""
    section, _, key = place.rpartition(".")
    return sections.get(section, {}).get(key, "None") not in ("None", "dict")


def _type(section: dict[str, str]) -> str:
    # New configs write the module's name before it.
    return section.get("type", "").strip("'\"").rpartition(".")[2]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return _USUAL_EPS

"""The model card of exported weights: architecture, classes, data, results, use and licence.

Text from files (classes, data sets, names of files) stands in code spans, where nothing is markup.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from ..config.conflicts import has_fpn
from ..config.types import value_at
from ..config.yaml_text import parse_yaml
from ..errors import UserError
from ..files import atomic_write_text
from ..text import printable, shortened
from ..weights import Architecture
from ..weights.hub import HOST, HUB, LIBRARY, is_hub, read_name
from ..weights.metadata import program_version
from ..weights.zoo import ZooEntry, entry_of, is_remote

if TYPE_CHECKING:
    from ..config import Config
    from ..engine.predictor import Predictor
    from ..weights import CheckpointMetadata

_LISTED = 100  # most classes in a card
_AVERAGES = ("AP", "AP50", "AP75")
_KINDS = {"bbox": "box", "segm": "mask"}
_NO_LICENCE = "not stated"  # in the model zoo
_OURS = re.compile(rf"---\nlibrary_name: {LIBRARY}\n")  # a card begins so


def model_card(
    predictor: Predictor, metadata: CheckpointMetadata, *, name: str, source: str, licence: str = ""
) -> str:
    """Return a card in Markdown, with the YAML that the Hub reads at its top.

    Args:
        predictor: of the weights.
        metadata: of the checkpoint: it holds the results, the data and the config of the training.
        name: of the exported file, or ``hf://USER/REPO``.
        source: of the checkpoint: a file, ``zoo://NAME``, ``hf://USER/REPO@COMMIT`` or a URL.
        licence: see :func:`check_licence`; empty if it is not known.
    """
    cfg, start = predictor.cfg, _starting_weights(metadata)
    own = entry_of(source)
    if own is not None and own.licence != _NO_LICENCE and not licence:
        licence = own.licence.lower().replace(" ", "-")
    based_on = next((path for path in (source, start) if path is not None and is_hub(path)), None)
    title = name.removeprefix(HUB).partition("@")[0]
    sets = _data_sets(metadata)
    front = {
        "library_name": LIBRARY,
        "pipeline_tag": "image-segmentation" if cfg.model.mask_on else "object-detection",
        "tags": [
            "instance-segmentation" if cfg.model.mask_on else "object-detection",
            "mask-rcnn",
            "pytorch",
        ],
        **({"license": licence} if licence else {}),
        **({"base_model": read_name(based_on).repo} if based_on else {}),
        **_model_index(title, metadata, cfg, sets),
    }
    masks = "boxes and masks" if cfg.model.mask_on else "boxes"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---",
        f"# {code(title)}",
        f"{describe(cfg)}, a detector of gn_detect {program_version()}. It finds {masks} of "
        f"{len(predictor.class_names)} classes: {_classes(predictor.class_names)}.",
        *_training(sets),
        *_results(metadata, sets),
        "## Use",
        _usage(name),
        "## Licence",
        " ".join(_licence_note(licence, source, own, start)),
    ]
    return "\n\n".join(parts) + "\n"


def check_licence(licence: str) -> None:
    """Refuse what is no identifier of the Hub, such as ``apache-2.0`` and ``other``."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,63}", licence):
        raise UserError(
            "bad-argument", f"--license {licence}: give an identifier of the Hub, such as apache-2.0 or other"
        )


def check_card(exported: Path) -> Path:
    """Return the path of the card of an exported file: ``<file>.md``, so that each file has its own.

    ``README.md`` is the folder's, and stays as it is.

    Raises:
        UserError: something that is no card of ours is there.
    """
    path = exported.with_name(f"{exported.name}.md")
    if path.exists() and not _is_ours(path):
        raise UserError(
            "replaced-file",
            f"{path} is no model card of {LIBRARY}, and the export would replace it; "
            "move it, or give another --output",
        )
    return path


def write_card(exported: Path, text: str) -> Path:
    """Write the card of an exported file and return its path, see :func:`check_card`."""
    path = check_card(exported)
    atomic_write_text(path, text)
    return path


def code(text: str) -> str:
    """Return text as a code span of Markdown; hidden characters become their escapes."""
    text = printable(shortened(text, 200)) or " "  # two backticks alone would begin another span
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"


def describe(cfg: Config) -> str:
    """Return the architecture of a detector in a few words, such as "Mask R-CNN R-50-FPN with GN"."""
    names = ["MODEL.BACKBONE.MODEL", "MODEL.RESNETS.DEPTH", "MODEL.ROI_HEADS.NAME"]
    names += ["MODEL.FPN.OUT_CHANNELS"] * has_fpn(cfg)
    norm = cfg.model.backbone.norm if cfg.model.backbone.model else cfg.model.resnets.norm
    keys = {name: value_at(cfg, name) for name in names}
    return printable(Architecture(keys, is_detector=True, has_masks=cfg.model.mask_on, norm=norm))


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _OURS.match(file.read(200).decode("utf-8", "replace").replace("\r\n", "\n")) is not None
    except OSError:
        return False


def _classes(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(code, names[:_LISTED])) + more


def _data_sets(metadata: CheckpointMetadata) -> dict[str, tuple[int, int]]:
    """Return the numbers of images and objects of the training data, "", and of the test sets by name."""
    sets = {}
    for key, fingerprint in (metadata.data or {}).items():
        found = re.match(r"(\d{1,12}) images, (\d{1,12}) objects", str(fingerprint))
        if found is not None:
            sets[key.partition(" ")[2]] = int(found[1]), int(found[2])
    return sets


def _training(sets: dict[str, tuple[int, int]]) -> list[str]:
    if not sets:
        return []
    rows = ["| data | images | objects |", "|---|---|---|"]
    for name, (images, objects) in sets.items():
        rows.append(f"| {'tests' if name else 'training'} | {images} | {objects} |")
    return ["## Data", "\n".join(rows)]


def _averages(metadata: CheckpointMetadata, prefix: str) -> dict[str, dict[str, float]]:
    """Return AP, AP50 and AP75 by kind, of the results whose names begin with ``prefix``."""
    found = {
        kind: {name: metadata.results.get(f"{prefix}{kind}/{name}") for name in _AVERAGES} for kind in _KINDS
    }
    return {
        kind: {name: value for name, value in values.items() if value is not None}
        for kind, values in found.items()
        if values["AP"] is not None
    }


def _prefixes(sets: dict[str, tuple[int, int]]) -> dict[str, str]:
    """Return the prefix of a test set's results by its name; one set alone has none."""
    names = [name for name in sets if name]
    return {name: f"{name}/" if len(names) > 1 else "" for name in names or ["tests"]}


def _results(metadata: CheckpointMetadata, sets: dict[str, tuple[int, int]]) -> list[str]:
    rows = []
    for number, prefix in enumerate(_prefixes(sets).values(), start=1):
        for kind, values in _averages(metadata, prefix).items():
            cells = [f"{values[name]:.1f}" if name in values else "-" for name in _AVERAGES]
            rows.append(f"| {_KINDS[kind]}{f', tests {number}' if prefix else ''} | {' | '.join(cells)} |")
    if not rows:
        return []
    table = "\n".join([f"| | {' | '.join(_AVERAGES)} |", "|---|---|---|---|", *rows])
    return ["## Results", f"COCO's averages in percent, of the test images.\n\n{table}"]


def _model_index(
    title: str, metadata: CheckpointMetadata, cfg: Config, sets: dict[str, tuple[int, int]]
) -> dict[str, Any]:
    task = {"type": "image-segmentation" if cfg.model.mask_on else "object-detection"}
    results = []
    for name, prefix in _prefixes(sets).items():
        metrics = [
            {"type": "AP", "name": f"{_KINDS[kind]} {average}", "value": round(value, 2)}
            for kind, values in _averages(metadata, prefix).items()
            for average, value in values.items()
        ]
        if metrics:
            shown = printable(name)
            results.append({"task": task, "dataset": {"type": shown, "name": shown}, "metrics": metrics})
    return {"model-index": [{"name": printable(title), "results": results}]} if results else {}


def _usage(name: str) -> str:
    if name.endswith((".onnx", ".pt2")):
        module, call = "gn_detect.export", "ExportedPredictor"
    else:
        module, call = "gn_detect", "Predictor.from_pretrained"
    trust = ", trust=True" if name.endswith(".pt2") else ""
    lines = [
        f"from {module} import {call.partition('.')[0]}",
        f"predictor = {call}({json.dumps(name)}{trust})",
        'found = predictor("photo.jpg")  # boxes, scores, labels and masks',
    ]
    return "\n".join(["```python", *lines, "```"])


def _starting_weights(metadata: CheckpointMetadata) -> str | None:
    """Return ``MODEL.WEIGHTS`` of the training; "" from random weights, None if that is not recorded."""
    try:
        weights = parse_yaml(metadata.config or "")["MODEL"]["WEIGHTS"]  # exported weights have no such key
    except (KeyError, TypeError, yaml.YAMLError):  # or another program's config
        return None
    return weights if isinstance(weights, str) else None


def _licence_note(licence: str, source: str, own: ZooEntry | None, start: str | None) -> list[str]:
    """Return sentences on where the weights come from, and whose terms that brings along."""
    said = [
        f"Licence of these weights: {code(licence)}." if licence else "No licence of these weights is stated."
    ]
    if own is not None or is_hub(source):
        return [*said, f"These are {_origin(source)}."]
    if start is None:
        return [*said, "What the training started from is not recorded."]
    if not start:
        return [*said, "The training started from random weights."]
    return [
        *said,
        f"The training started from {_origin(start)}.",
        "Fine-tuned weights may inherit the terms of the weights that they started from.",
    ]


def _origin(path: str) -> str:
    """Return where weights were published, and under which licence."""
    if is_hub(path):
        name = read_name(path)
        page = f"[{name.repo}](https://{HOST}/{name.repo})"
        return f"the weights of {page} at {code(name.revision)}, whose page has its licence"
    try:
        entry = entry_of(path)
    except UserError:  # a name that this version's model zoo lacks
        entry = None
    if entry is not None:
        terms = "without a stated licence" if entry.licence == _NO_LICENCE else f"under {entry.licence}"
        return f"{code(entry.name)} of the model zoo, published {terms} ([source]({entry.source}))"
    host = urlsplit(path).hostname if is_remote(path) else None
    return (
        f"a file of {code(host)}, whose licence is not recorded"
        if host
        else ("a local file, whose licence is not recorded")
    )

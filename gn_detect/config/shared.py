"""The part of a config that belongs to weights: it alone goes to the Hub, and is taken from there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..text import shortened
from .load import Config, leaves, merge, nested, validate
from .schema import key_fields
from .types import to_plain, value_at

# Keys, and groups of keys, of the architecture, the preprocessing and the choice of detections. None of them
# names a file, a folder, a URL or a device.
SHARED = (
    "VERSION",
    "MODEL.MASK_ON", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.CONV_STYLE", "MODEL.GN", "MODEL.BACKBONE",
    "MODEL.RESNETS", "MODEL.FPN", "MODEL.PROPOSAL_GENERATOR", "MODEL.ANCHOR_GENERATOR", "MODEL.RPN",
    "MODEL.ROI_HEADS", "MODEL.ROI_BOX_HEAD", "MODEL.ROI_BOX_CASCADE_HEAD", "MODEL.ROI_MASK_HEAD",
    "INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "TEST.DETECTIONS_PER_IMAGE",
)  # fmt: skip


def shared_values(cfg: Config) -> dict[str, Any]:
    """Return the :data:`SHARED` keys of a config as nested dictionaries of plain values."""
    tree: dict[str, Any] = {}
    for key in SHARED:
        merge(tree, nested(key, to_plain(value_at(cfg, key))))
    return tree


def read_shared(values: Mapping[str, Any], source: str) -> Config:
    """Return the config that the :data:`SHARED` keys of untrusted values make; others have their defaults.

    Args:
        values: nested dictionaries. Keys of a run, such as ``OUTPUT_DIR``, are not read.
        source: names them in messages.

    Raises:
        UserError: a shared key or a group is unknown, such as ``_BASE_``, or has a value that does not fit.
    """
    for key in values:
        if key not in key_fields():
            raise UserError(
                "unknown-key",
                f"{source}: {shortened(key, 200)}: unknown key; it stands alone, without _BASE_",
            )
    tree: dict[str, Any] = {}
    for key in SHARED:
        value: Any = values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            merge(tree, nested(key, value))
    return validate(tree, dict.fromkeys(leaves(tree), source))

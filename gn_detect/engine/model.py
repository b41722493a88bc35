"""The model of a config, as training, evaluation and prediction make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..modeling import build_model
from ..modeling.mask_rcnn import MaskRCNN

if TYPE_CHECKING:
    from ..config import Config


MOST_PARAMETERS = 2**29
"""2 GB in float32; the largest published Mask R-CNN has 2e8."""


def make_model(cfg: Config) -> MaskRCNN:
    """``build_model``, on the CPU; ``FLOAT32_PRECISION`` and ``CUDNN_BENCHMARK`` hold from then on.

    Raises:
        UserError: numbers of channels, groups or levels in the config do not fit together, or are too large.
    """
    if cfg.float32_precision:
        torch.set_float32_matmul_precision(cfg.float32_precision)
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark
    try:
        with torch.device("meta"):  # shapes alone, before memory is taken
            count = sum(parameter.numel() for parameter in build_model(cfg).parameters())
        if count > MOST_PARAMETERS:
            raise ValueError(f"they make {count:.1e} parameters, more than {MOST_PARAMETERS:.1e}")
        return build_model(cfg)
    except ValueError as error:
        raise UserError(f"the MODEL keys do not fit together: {error}") from error

"""The model of a config, as training, evaluation and prediction make it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..modeling import build_model
from ..modeling.mask_rcnn import MaskRCNN

if TYPE_CHECKING:
    from ..config import Config


def make_model(cfg: Config) -> MaskRCNN:
    """``build_model``, on the CPU; ``FLOAT32_PRECISION`` and ``CUDNN_BENCHMARK`` hold from then on.

    Raises:
        UserError: numbers of channels, groups or levels in the config do not fit together.
    """
    if cfg.float32_precision:
        torch.set_float32_matmul_precision(cfg.float32_precision)
    torch.backends.cudnn.benchmark = cfg.cudnn_benchmark
    try:
        return build_model(cfg)
    except ValueError as error:
        raise UserError(f"the MODEL keys do not fit together: {error}") from error

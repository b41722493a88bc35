"""Write ``config.yaml`` and ``environment.json`` of a run: their paths are valid from every folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..config import dump_config, with_absolute_paths
from ..config.paths import FOLDER
from ..data import datasets_root
from ..distributed.group import world_size
from ..files import atomic_write_json, atomic_write_text
from .checkpoint import CONFIG, ENVIRONMENT
from .environment import describe_environment

if TYPE_CHECKING:
    from ..config import Config


def write_run_config(cfg: Config, device: torch.device) -> None:
    """Write ``config.yaml`` and ``environment.json`` into ``OUTPUT_DIR``.

    Raises:
        UserError: they cannot be written.
    """
    folder, named = Path(cfg.output_dir), {*cfg.datasets.train, *cfg.datasets.test}
    if named - cfg.datasets.registered.keys():  # some are built in
        cfg = cfg.replace({"DATASETS.ROOT": str(datasets_root(cfg))})
    cfg = with_absolute_paths(cfg)
    atomic_write_text(folder / CONFIG, dump_config(cfg))
    environment = describe_environment(device, world_size())
    atomic_write_json(folder / ENVIRONMENT, {**environment, FOLDER: cfg.output_dir}, indent=2)

"""Typed configuration with detectron2's keys."""

from .load import Config, dump_config, load_config, read_overrides
from .paths import with_absolute_paths, without_paths
from .schema import RegisteredDataset

__all__ = [
    "Config",
    "RegisteredDataset",
    "dump_config",
    "load_config",
    "read_overrides",
    "with_absolute_paths",
    "without_paths",
]

"""Typed configuration with detectron2's keys."""

from .load import Config, dump_config, load_config, read_overrides
from .schema import RegisteredDataset

__all__ = ["Config", "RegisteredDataset", "dump_config", "load_config", "read_overrides"]

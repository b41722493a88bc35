"""Processes of one training: ranks, collectives and their start."""

from .group import launch, scale_config

__all__ = ["launch", "scale_config"]

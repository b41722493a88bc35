"""Several processes in one training: their ranks, their collectives and their start."""

from .launch import launch

__all__ = ["launch"]

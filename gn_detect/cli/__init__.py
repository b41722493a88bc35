"""The command line: ``gn-detect <command>``, one small module for each command."""

from .main import main

__all__ = ["main"]

"""Write a run as one HTML page without other files: numbers, curves, mistakes, pictures, configuration."""

from .page import write_report

__all__ = ["write_report"]

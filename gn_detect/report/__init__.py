"""A run as one HTML page that needs nothing else: numbers, curves, mistakes, pictures, configuration."""

from .page import write_report

__all__ = ["write_report"]

"""Measurements and what they printed; see README.md."""

"""Examination and repair of datasets."""

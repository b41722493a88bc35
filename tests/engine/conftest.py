"""A small run that tests of the engine share."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_detect.config import Config, load_config
from tests.engine.tiny import make_dataset, write_config


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Annotation files of a train and a val part; tests must not change them."""
    folder = tmp_path_factory.mktemp("tiny")
    return make_dataset(folder / "train", 6, seed=1), make_dataset(folder / "val", 3, seed=2)


@pytest.fixture
def tiny_config(tmp_path: Path, tiny_data: tuple[Path, Path]) -> Config:
    """Six iterations of batch 2; output in ``tmp_path/run``."""
    return load_config(write_config(tmp_path, *tiny_data))

"""A Hub on this computer for each test, and files to put there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_detect import load_config
from gn_detect.config import dump_config
from gn_detect.modeling import build_model
from gn_detect.weights import CheckpointMetadata, save_weights
from tests.engine.tiny import NAMES, write_config

from .server import Hub, serve

REPO = "ann/shapes"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that huggingface_hub talks to, without Xet, and an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra 'hub'")
    hub = serve()
    # What HF_ENDPOINT, HF_HUB_DISABLE_XET, HF_HUB_OFFLINE and HF_TOKEN_PATH set when the package is imported.
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GN_DETECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield hub
    hub.close()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small detector with its classes and config in the header."""
    folder = tmp_path_factory.mktemp("weights")
    cfg = load_config(write_config(folder))
    torch.manual_seed(0)
    metadata = CheckpointMetadata(class_names=list(NAMES), category_ids=[3, 7], config=dump_config(cfg))
    save_weights(folder / "model.safetensors", build_model(cfg).state_dict(), metadata)
    return (folder / "model.safetensors").read_bytes()


def config_file(**entries: Any) -> bytes:
    """A ``config.json`` as gn_detect pushes it, with other entries."""
    return json.dumps(
        {"library_name": "gn_detect", "class_names": list(NAMES), "category_ids": [3, 7]} | entries
    ).encode()

"""The evaluators, one after the other."""

from __future__ import annotations

import pytest

BACKENDS = ["pycocotools", "hotcoco", "faster_coco_eval"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    return request.param

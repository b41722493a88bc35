"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when a kernel is defined, so this stands before anything imports the package.
    os.environ["TRITON_INTERPRET"] = "1"

# One thread, here and in the processes that tests start: workers of pytest share the cores, and by the
# sums of several threads one pixel in 85,000 of the masks' targets falls otherwise than in the oracle's.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# PyTorch's own test inputs forbid, for good, to set the flags of its backends, as a training run does.
torch.backends.disable_global_flags = lambda: None

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data, weights and oracles beside the repository; tests skip where it is missing."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "oracles").is_dir():
        pytest.skip(f"needs the real data and oracles in {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape half characters, which tests log on purpose: workers of pytest send their reports as UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip on machines without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

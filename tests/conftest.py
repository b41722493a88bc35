"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture(scope="session", autouse=True)
def empty_curves() -> Iterator[None]:
    """Leave curves and charts of runs empty: to draw them takes longer than the training of a small model.

    The fixture ``real_curves`` draws them, as processes that a test starts do.
    """
    from gn_detect.files import atomic_write_text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gn_detect.engine.drawing.plot_curves", lambda _, path: atomic_write_text(path, ""))
        patch.setattr("gn_detect.report.page.draw_chart", lambda *_, **__: "<svg></svg>")
        yield


@pytest.fixture
def real_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the curves of the test's runs, and the charts of its reports."""
    from gn_detect.visualize import draw_chart, plot_curves

    monkeypatch.setattr("gn_detect.engine.drawing.plot_curves", plot_curves)
    monkeypatch.setattr("gn_detect.report.page.draw_chart", draw_chart)


@pytest.fixture
def quick_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``launch`` fork its processes from one that has imported everything, which takes each seconds.

    They do not see patches, environment variables and standard output of the test.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gn_detect.cli.train", "gn_detect.engine.trainer"])
    module = importlib.import_module("gn_detect.distributed.launch")
    monkeypatch.setattr(module, "multiprocessing", SimpleNamespace(get_context=lambda _: context))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape half characters, which tests log on purpose: workers of pytest send their reports as UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_collection_finish() -> None:
    """Leave out of garbage collections what the imports made: a million objects, seen each time."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip on machines without one."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

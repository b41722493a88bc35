"""A run that is killed at any call that touches its folder, and resumed, ends as an undisturbed one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.every_call import compare_folders, disturb_at, run_folders

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")

PLACES = [
    "os.open .config.yaml",  # a folder without anything
    "replace .model_0000001.pth",  # the first checkpoint, in no list yet
    "replace .last_checkpoint",
    "detections_to_coco",
    "unlink model_0000001.pth",  # which CHECKPOINT.KEEP drops
    "replace .model_final.pth",
]


@pytest.mark.slow
def test_some_places() -> None:
    """In a process of its own, as forks of one that has computed may hang."""
    code = "from tests.engine.test_every_call import check; check()"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def check() -> None:
    """Before or after each of the places; of those of one name it is the last."""
    with run_folders(1) as (whole, make, places):
        for number, name in enumerate(PLACES):
            at = max(i for i, place in enumerate(places, 1) if place.startswith(name))
            folder = make()
            disturb_at(folder, 1, at, after=number % 2 == 1, second=5 * number)
            assert compare_folders(whole, folder) == [], name


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [1, 2])
def test_every_place(repository: Path, processes: int) -> None:
    command = [sys.executable, "-m", "tests.engine.chaos", "--every-call", "--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) places: (\d+) kills", done.stdout)
    assert found
    assert int(found[1]) > 100
    assert int(found[2]) == 2 * int(found[1])
    assert "differences: 0" in done.stdout

"""Workers that torchrun restarts after one was killed go on from the last checkpoint, and end the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_restarted_workers_end_with_the_same_weights(repository: Path) -> None:
    """The first process is killed: the others reach the restarted ones through it."""
    command = [sys.executable, "-m", "tests.engine.elastic", "--victim", "0", "DATALOADER.NUM_WORKERS", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "restarted at iterations [4]" in done.stdout
    assert "equal, bit for bit" in done.stdout

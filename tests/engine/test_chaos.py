"""A run that is killed a few times and resumed ends like one that was not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize(("name", "lost"), [("SIGKILL", True), ("SIGTERM", False)])
def test_killed_and_resumed_run_is_bit_identical(repository: Path, name: str, lost: bool) -> None:
    command = [sys.executable, "-m", "tests.engine.chaos", "--iterations", "9", "--kills", "3"]
    done = subprocess.run(
        [*command, "--signal", name], capture_output=True, text=True, cwd=repository, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(rf"{name} (\d+) times", done.stdout)
    assert found
    assert int(found[1]) >= 1
    assert "equal, bit for bit" in done.stdout
    assert lost or "steps computed: 9 for 9 iterations" in done.stdout

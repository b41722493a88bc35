"""The notebooks of examples/, run on small data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_docs import SMALL_MODEL

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))

SMALL = {
    "finetune": "num_train, num_val = 4, 2\n"
    f"overrides = {dict(zip(SMALL_MODEL[::2], SMALL_MODEL[1::2], strict=True))}",
    "convert": "name, weights, timm_name = 'resnet18', None, 'resnet18'\nnum_images, size, steps = 4, 32, 2",
}
"""Values for the cell with the tag ``parameters``."""

RUN = """
import json, sys
for source in json.load(sys.stdin):
    exec(compile(source, "cell", "exec"), globals())
"""


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_not_stored(path: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells_of(path))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run_in_order(path: Path, tmp_path: Path, repository: Path) -> None:
    if path.stem == "convert":
        pytest.importorskip("timm")
    sources = [
        SMALL[path.stem] if "parameters" in cell["metadata"].get("tags", ()) else "".join(cell["source"])
        for cell in cells_of(path)
    ]
    assert SMALL[path.stem] in sources
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = {"finetune": "runs/demo/report.html", "convert": "converted.pth"}
    assert (tmp_path / written[path.stem]).is_file()
    if path.stem == "finetune":
        assert (tmp_path / "out.jpg").is_file()
        assert "box AP" in done.stdout

"""The study's bookkeeping; its trainings run by hand (``python tools/norm_study.py --quick``)."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.norm_study import drawn
from benchmarks.norm_study.cells import BATCHES, NORMS, UPDATE, Cell, plan


def test_the_first_seed_of_everything_comes_before_the_second() -> None:
    cells = plan(["classifier", "detector"], seeds=2)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert len({cell.name for cell in cells}) == len(cells)
    for task in ("classifier", "detector"):
        for norm in NORMS:
            assert {c.batch for c in cells if (c.task, c.norm, c.seed) == (task, norm, 2)} == set(BATCHES)


def test_every_number_of_images_per_worker_divides_an_update() -> None:
    assert all(UPDATE % batch == 0 for batch in BATCHES)


def test_tables_give_mean_and_spread_over_the_seeds_that_there_are(tmp_path: Path) -> None:
    done = {
        Cell("classifier", "BN", 1, 1): {"error": 60.0},
        Cell("classifier", "BN", 1, 2): {"error": 70.0},
        Cell("classifier", "GN", 1, 1): {"error": 40.0},
        Cell("classifier", "GN", 2, 1, groups=4): {"error": 33.0},
    }
    text = drawn.tables(done)
    assert "| BN | 65.0 ± 7.1 |  |  |  |  | 2 |" in text
    assert "| GN | 40.0 |  |  |  |  | 1 |" in text
    assert "33.0" in text.splitlines()[-1]
    drawn.figure(done, tmp_path / "norms.png")
    assert Image.open(tmp_path / "norms.png").width > 500


@pytest.mark.parametrize(("groups", "size", "name"), [(0, 0, "GN"), (4, 0, "GN_groups4"), (0, 8, "GN_size8")])
def test_cells_have_names_of_their_own(groups: int, size: int, name: str) -> None:
    cell = Cell("detector", "GN", 2, 3, groups=groups, group_size=size)
    assert cell.name == f"detector_{name}_batch2_seed3"

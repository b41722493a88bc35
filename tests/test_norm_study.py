"""The study's bookkeeping; its trainings run by hand (``python tools/norm_study.py --quick``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.norm_study import detector, drawn
from benchmarks.norm_study.cells import BATCHES, NORMS, Cell, depends_on_batch, plan, quick_plan
from benchmarks.norm_study.classifier import UPDATE, BatchNormOfWorkers
from gn_detect.errors import Diverged, UserError


def test_every_seed_has_the_same_cells() -> None:
    cells = plan(["classifier", "detector"], seeds=2)
    assert len({cell.name for cell in cells}) == len(cells)
    first, second = ({replace(c, seed=0) for c in cells if c.seed == seed} for seed in (1, 2))
    assert first == second
    for task in ("classifier", "detector"):
        for norm in NORMS:
            batches = set(BATCHES) if depends_on_batch(task, norm) else {2}
            assert {c.batch for c in first if (c.task, c.norm) == (task, norm)} == batches


def test_what_tells_most_comes_first() -> None:
    """BN and GN with any number of images, of every seed; then, seed by seed, the groups and the rest."""
    cells = plan(["detector"], seeds=2)
    parts = ["groups" if c.groups or c.group_size else "main" for c in cells]
    first = parts.index("groups")
    for seed in (1, 2):
        reported = {(c.norm, c.batch) for c in cells[:first] if c.seed == seed}
        assert reported >= {(norm, batch) for norm in ("BN", "GN") for batch in BATCHES}
        assert reported >= {(norm, 2) for norm in NORMS}
    rest = (len(parts) - first) // 2
    assert parts == ["main"] * first + (["groups"] * 8 + ["main"] * (rest - 8)) * 2
    assert [c.seed for c in cells[first:]] == [1] * rest + [2] * rest
    assert all(c.norm not in ("BN", "GN") for c in cells[first:] if not (c.groups or c.group_size))
    assert len(set(cells)) == len(cells)
    third = [c for c in plan(["detector"], seeds=3) if c.seed == 3]
    assert {replace(c, seed=1) for c in third} == {
        c for c in cells if c.seed == 1 and not (c.groups or c.group_size)
    }
    assert {(c.task, c.norm) for c in quick_plan(["classifier"])} == {("classifier", n) for n in ("BN", "GN")}
    assert "| GN |" in drawn.tables({c: {"error": 1.0} for c in quick_plan(["classifier"])})


def test_a_detector_that_diverges_counts_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: UserError) -> Callable[..., None]:
        def train(_: object) -> None:
            raise error

        return train

    cell = Cell("detector", "FrozenBN", 2, 1)
    monkeypatch.setattr(detector, "train", fails(UserError("missing-config", "no such file")))
    with pytest.raises(UserError, match="no such file"):
        detector.average_precisions(cell, Path("shared"), quick=True)
    monkeypatch.setattr(detector, "train", fails(Diverged("diverged", "training diverged at iteration 24")))
    found = detector.average_precisions(cell, Path("shared"), quick=True)
    assert found["mask AP"] == found["box AP75"] == 0
    text = drawn.tables({cell: found})
    assert "| frozen BN |  | 0.0 |" in text
    assert "1 of 1 detectors with frozen BN diverged" in text


def test_every_number_of_images_per_worker_divides_an_update() -> None:
    assert all(UPDATE % batch == 0 and detector.IMAGES % batch == 0 for batch in BATCHES)


def test_tables_give_mean_and_spread_over_the_seeds_that_there_are(tmp_path: Path) -> None:
    done = {
        Cell("classifier", "BN", 1, 1): {"error": 60.0},
        Cell("classifier", "BN", 1, 2): {"error": 70.0},
        Cell("classifier", "GN", 2, 1): {"error": 40.0},
        Cell("classifier", "GN", 2, 1, groups=4): {"error": 33.0},
    }
    text = drawn.tables(done)
    assert "| BN | 65.0 ± 7.1 |  |  |  |  | 2 |" in text
    assert "| GN | 40.0 | 40.0 | 40.0 | 40.0 | 40.0 | 1 |" in text
    assert "33.0" in text.splitlines()[-1]
    drawn.figure(done, tmp_path / "norms.png")
    assert Image.open(tmp_path / "norms.png").width > 500


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_workers_side_by_side_are_workers_one_after_the_other(batch: int) -> None:
    torch.manual_seed(0)
    together, alone = BatchNormOfWorkers(3, batch), nn.BatchNorm2d(3)
    nn.init.normal_(together.weight)
    x = torch.randn(8, 3, 4, 5, requires_grad=True)
    alone.load_state_dict(together.state_dict())
    first, *others = x.split(batch)
    expected = torch.cat([alone(first), *(nn.BatchNorm2d.forward(copy.deepcopy(alone), x) for x in others)])
    found = together(x)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(x)
    inputs = [torch.autograd.grad(y, x, gradient, retain_graph=True)[0] for y in (found, expected)]
    torch.testing.assert_close(*inputs)
    expected[0:batch].sum().backward(retain_graph=True)
    first_worker = found[:batch].sum()
    weight = torch.autograd.grad(first_worker, together.weight)[0]
    torch.testing.assert_close(weight, alone.weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.running_mean, alone.running_mean)
    torch.testing.assert_close(together.running_var, alone.running_var)
    torch.testing.assert_close(together.eval()(x), alone.eval()(x))


@pytest.mark.parametrize(("groups", "size", "name"), [(0, 0, "GN"), (4, 0, "GN_groups4"), (0, 8, "GN_size8")])
def test_cells_have_names_of_their_own(groups: int, size: int, name: str) -> None:
    cell = Cell("detector", "GN", 2, 3, groups=groups, group_size=size)
    assert cell.name == f"detector_{name}_batch2_seed3"

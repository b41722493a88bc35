"""Polygons that cross themselves, compared with a slow reference."""

from __future__ import annotations

import time
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from gn_detect.data.doctor import checks
from gn_detect.data.doctor.checks import crosses_itself


def slowly(points: list[tuple[int, int]]) -> bool:
    """Each pair of edges solved in exact fractions."""
    points = [p for i, p in enumerate(points) if p != points[i - 1]]
    edges = list(zip(points, points[1:] + points[:1], strict=True))
    for (a, b), (c, d) in combinations(edges, 2):
        u, v, w = (b[0] - a[0], b[1] - a[1]), (d[0] - c[0], d[1] - c[1]), (c[0] - a[0], c[1] - a[1])
        across = u[0] * v[1] - u[1] * v[0]
        if across:
            s = Fraction(w[0] * v[1] - w[1] * v[0], across)
            t = Fraction(w[0] * u[1] - w[1] * u[0], across)
            if 0 < s < 1 and 0 < t < 1:
                return True
    return False


@pytest.mark.parametrize("pairs", [1, 1 << 18])
def test_random_polygons(monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    monkeypatch.setattr(checks, "_PAIRS", pairs)
    random = np.random.default_rng(0)
    answers = set()
    for _ in range(300):
        points = random.integers(0, 6, (random.integers(3, 8), 2))
        answer = slowly([tuple(p) for p in points.tolist()])
        assert crosses_itself(points.ravel().tolist()) == answer, points
        answers.add(answer)
    assert answers == {True, False}


def test_touching_and_repeated_points_are_no_crossing() -> None:
    assert not crosses_itself([0, 0, 4, 0, 4, 4, 4, 4, 0, 4, 0, 0])
    assert not crosses_itself([0, 0, 2, 2, 4, 0, 4, 4, 2, 2, 0, 4])  # two triangles that share a corner
    assert crosses_itself([0, 0, 4, 4, 4, 0, 0, 4])


def test_long_outlines_take_seconds() -> None:
    """Edges are compared only with those at their x; a million points on one line are not compared at all."""
    angles = np.linspace(0, 2 * np.pi, 200_000, endpoint=False)
    circle = np.column_stack([50 + 40 * np.cos(angles), 50 + 40 * np.sin(angles)])
    begin = time.process_time()
    assert not crosses_itself(circle.ravel().tolist())
    circle[1000], circle[90_000] = circle[90_000].copy(), circle[1000].copy()
    assert crosses_itself(circle.ravel().tolist())
    comb = [number for i in range(300_000) for number in (5, i % 50)]
    assert not crosses_itself(comb)
    assert time.process_time() - begin < 20

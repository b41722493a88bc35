"""The doctor's picture counts every image and every object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from gn_detect.data.datasets import DatasetSource
from gn_detect.data.doctor.report import examine
from gn_detect.visualize.histograms import draw_histograms
from tests.engine.tiny import make_dataset


@pytest.mark.parametrize(
    "most", [1, 79, *(pytest.param(n, marks=pytest.mark.slow) for n in (40, 61, 78, 500))]
)
def test_the_most_crowded_image_has_its_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    annotations = make_dataset(tmp_path, 3)
    (part,) = examine([DatasetSource("a", annotations, annotations.parent / "images")]).parts
    for count, image in zip((0, 1, most), part.images, strict=True):
        part.image_counts[image] = count
    counted = {}
    hist = Axes.hist

    def note(self: Axes, *args: object, **keywords: object) -> object:
        drawn = hist(self, *args, **keywords)
        counted[len(counted)] = np.sum(drawn[0])
        return drawn

    monkeypatch.setattr(Axes, "hist", note)
    draw_histograms(tmp_path / "picture.png", [part])
    assert counted[1] == 3

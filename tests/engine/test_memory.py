"""Large photos: masks of detections are pasted, coded and drawn one by one."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_detect.engine.drawing import Classes, draw_entries
from gn_detect.evaluation import detections_to_coco
from gn_detect.structures import Detections

SIZE = 600, 800
PIXELS = SIZE[0] * SIZE[1]


def whole_image_detections(count: int, size: tuple[int, int]) -> Detections:
    """Masks that fill nearly the whole image, which is the most that they can take."""
    height, width = size
    boxes = torch.tensor([[0.0, 0.0, width, height]]).repeat(count, 1)
    probabilities = torch.full((count, 28, 28), 0.9)
    probabilities[:, :2] = 0.1
    return Detections(boxes, torch.linspace(1, 0.5, count), torch.zeros(count).long(), probabilities)


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes of arrays at a time."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_pasting_and_coding_takes_no_memory_for_each_mask() -> None:
    found = whole_image_detections(30, SIZE)
    assert peak_of(lambda: detections_to_coco(found, 1, [1], SIZE)) < 4 * PIXELS  # of 30 masks


@pytest.mark.parametrize("with_truth", [False, True])
def test_drawing_takes_no_memory_for_each_mask(with_truth: bool) -> None:
    picture, classes = np.zeros((*SIZE, 3), dtype=np.uint8), Classes(["thing"], [1])

    def peak(count: int) -> int:
        entries = detections_to_coco(whole_image_detections(count, SIZE), 1, [1], SIZE)
        truth = [{**entry, "id": i, "area": 1, "iscrowd": 0} for i, entry in enumerate(entries)]
        return peak_of(lambda: draw_entries(picture, entries, classes, truth if with_truth else None))

    peak(1)  # what is imported for drawing counts, too
    assert peak(12) < peak(4) + 4 * PIXELS


PREDICT = """
import resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from gn_detect.engine.predict_files import Task, predict_images
from tests.engine.test_memory import whole_image_detections

class Predictor:
    class_names, category_ids = ["thing"], [1]
    def find(self, image):
        return whole_image_detections(30, image.shape[:2])

def run(width, height):
    path = Path(sys.argv[1]) / f"{width}.jpg"
    Image.fromarray(np.tile(np.arange(width, dtype=np.uint8)[None, :, None], (height, 1, 3))).save(path)
    outcome = predict_images(Predictor(), [Task(path, 1, path.with_suffix(".png"))], path.parent)
    assert outcome.objects == 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = run(60, 40)
print(run(6000, 4000) - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has Linux's unit")
def test_a_photo_of_24_megapixels_takes_less_than_a_gigabyte(tmp_path: Path, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(tmp_path)], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1000  # MiB; far more where all masks were bitmaps at the same time

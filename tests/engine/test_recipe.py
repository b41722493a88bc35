"""What is chosen for data without a config, and what follows from the user's own keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gn_detect.config import load_config
from gn_detect.engine.autoconfig import Machine, Recipe, Survey, make_recipe
from gn_detect.weights import Architecture

CPU = Machine(on_gpu=False, processes=1, memory=16 * 2**30, cores=4)
GPU = Machine(on_gpu=True, processes=1, memory=24 * 2**30, cores=16)

R50 = {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.NORM": "GN", "MODEL.FPN.OUT_CHANNELS": 256}
DETECTOR = Architecture(R50, is_detector=True, has_masks=True, norm="GN")


def make_survey(size: float = 60, images: int = 100, ratio: float = 1.0, **changes: Any) -> Survey:
    """Images of 480 x 640 with two objects each, of about ``size`` pixels and height / width ``ratio``."""
    random = np.random.default_rng(0)
    centre = random.uniform(150, 330, (2 * images, 2))
    sides = size * random.uniform(0.8, 1.25, (2 * images, 1)) * np.array([ratio**-0.5, ratio**0.5])
    facts: dict[str, Any] = {
        "name": "data",
        "class_names": ["cat", "dog"],
        "images": np.full((images, 2), (480, 640)),
        "boxes": np.concatenate([centre - sides / 2, centre + sides / 2], axis=1),
        "image_of": np.repeat(np.arange(images), 2),
        "has_masks": True,
        "has_bitmaps": False,
        "most_objects": 2,
    }
    return Survey(**(facts | changes))


def as_config(recipe: Recipe) -> Any:
    keys = [text for key, value in recipe.keys.items() for text in (key, str(value))]
    return load_config(recipe.base, keys)


@pytest.mark.parametrize("machine", [CPU, GPU])
@pytest.mark.parametrize("architecture", [None, DETECTOR])
def test_every_recipe_is_a_valid_config_with_a_reason_for_each_choice(
    machine: Machine, architecture: Architecture | None
) -> None:
    recipe = make_recipe(make_survey(), machine, "model.pth" if architecture else "", architecture)
    cfg = as_config(recipe)
    assert cfg.model.roi_heads.num_classes == 2
    assert cfg.model.mask_on
    assert cfg.model.resnets.norm == "GN"
    assert cfg.model.resnets.depth == (50 if machine.on_gpu or architecture else 18)
    topics = {choice.topic for choice in recipe.choices}
    assert {"classes", "model", "batch", "image size", "anchors", "schedule", "learning rate"} <= topics
    assert all(choice.reason for choice in recipe.choices)
    assert len(str(recipe).splitlines()) == len(recipe.choices)


def test_small_objects_get_small_anchors_and_larger_images() -> None:
    usual, small = (make_recipe(make_survey(size), CPU) for size in (150, 16))
    anchors = "MODEL.ANCHOR_GENERATOR.SIZES"
    assert usual.keys[anchors][0][0] > small.keys[anchors][0][0]
    assert usual.keys["INPUT.MIN_SIZE_TEST"] < small.keys["INPUT.MIN_SIZE_TEST"]


def test_long_objects_get_other_aspect_ratios() -> None:
    found = make_recipe(make_survey(80, ratio=5.0), CPU).keys["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"]
    assert len(found[0]) == 3
    assert max(found[0]) > 3


def test_a_trained_rpn_keeps_its_anchors_where_they_serve() -> None:
    recipe = make_recipe(make_survey(100), GPU, "model.pth", DETECTOR)
    assert recipe.keys["MODEL.ANCHOR_GENERATOR.SIZES"] == [[32.0], [64.0], [128.0], [256.0], [512.0]]


def test_learning_rate_follows_the_batch_and_the_batch_the_processes() -> None:
    one, eight = (make_recipe(make_survey(), Machine(True, n, 24 * 2**30, 16)) for n in (1, 8))
    assert (one.keys["SOLVER.IMS_PER_BATCH"], eight.keys["SOLVER.IMS_PER_BATCH"]) == (2, 16)
    assert eight.keys["SOLVER.BASE_LR"] == pytest.approx(0.02) == 8 * one.keys["SOLVER.BASE_LR"]
    assert one.keys["SOLVER.MAX_ITER"] == 8 * eight.keys["SOLVER.MAX_ITER"]


def test_given_keys_win_and_the_rest_follows() -> None:
    given = {"SOLVER.IMS_PER_BATCH": 4, "SOLVER.MAX_ITER": 50, "MODEL.RESNETS.DEPTH": 34}
    recipe = make_recipe(make_survey(), CPU, given=given)
    assert {key: recipe.keys[key] for key in given} == given
    assert recipe.keys["SOLVER.BASE_LR"] == pytest.approx(0.02)  # 0.005 for each of 4
    assert recipe.keys["SOLVER.WARMUP_ITERS"] == 5
    assert recipe.keys["TEST.EVAL_PERIOD"] == 17
    assert "SOLVER.MAX_ITER as given" in str(recipe)
    assert "evaluation: 3 evaluations;" in str(recipe)


def test_tiles_to_train_on_decide_about_the_size() -> None:
    """Images of 4800 x 6400 in tiles of 480 are resized as images of 480 x 480, in evaluation, too."""
    large = make_survey(images=100)
    whole = make_survey()
    large = Survey(**{**vars(large), "images": large.images * 10})
    given = {"DATALOADER.TILES.SIZE": 480, "DATALOADER.TILES.OVERLAP": 0.3}
    cfg, untiled = (
        as_config(make_recipe(data, CPU, given=keys)) for data, keys in ((large, given), (whole, {}))
    )
    assert (cfg.test.tiles.size, cfg.test.tiles.overlap) == (480, 0.3)
    assert cfg.input.min_size_train == untiled.input.min_size_train
    assert cfg.model.anchor_generator.sizes == untiled.model.anchor_generator.sizes
    assert untiled.test.tiles.size == 0


def test_little_memory_makes_images_smaller() -> None:
    small = Machine(True, 1, 6 * 2**30, 16)
    sizes = [make_recipe(make_survey(), m).keys["INPUT.MIN_SIZE_TEST"] for m in (GPU, small)]
    assert sizes[0] == 800
    assert sizes[1] < 600
    assert "6 GB" in str(make_recipe(make_survey(), small))


def test_boxes_alone_many_objects_and_no_val() -> None:
    data = make_survey(has_masks=False, most_objects=240)
    recipe = make_recipe(data, CPU, has_val=False)
    assert recipe.keys["MODEL.MASK_ON"] is False
    assert "TEST.EVAL_PERIOD" not in recipe.keys
    assert recipe.keys["TEST.DETECTIONS_PER_IMAGE"] == 300
    assert "--val-json" in str(recipe)


def test_frozen_batch_norm_is_said_to_stay_frozen() -> None:
    keys = R50 | {"MODEL.RESNETS.NORM": "FrozenBN"}
    recipe = make_recipe(make_survey(), GPU, "bn.pth", Architecture(keys, True, True, "FrozenBN"))
    assert "gn-detect convert" in str(recipe)


def test_other_classes_start_afresh_and_are_said_to() -> None:
    def classes_of(names: list[str]) -> str:
        return (
            make_recipe(make_survey(), GPU, "w.pth", Architecture(R50, True, True, "GN", names))
            .choices[0]
            .reason
        )

    assert "afresh" in classes_of(["a", "b"])
    assert "afresh" not in classes_of(["cat", "dog"])


def test_a_detector_without_a_pyramid_has_one_level_of_anchors() -> None:
    keys = {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.NORM": "FrozenBN"}
    recipe = make_recipe(make_survey(40), GPU, "c4.pth", Architecture(keys, True, True, "FrozenBN"))
    cfg = as_config(recipe)
    assert cfg.model.roi_heads.name == "Res5ROIHeads"
    assert len(cfg.model.anchor_generator.sizes) == 1

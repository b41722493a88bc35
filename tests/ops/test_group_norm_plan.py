"""The choice of kernels and tiles."""

from __future__ import annotations

import itertools

import pytest

from gn_detect.bench.norms import LAYERS
from gn_detect.ops.group_norm_triton import plan
from gn_detect.ops.group_norm_triton.plan import Plan, alignment, make_plan, power_of_two

CASES = list(itertools.product(LAYERS.values(), (1, 2), (2, 4), (False, True), ("forward", "backward")))


def plan_of(
    layer: str, images: int = 1, itemsize: int = 2, last: bool = False, direction: str = "forward"
) -> Plan:
    n, c, h, w = LAYERS[layer].shape
    return make_plan(direction, n * images, c, h * w, 32, itemsize, last)


def test_every_element_is_covered_once() -> None:
    for layer, images, itemsize, last, direction in CASES:
        n, c, h, w = layer.shape
        p = make_plan(direction, n * images, c, h * w, 32, itemsize, last)
        depth = c // 32
        assert p.pieces * p.block_depth >= depth > (p.pieces - 1) * p.block_depth
        assert p.block_groups == 1 or p.pieces == 1
        assert p.tiles == -(-32 // p.block_groups) * p.pieces
        covered = p.splits * p.split_tiles * p.block_pixels
        assert covered >= h * w > covered - p.split_tiles * p.block_pixels
        assert not p.one_launch or (p.pieces == 1 and p.splits == 1)


def test_tiles_fit_registers_and_threads() -> None:
    for layer, images, itemsize, last, direction in CASES:
        n, c, h, w = layer.shape
        p = make_plan(direction, n * images, c, h * w, 32, itemsize, last)
        extents = (p.block_groups, p.block_depth, p.block_pixels)
        assert all(power_of_two(extent) == extent for extent in extents)
        elements = p.block_groups * p.block_depth * p.block_pixels
        thread = 32 if direction == "forward" else 16
        if n >= 128:  # RoIs, of which one warp or a few hold whole groups
            thread = 128 // itemsize if direction == "forward" else 32
        assert elements <= p.num_warps * 32 * thread


def test_large_tensors_fill_the_gpu() -> None:
    """One image's tensors of 8 to 34 MB get two or three programs for each of 132 multiprocessors."""
    for layer, itemsize, last, direction in itertools.product(
        ("stem", "res2 conv3", "res3 conv3", "res4 conv3"), (2, 4), (False, True), ("forward", "backward")
    ):
        p = plan_of(layer, 1, itemsize, last, direction)
        assert not p.one_launch
        assert 264 <= p.tiles * p.splits <= 396


@pytest.mark.parametrize("images", [1, 2, 3, 4, 8])
def test_split_programs_run_at_the_same_time(images: int) -> None:
    """One more than three for each of 132 multiprocessors would wait until others have ended."""
    for layer, itemsize, last, direction in itertools.product(
        LAYERS, (2, 4), (False, True), ("forward", "backward")
    ):
        p = plan_of(layer, images, itemsize, last, direction)
        assert p.one_launch or images * p.tiles * p.splits <= 132 * 3, layer


def test_small_groups_take_one_launch() -> None:
    for last in (False, True):
        for layer in ("res5 conv1, conv2", "p5", "box head", "mask head"):
            assert plan_of(layer, last=last).one_launch
    assert plan_of("box head", last=True).holds_all(49)
    assert plan_of("mask head").holds_all(196)
    assert not plan_of("res5 conv3").one_launch


def test_affine_gradients_of_many_rois_leave_few_partial_sums() -> None:
    p = plan_of("box head", images=2, last=True, direction="backward")
    rois, (_, c, h, w) = 1024, LAYERS["box head"].shape
    runs = -(-rois // p.samples)
    assert p.samples > 1
    assert runs * 2 * c * 4 < 0.05 * rois * c * h * w * 2
    assert plan_of("res4 conv3", images=2, direction="backward").samples == 1


def test_results_do_not_depend_on_the_machine() -> None:
    """The plan knows nothing but the shape."""
    assert make_plan("forward", 1, 64, 268800, 32, 2, False) == Plan(
        one_launch=False,
        block_groups=1,
        block_depth=2,
        block_pixels=2048,
        pieces=1,
        tiles=32,
        splits=12,
        split_tiles=11,
        samples=1,
        num_warps=8,
        stages=3,
    )


@pytest.mark.parametrize(
    ("pixels", "itemsize", "expected"),
    [(67200, 2, 8), (67200, 4, 4), (1050, 2, 2), (49, 2, 1), (196, 2, 4), (8, 8, 2)],
)
def test_alignment(pixels: int, itemsize: int, expected: int) -> None:
    assert alignment(pixels, itemsize) == expected


@pytest.mark.parametrize("channels", [1, 3, 32, 96, 2048, 5000])
@pytest.mark.parametrize("groups", [1, "all", 3])
def test_unusual_groups_have_a_plan(channels: int, groups: int | str) -> None:
    count = channels if groups == "all" else int(groups)
    if channels % count:
        pytest.skip("does not divide")
    for pixels, last, direction in itertools.product(
        (1, 49, 169, 576, 1024, 5000, 3_000_000), (False, True), ("forward", "backward")
    ):
        for samples, itemsize in itertools.product((1, 5000), (2, 4, 8)):
            p = make_plan(direction, samples, channels, pixels, count, itemsize, last)
            elements = p.block_groups * p.block_depth * p.block_pixels
            assert elements <= (16384 if direction == "forward" else 8192)
            assert elements <= p.num_warps * 32 * (64 if direction == "forward" else 32)
            assert p.tiles * p.splits >= 1


def test_a_tile_of_several_groups_holds_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels give a piece of a group a tile of its own, also where a line has room for more."""
    monkeypatch.setattr(plan, "ONE_LAUNCH_BYTES", 0)
    monkeypatch.setattr(plan, "PIECE", 8)
    found = make_plan.__wrapped__("forward", 1, 32, 192, 2, 2, True)
    assert (found.pieces, found.block_groups, found.tiles) == (2, 1, 4)

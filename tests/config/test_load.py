"""Reading configs: files, bases, overrides, errors."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from gn_detect.config import Config, dump_config, load, load_config
from gn_detect.config.load import leaves
from gn_detect.config.schema import NORMS
from gn_detect.config.types import parse_literal, to_plain
from gn_detect.errors import UserError
from gn_detect.layers import NORM_NAMES
from tests.refusal import refusal

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHIPPED = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
EXPECTED = [
    "COCO-Detection/faster_rcnn_R_101_FPN_1x",
    "COCO-Detection/faster_rcnn_R_101_FPN_3x",
    "COCO-Detection/faster_rcnn_R_50_FPN_1x",
    "COCO-Detection/faster_rcnn_R_50_FPN_3x",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x",
    "GN/mask_rcnn_R_50_C4_gn",
    "GN/mask_rcnn_R_50_FPN_2x_gn",
    "GN/mask_rcnn_R_50_FPN_3x_gn",
    "GN/mask_rcnn_R_101_FPN_2x_gn",
    "GN/mask_rcnn_R_101_FPN_3x_gn",
    "GN/faster_rcnn_R_50_FPN_2x_gn",
    "GN/faster_rcnn_R_50_FPN_3x_gn",
    "GN/faster_rcnn_R_101_FPN_2x_gn",
    "GN/faster_rcnn_R_101_FPN_3x_gn",
    "GN/scratch_mask_rcnn_R_50_FPN_3x_gn",
    "GN/scratch_mask_rcnn_R_101_FPN_3x_gn",
    "GN/scratch_mask_rcnn_R_50_FPN_9x_gn",
    "quick/demo",
    "quick/nuclei_r18_gn",
    "quick/coco80_r18_gn",
]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def error_of(*args) -> str:
    with pytest.raises(UserError) as caught:
        load_config(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_survives_a_dump(name: str, tmp_path: Path) -> None:
    cfg = load_config(name)
    assert load_config(write(tmp_path, "dumped.yaml", dump_config(cfg))) == cfg


def test_everything_promised_is_shipped() -> None:
    assert {f"{name}.yaml" for name in EXPECTED} <= set(SHIPPED)


def test_shipped_configs_are_what_their_names_say() -> None:
    gn = load_config("GN/mask_rcnn_R_101_FPN_2x_gn.yaml")
    assert (gn.model.resnets.depth, gn.solver.max_iter, gn.solver.steps) == (101, 180000, (120000, 160000))
    assert gn.model.resnets.norm == gn.model.fpn.norm == gn.model.roi_mask_head.norm == "GN"
    assert (gn.model.roi_box_head.num_conv, gn.model.roi_box_head.num_fc) == (4, 1)
    assert not gn.model.resnets.stride_in_1x1
    frozen = load_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml")
    assert (frozen.model.resnets.norm, frozen.model.resnets.stride_in_1x1) == ("FrozenBN", True)
    assert frozen.model.mask_on
    assert frozen.solver.max_iter == 270000
    assert not load_config("GN/faster_rcnn_R_50_FPN_3x_gn.yaml").model.mask_on
    scratch = load_config("GN/scratch_mask_rcnn_R_50_FPN_9x_gn.yaml")
    assert (scratch.model.weights, scratch.model.backbone.freeze_at) == ("", 0)
    assert (scratch.solver.ims_per_batch, scratch.solver.max_iter) == (64, 202500)
    jitter = load_config("new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.yaml")
    assert (jitter.model.resnets.depth, jitter.model.rpn.conv_dims) == (101, (-1, -1))
    assert jitter.model.resnets.norm == jitter.model.fpn.norm == jitter.model.roi_mask_head.norm == "SyncBN"
    assert (jitter.solver.max_iter, jitter.solver.steps) == (737500, (655556, 710184))
    assert (jitter.solver.base_lr, jitter.solver.weight_decay) == (0.1, 4e-5)
    assert jitter.input.large_scale_jitter.size == (1024, 1024)
    assert load_config("Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml").test.precise_bn.enabled


def test_a_full_config_of_detectron2_loads_as_it_is(shared_dir: Path) -> None:
    path = shared_dir / "oracles/dsb_r18_gn/config.yaml"
    cfg = load_config(path)
    assert cfg.model.resnets.depth == 18
    assert cfg.model.roi_heads.num_classes == 1
    # Every key of the file is in the config with the file's value.
    ours, theirs = to_plain(cfg), yaml.safe_load(path.read_text())
    for key in leaves(theirs):
        a, b = ours, theirs
        for part in key.split("."):
            a, b = a[part], b[part]
        if not isinstance(b, dict):
            assert a == b, key


def test_the_nuclei_config_is_the_recipe_of_the_oracle(shared_dir: Path) -> None:
    ours = to_plain(load_config("quick/nuclei_r18_gn.yaml"))
    theirs = to_plain(load_config(shared_dir / "oracles/dsb_r18_gn/config.yaml"))
    for tree in (ours, theirs):
        del tree["DATASETS"], tree["OUTPUT_DIR"], tree["MODEL"]["DEVICE"], tree["SOLVER"]["CHECKPOINT_PERIOD"]
    assert ours == theirs


def test_defaults_are_detectron2s(shared_dir: Path) -> None:
    """Keys that the oracle's run left alone have the default value."""
    stored = yaml.safe_load((shared_dir / "oracles/dsb_r18_gn/config.yaml").read_text())
    cfg = to_plain(Config())
    for section in ("RETINANET", "SEM_SEG_HEAD", "PANOPTIC_FPN", "ROI_KEYPOINT_HEAD", "ROI_BOX_CASCADE_HEAD"):
        assert cfg["MODEL"][section] == stored["MODEL"][section]
    assert cfg["MODEL"]["PIXEL_MEAN"] == stored["MODEL"]["PIXEL_MEAN"]
    assert (cfg["SOLVER"]["MAX_ITER"], cfg["SOLVER"]["BASE_LR"], cfg["INPUT"]["MIN_SIZE_TRAIN"]) == (
        40000,
        1e-3,
        [800],
    )
    assert cfg["TEST"]["AUG"] == stored["TEST"]["AUG"]


def test_bases_overrides_and_tuples(tmp_path: Path) -> None:
    write(tmp_path, "first.yaml", "SOLVER: {MAX_ITER: 1, BASE_LR: 1e-3}\nSEED: 1\n")
    write(tmp_path, "second.yaml", "SOLVER:\n  MAX_ITER: 2\n")
    text = "_BASE_: [first.yaml, second.yaml]\nSOLVER: {STEPS: !!python/tuple [3, 4]}\n"
    text += "DATASETS: {TRAIN: \"('a', 'b')\"}\n"
    path = write(tmp_path, "top.yaml", text)
    cfg = load_config(
        path, ["SEED", "5", "SOLVER.STEPS", "(7,)", "DATASETS.TEST", "one", "MODEL.MASK_ON", "True"]
    )
    assert (cfg.solver.max_iter, cfg.solver.base_lr, cfg.solver.steps, cfg.seed) == (2, 1e-3, (7,), 5)
    assert cfg.datasets.train == ("a", "b")
    assert cfg.datasets.test == ("one",)
    assert cfg.model.mask_on
    assert load_config(path).solver.steps == (3, 4)


def test_registered_datasets(tmp_path: Path) -> None:
    text = "DATASETS:\n  REGISTER:\n    mine: {annotations: a.json, images: pictures}\n"
    entry = load_config(write(tmp_path, "c.yaml", text)).datasets.registered["mine"]
    assert (entry.annotations, entry.images) == ("a.json", "pictures")


def test_a_config_is_read_only_and_replace_checks() -> None:
    cfg = load_config()
    with pytest.raises(ValidationError):
        cfg.seed = 3
    changed = cfg.replace({"SOLVER.MAX_ITER": 10, "DATASETS.TRAIN": ["x"]})
    assert (changed.solver.max_iter, changed.datasets.train, cfg.solver.max_iter) == (10, ("x",), 40000)
    assert isinstance(changed, Config)
    with refusal("bad-value", "SOLVER.MAX_ITER: 0"):
        cfg.replace({"SOLVER.MAX_ITER": 0})


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("SOLVER.MAX_ITERS", "3", ["SOLVER.MAX_ITERS: unknown key", "did you mean SOLVER.MAX_ITER?"]),
        ("MAX_ITER", "3", ["MAX_ITER: unknown key", "did you mean SOLVER.MAX_ITER?"]),
        ("MODEL.RESNET.DEPTH", "50", ["MODEL.RESNET", "did you mean MODEL.RESNETS?"]),
        ("SOLVER.MAX_ITER", "many", ["SOLVER.MAX_ITER: 'many' does not fit", "integer"]),
        ("SOLVER.BASE_LR", "-1", ["SOLVER.BASE_LR", "greater than 0"]),
        (
            "MODEL.RESNETS.NORM",
            "XN",
            ["MODEL.RESNETS.NORM: 'XN' is not supported", "'GN', 'GN1', 'IN', 'LN'"],
        ),
        ("MODEL.KEYPOINT_ON", "True", ["MODEL.KEYPOINT_ON: True is not supported; it must be False"]),
        ("MODEL.META_ARCHITECTURE", "RetinaNet", ["'RetinaNet' is not supported", "'GeneralizedRCNN'"]),
        (
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE",
            "[False,True,True]",
            ["DEFORM_ON_PER_STAGE"],
        ),
        (
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
            "ROIPool",
            ["'ROIPool' is not supported", "'ROIAlignV2', 'ROIAlign'"],
        ),
        ("SOLVER.ACCUMULATE", "3", ["SOLVER.ACCUMULATE: 3 must divide"]),
        ("TEST.AUG.MIN_SIZES", "[0]", ["TEST.AUG.MIN_SIZES"]),
        ("MODEL.RPN.IN_FEATURES", "[p2, p9]", ["MODEL.RPN.IN_FEATURES", "p2, p3, p4, p5, p6"]),
        ("MODEL.RPN.IOU_THRESHOLDS", "[0.5]", ["MODEL.RPN.IOU_THRESHOLDS", "one entry less than IOU_LABELS"]),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]", ["one for each of 5 in MODEL.RPN.IN_FEATURES"]),
        ("INPUT.CROP.SIZE", "[300, 300]", ["INPUT.CROP.SIZE", "fractions up to 1"]),
        ("MODEL", "3", ["MODEL: 3 does not fit"]),
        ("MODEL.ROI_HEADS.IN_FEATURES", "[p5, p4, p3, p2]", ["IN_FEATURES", "the finest first"]),
        ("MODEL.ROI_HEADS.IN_FEATURES", "[p2, p4]", ["IN_FEATURES", "must be neighbouring levels"]),
        ("MODEL.RPN.IN_FEATURES", "[p2, p2, p4, p5, p6]", ["MODEL.RPN.IN_FEATURES", "different levels"]),
        ("MODEL.FPN.IN_FEATURES", "[res5, res4, res3, res2]", ["MODEL.FPN.IN_FEATURES", "in order"]),
        ("MODEL.RESNETS.RES5_DILATION", "2", ["RES5_DILATION", "must be 1 with an FPN"]),
        (
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS",
            "[[1],[1,2],[1],[1],[1]]",
            ["as many values for every level"],
        ),
        ("MODEL.RPN.IOU_LABELS", "[0, 5, 9]", ["MODEL.RPN.IOU_LABELS", "does not fit"]),
        ("MODEL.RESNETS.DEPTH", "18", ["MODEL.RESNETS.DEPTH: 18 needs RES2_OUT_CHANNELS of 64"]),
        ("SOLVER.STEPS", "(5, 3)", ["SOLVER.STEPS", "must increase"]),
    ],
)
def test_bad_overrides(key: str, value: str, parts: list[str]) -> None:
    message = error_of("GN/mask_rcnn_R_50_FPN_3x_gn.yaml", [key, value])
    assert message.startswith("command line: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("SOLVER: {MAX_ITERS: 3}\n", "SOLVER.MAX_ITERS: unknown key; did you mean SOLVER.MAX_ITER?"),
        ("SOLVER:\n  MAX_ITER: [\n", "line 3: not YAML"),
        ("SEED: 1\nSEED: 2\n", "line 2: not YAML: SEED stands twice"),
        ("- 1\n- 2\n", "not a config"),
        ("3: 4\n", "key 3 is not text"),
        ("_BASE_: none.yaml\n", "_BASE_: there is no file"),
        ("_BASE_: c.yaml\n", "_BASE_ leads back to this file"),
        ("SEED: !!python/object/apply:os.system [ls]\n", "not YAML: could not determine a constructor"),
    ],
)
def test_bad_files(text: str, part: str, tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", text)
    message = error_of(path)
    assert message.startswith(str(path))
    assert part in message


def test_errors_name_the_file_that_sets_the_key(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "SOLVER: {MAX_ITER: none}\n")
    assert error_of(write(tmp_path, "top.yaml", "_BASE_: base.yaml\nSEED: 1\n")).startswith(
        f"{base}: SOLVER.MAX_ITER"
    )


def test_other_mistakes(tmp_path: Path) -> None:
    assert "SEED has no value" in error_of(None, ["SEED"])
    assert "did you mean GN/mask_rcnn_R_50_FPN_2x_gn.yaml?" in error_of("GN/mask_rcnn_R50_FPN_2x_gn.yaml")
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(binary)


def test_subtrees_that_nothing_reads_may_hold_anything() -> None:
    names = [
        "MODEL.RETINANET.NORM",
        "XN",
        "MODEL.ROI_KEYPOINT_HEAD.NAME",
        "other",
        "MODEL.SEM_SEG_HEAD.NAME",
        "other",
    ]
    load_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", [*names, "MODEL.ROI_MASK_HEAD.NAME", "other"])
    load_config("GN/mask_rcnn_R_50_C4_gn.yaml", ["MODEL.FPN.NORM", "XN", "MODEL.ROI_BOX_HEAD.NAME", "other"])
    assert "MODEL.ROI_MASK_HEAD.NAME" in error_of(
        "GN/mask_rcnn_R_50_FPN_2x_gn.yaml", ["MODEL.ROI_MASK_HEAD.NAME", "x"]
    )


def test_norms_are_those_of_the_layers() -> None:
    assert NORMS == NORM_NAMES


def test_both_spellings_of_a_key_read() -> None:
    cfg = load_config("quick/demo.yaml", ["SOLVER.MAX_ITER", "7"])
    assert cfg.SOLVER.MAX_ITER == cfg.solver.max_iter == cfg.SOLVER.max_iter == 7
    assert cfg.datasets.registered == cfg.DATASETS.REGISTER
    assert cfg.GLOBAL.HACK == 1.0
    assert cfg.MODEL.RPN is cfg.model.rpn
    assert not hasattr(cfg, "SOLVERS")
    assert not hasattr(cfg.SOLVER, "max")
    assert cfg == pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg)
    with pytest.raises(ValidationError):
        cfg.SOLVER.max_iter = 3
    with pytest.raises(ValueError, match="MAX_ITER"):
        cfg.solver.MAX_ITER = 3


def test_an_existing_file_wins_over_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quick/demo.yaml").model.roi_heads.num_classes == 8
    (tmp_path / "quick").mkdir()
    write(tmp_path / "quick", "demo.yaml", "SEED: 77\n")
    assert load_config("quick/demo.yaml").seed == 77


BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BOMB, "aliases"),
        (MERGES, "aliases"),
        ("a: &a [*a]\n", "leads back to itself"),
        ("a: &a {<<: *a}\n", "leads back to itself"),
        ("a: " + "[" * 5000, "levels"),
        ("a: " + "[" * 100 + "]" * 100, "levels"),
        ("a: " + "{" * 5000, "levels"),
        ("- " * 5000, "levels"),
        ("a: \n" + "".join(" " * depth + "a:\n" for depth in range(1, 100)), "levels"),
        ("SEED: 1" + "0" * 400, "a number is too long"),
        ("SEED: 0x" + "f" * 100_000, "a number is too long"),
        ("SEED: 1" + ":1" * 50_000, "a number is too long"),
        ("SOLVER: {BASE_LR: 1." + "0" * 400 + "}", "a number is too long"),
        ("SEED: " + "9" * 30, "SEED"),
        ("SEED: '0x" + "f" * 100_000 + "'", "SEED"),
        ("SEED: !!int ''\n", "does not fit its type"),
        ("SEED: !!bool maybe\n", "does not fit its type"),
        ("SEED: !!timestamp soon\n", "does not fit its type"),
        ("SEED: 2024-99-99\n", "does not fit its type"),
        ("SEED: !" + "a" * 100_000 + " 1", "could not determine a constructor"),
        ("a" * 1000 + ": 1", "a: unknown key"),
        ("# " + "x" * 200_000, "too many for such a file"),
    ],
)
def test_a_small_file_does_not_become_large_or_slow(text: str, part: str, tmp_path: Path) -> None:
    path = write(tmp_path, "c.yaml", text)
    message = error_of(path)
    assert message.startswith(str(path))
    assert part in message
    assert len(message) < 1000
    assert "\n" not in message


def test_a_text_that_looks_like_a_bomb_stays_a_text() -> None:
    assert parse_literal(BOMB) == BOMB
    assert parse_literal("[" * 100_000) == "[" * 100_000
    assert parse_literal("0x" + "f" * 100_000).startswith("0xfff")


def test_bases_that_share_bases_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{letter}.yaml" for letter in "abcdefghijklm"]
    write(tmp_path, names[0], "SEED: 1\nVIS: {NUM_IMAGES: 7}\n")
    for before, name in itertools.pairwise(names):
        write(tmp_path, name, f"_BASE_: [{before}, {before}]\nSEED: {len(name)}\n")
    reads = []
    original = load.read_yaml
    monkeypatch.setattr(load, "read_yaml", lambda path: reads.append(path) or original(path))
    assert load_config(tmp_path / names[-1]).vis.num_images == 7
    assert len(reads) == len(names)


def test_a_base_of_two_bases_counts_in_its_last_place(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml", "SEED: 1\nVIS: {NUM_IMAGES: 1}\n")
    write(tmp_path, "left.yaml", "_BASE_: root.yaml\nSEED: 2\n")
    write(tmp_path, "right.yaml", "_BASE_: root.yaml\nVIS: {NUM_IMAGES: 3}\n")
    cfg = load_config(write(tmp_path, "top.yaml", "_BASE_: [left.yaml, right.yaml]\n"))
    assert (cfg.seed, cfg.vis.num_images) == (1, 3)  # right's root comes after left


def test_too_many_bases_are_refused(tmp_path: Path) -> None:
    for number in range(30):
        write(tmp_path, f"{number}.yaml", f"_BASE_: {number + 1}.yaml\n" if number < 29 else "SEED: 1\n")
    assert "_BASE_ leads to more than 16 files" in error_of(tmp_path / "0.yaml")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_regular_file_is_no_config(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "no such config file" in error_of(tmp_path / "pipe.yaml")
    assert "_BASE_: there is no file" in error_of(write(tmp_path, "c.yaml", "_BASE_: pipe.yaml\n"))
    with refusal("not-a-file"):
        load.read_yaml(tmp_path / "pipe.yaml")


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/tmp/x",
        "a/b",
        "a\\b",
        "..",
        ".",
        "",
        "a\nb",
        "a\x1b[31m",
        "x" * 300,
        "é" * 100,
        " a",
        "a.",
    ],
)
def test_dataset_names_are_names_of_folders(name: str, tmp_path: Path) -> None:
    """The folders ``inference/NAME`` of a run, which they must not leave."""
    entry = {name: {"ANNOTATIONS": "a.json", "IMAGES": "pictures"}}
    for key, value in (("TEST", [name]), ("TRAIN", [name]), ("REGISTER", entry)):
        path = tmp_path / "names.yaml"
        path.write_text(yaml.safe_dump({"DATASETS": {key: value}}))
        with pytest.raises(
            UserError, match=rf"DATASETS\.{key}.* does not fit: the name .*(leave out|shorten)"
        ) as caught:
            load_config(path)
        assert str(caught.value).isprintable()
    assert load_config(overrides=["DATASETS.TEST", "('cost_$5_$9', 'über val-1.2')"]).datasets.test


def test_keys_that_do_not_go_together() -> None:
    """Each of them alone is fine."""
    base = "Base-RCNN-FPN.yaml"
    deformable = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
    for pairs, names in (
        ([*deformable, "MODEL.RESNETS.CONV", "WS"], ("MODEL.RESNETS.CONV", "DEFORM_ON_PER_STAGE")),
        (["SOLVER.EARLY_STOP.PATIENCE", "2"], ("SOLVER.EARLY_STOP.PATIENCE", "TEST.EVAL_PERIOD")),
        (["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[1, 2]"], ("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "80")),
    ):
        with refusal("conflicting-keys", *names):
            load_config(base, pairs)
    assert load_config(base, deformable).model.resnets.deform_on_per_stage[1:] == (True, True, True)

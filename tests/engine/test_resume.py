"""A run is resumed as it began: what may change, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gn_detect.config import Config, dump_config, load_config
from gn_detect.config.load import known_keys
from gn_detect.data.albumentations_pipeline import fingerprint
from gn_detect.engine import train
from gn_detect.engine.optimizer import scale_config
from gn_detect.engine.resume import COUNTED_IN_ITERATIONS, FREE, changes, check_changes
from gn_detect.engine.run import BEST_IS_OF, prepare
from gn_detect.errors import UserError
from gn_detect.weights import read_checkpoint
from tests.engine.tiny import make_dataset, write_config
from tests.refusal import refusal


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two iterations; tests must not change it."""
    folder = tmp_path_factory.mktemp("begun")
    data = make_dataset(folder / "train", 4, seed=1), make_dataset(folder / "val", 2, seed=2)
    cfg = load_config(write_config(folder, *data), ["SOLVER.MAX_ITER", "2"])
    train(cfg)
    return cfg


@pytest.fixture
def copied(begun: Config, tmp_path: Path) -> Config:
    """The same, which the test may change."""
    shutil.copytree(begun.output_dir, tmp_path / "copy")
    return begun.replace({"OUTPUT_DIR": str(tmp_path / "copy")})


def edit(cfg: Config, name: str = "model_final.pth", **changes: Any) -> None:
    """Change entries of a checkpoint; None removes one."""
    path = Path(cfg.output_dir) / name
    content = {**torch.load(path, weights_only=True), **changes}
    torch.save({key: value for key, value in content.items() if value is not None}, path)


CHANGED = {
    "INPUT.MIN_SIZE_TRAIN": [48],
    "INPUT.RANDOM_FLIP": "none",
    "INPUT.COPY_PASTE": 0.5,
    "INPUT.MIN_SIZE_TEST": 48,
    "MODEL.PIXEL_MEAN": [100.0, 100.0, 100.0],
    "MODEL.RPN.NMS_THRESH": 0.6,
    "SEED": 2,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.STEPS": [1],
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.OPTIMIZER": "AdamW",
    "SOLVER.ACCUMULATE": 2,
    "SOLVER.EMA.ENABLED": True,
    "SOLVER.BEST_CHECKPOINT_METRIC": "bbox/AP",
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "DATASETS.TEST": [],
}


def test_what_changes_the_weights_or_the_order_of_the_data_is_refused_in_one_line(begun: Config) -> None:
    with pytest.raises(UserError) as caught:
        prepare(begun.replace(CHANGED), resume=True)
    message = str(caught.value)
    assert [key for key in CHANGED if f"{key} was " not in message] == []
    assert "SEED was 1 and is 2" in message
    assert "SOLVER.BASE_LR was 0.02 and is 0.01" in message
    assert "INPUT.MIN_SIZE_TRAIN was [64] and is [48]" in message
    assert "--allow-changes" in message
    assert "\n" not in message


def test_length_periods_device_workers_and_paths_may_change(
    begun: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (name,) = begun.datasets.train
    shutil.copytree(Path(begun.datasets.registered[name].annotations).parent, tmp_path / "moved")
    entries = {key: entry.model_dump(by_alias=True) for key, entry in begun.datasets.registered.items()}
    moved = tmp_path / "moved"
    entries[name] = {"ANNOTATIONS": str(moved / "annotations.json"), "IMAGES": str(moved / "images")}
    free = {
        "SOLVER.MAX_ITER": 8,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "SOLVER.LOG_PERIOD": 1,
        "TEST.EVAL_PERIOD": 4,
        "CHECKPOINT.KEEP": 1,
        "VIS.NUM_IMAGES": 3,
        "DATALOADER.NUM_WORKERS": 2,
        "MODEL.DEVICE": "auto",
        "DATASETS.ALLOW_OUTSIDE": True,
        "MODEL.BACKBONE.ACTIVATION_CHECKPOINTING": True,
    }
    with caplog.at_level(logging.INFO, logger="gn_detect"):
        assert prepare(begun.replace({**free, "DATASETS.REGISTER": entries}), resume=True).start == 2
    (line,) = [line for line in caplog.messages if line.startswith("resuming with other settings")]
    assert "SOLVER.MAX_ITER was 2 and is 8" in line
    assert all(f"{key} was" in line for key in free)
    assert str(moved) in line
    assert set(FREE) | set(COUNTED_IN_ITERATIONS) | set(BEST_IS_OF) <= set(known_keys())


def test_the_spelling_of_a_value_does_not_matter(begun: Config, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(begun.output_dir).parent / "tiny.yaml"
    keys = ["SOLVER.MAX_ITER", "2", "SOLVER.BASE_LR", "2e-2", "INPUT.MIN_SIZE_TRAIN", "(64,)", "SEED", "-1"]
    with caplog.at_level(logging.INFO, logger="gn_detect"):
        run = prepare(load_config(path, keys), resume=True)
    assert run.start == 2
    assert run.cfg.seed == 1
    assert "other settings" not in caplog.text
    assert prepare(load_config(Path(begun.output_dir) / "config.yaml"), resume=True).start == 2


def test_allowed_changes_are_said(begun: Config, caplog: pytest.LogCaptureFixture) -> None:
    run = prepare(begun.replace({"SOLVER.BASE_LR": 0.01, "SEED": 5}), resume=True, allow_changes=True)
    assert run.start == 2
    assert run.cfg.seed == 5
    assert "resuming a changed run: SOLVER.BASE_LR was 0.02 and is 0.01; SEED was 1 and is 5" in caplog.text


def test_what_was_best_on_other_data_does_not_count(copied: Config) -> None:
    edit(copied, "model_best.pth", **{"segm/AP": 90.0})
    assert prepare(copied, resume=True).best == 90.0
    other = copied.replace({"DATASETS.TEST": list(copied.datasets.train)})
    assert prepare(other, resume=True, allow_changes=True).best == -1.0
    other = copied.replace({"SOLVER.BEST_CHECKPOINT_METRIC": "bbox/AP"})
    assert prepare(other, resume=True, allow_changes=True).best == -1.0


def test_a_damaged_best_checkpoint_is_passed_over(copied: Config, caplog: pytest.LogCaptureFixture) -> None:
    (Path(copied.output_dir) / "model_best.pth").write_bytes(b"half")
    assert prepare(copied, resume=True).best == -1.0
    assert "model_best.pth is passed over, and the next evaluation replaces it" in caplog.text


@pytest.mark.parametrize("part", ["train", "test"])
def test_other_content_of_a_dataset_is_refused(begun: Config, tmp_path: Path, part: str) -> None:
    (name,) = getattr(begun.datasets, part)
    entries = {key: entry.model_dump(by_alias=True) for key, entry in begun.datasets.registered.items()}
    content = json.loads(Path(entries[name]["ANNOTATIONS"]).read_text())
    content["annotations"].pop()
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(content))
    entries[name]["ANNOTATIONS"] = str(changed)
    with pytest.raises(UserError, match=rf"content of DATASETS.{part.upper()}.* was .*objects.* and is"):
        prepare(begun.replace({"DATASETS.REGISTER": entries}), resume=True)


def test_another_pipeline_file_is_refused(begun: Config, tmp_path: Path) -> None:
    """Its content counts, wherever it is; and a run that began without one stays without."""
    file, moved = tmp_path / "a.json", tmp_path / "b.json"
    for path in (file, moved):
        path.write_text("{}")
    with_file = begun.replace({"INPUT.ALBUMENTATIONS": str(file), "OUTPUT_DIR": str(tmp_path)})
    (tmp_path / "config.yaml").write_text(dump_config(with_file))
    began_without = read_checkpoint(Path(begun.output_dir) / "model_final.pth")
    data = {"INPUT.ALBUMENTATIONS": fingerprint(str(file))}
    checkpoint = replace(began_without, metadata=replace(began_without.metadata, data=data))

    def changed(cfg: Config) -> list[str]:
        path = cfg.input.albumentations
        return [
            str(c)
            for c in changes(cfg, checkpoint, {"INPUT.ALBUMENTATIONS": fingerprint(path)} if path else {})
        ]

    elsewhere = with_file.replace({"INPUT.ALBUMENTATIONS": str(moved)})
    assert changed(with_file) == changed(elsewhere) == []
    moved.write_text("{ }")
    (change,) = changed(elsewhere)
    assert change.startswith("the content of INPUT.ALBUMENTATIONS was ")
    (change,) = changed(with_file.replace({"INPUT.ALBUMENTATIONS": ""}))
    assert change == f"INPUT.ALBUMENTATIONS was {file} and is "
    with refusal("other-run", f"INPUT.ALBUMENTATIONS was  and is {file}"):
        check_changes(begun.replace({"INPUT.ALBUMENTATIONS": str(file)}), began_without, {}, allow=False)


def test_a_checkpoint_without_the_optimisers_state_is_refused(copied: Config) -> None:
    edit(copied, optimizer=None)
    with pytest.raises(
        UserError, match="state 'optimizer' of the checkpoint was saved with it and is missing"
    ):
        prepare(copied, resume=True)
    assert prepare(copied, resume=True, allow_changes=True).start == 2


def test_keys_that_an_older_checkpoint_lacks_count_as_their_default(copied: Config) -> None:
    content = yaml.safe_load(torch.load(Path(copied.output_dir) / "model_final.pth")["config"])
    del content["CHECKPOINT"], content["SOLVER"]["EMA"], content["DATASETS"]["ROOT"]
    edit(copied, config=yaml.safe_dump(content), data=None)
    assert prepare(copied, resume=True).start == 2
    with pytest.raises(UserError, match="SOLVER.EMA.ENABLED was False and is True"):
        prepare(copied.replace({"SOLVER.EMA.ENABLED": True}), resume=True)


def test_a_checkpoint_without_a_config_is_compared_with_the_runs(
    copied: Config, caplog: pytest.LogCaptureFixture
) -> None:
    edit(copied, config=None)
    assert prepare(copied, resume=True).start == 2
    with pytest.raises(UserError, match="SOLVER.BASE_LR was 0.02 and is 0.01"):
        prepare(copied.replace({"SOLVER.BASE_LR": 0.01}), resume=True)
    edit(copied, config="MODEL: [")
    assert prepare(copied, resume=True).start == 2
    assert "is not compared, as it cannot be read" in caplog.text


def test_a_config_for_other_processes_is_compared_unscaled(copied: Config) -> None:
    """It was saved by three processes, and this is one."""
    cfg = copied.replace({"SOLVER.REFERENCE_WORLD_SIZE": 2, "SOLVER.STEPS": [7, 9], "SOLVER.MAX_ITER": 10})
    saved = scale_config(cfg, 3)
    assert saved.solver.ims_per_batch == 3
    assert saved.solver.steps == (5, 6)
    edit(copied, config=dump_config(saved))
    assert prepare(cfg, resume=True).start == 2 * 3
    assert prepare(saved, resume=True).start == 2 * 3
    with pytest.raises(UserError, match="SOLVER.BASE_LR was 0.03 and is 0.015"):
        prepare(cfg.replace({"SOLVER.BASE_LR": 0.01}), resume=True)
    with pytest.raises(UserError, match="SOLVER.IMS_PER_BATCH was 3 and is 6"):
        prepare(cfg.replace({"SOLVER.IMS_PER_BATCH": 4}), resume=True)


def test_no_run_to_resume(begun: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job that was killed early left its config, and begins again when it is queued again."""
    cfg = begun.replace({"OUTPUT_DIR": str(tmp_path / "nothing")})
    with pytest.raises(UserError, match="there is no run to resume in .*nothing: .*leave out --resume"):
        train(cfg, resume=True)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "nothing").mkdir()
    shutil.copy(Path(begun.output_dir) / "config.yaml", tmp_path / "nothing")
    assert prepare(cfg, resume=True).start == 0
    assert "has no checkpoint yet: training starts again at iteration 0" in caplog.text


def test_workers_that_torchrun_restarts_need_no_run(
    begun: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert prepare(begun.replace({"OUTPUT_DIR": str(tmp_path / "nothing")}), resume=True).start == 0

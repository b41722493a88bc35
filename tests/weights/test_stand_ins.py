"""Harmless objects in checkpoints: they are read as plain values, nothing is imported, nothing is run."""

from __future__ import annotations

import argparse
import collections
import pickle
import sys
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_detect.errors import UserError
from gn_detect.weights import read_checkpoint, save_weights
from tests.refusal import refusal

from .hostile import NAMESPACE, beside_weights, text

WEIGHTS = {"w": torch.arange(3.0)}


def library(monkeypatch: pytest.MonkeyPatch, path: str, **attributes: Any) -> type:
    """A class under the name that it has in a library, which is not installed."""
    module, _, name = path.rpartition(".")
    kind = type(name, (), {"__module__": module, **attributes})
    for part in range(1, module.count(".") + 2):
        place = ".".join(module.split(".")[:part])
        if place not in sys.modules:
            monkeypatch.setitem(sys.modules, place, types.ModuleType(place))
    setattr(sys.modules[module], name, kind)
    return kind


def made(kind: type, **attributes: Any) -> Any:
    value = object.__new__(kind)
    value.__dict__.update(attributes)
    return value


def read(content: Any, folder: Path, zipped: bool = True) -> Any:
    """The metadata, of a file whose weights must be right."""
    torch.save(content, folder / "m.pth", _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.split(".")[0] in ("mmengine", "omegaconf")]:
        del sys.modules[name]
    checkpoint = read_checkpoint(folder / "m.pth")
    assert list(checkpoint.tensors) == ["w"]
    assert torch.equal(checkpoint.tensors["w"], WEIGHTS["w"])
    assert not any(name.split(".")[0] in ("mmengine", "omegaconf") for name in sys.modules)
    return checkpoint.metadata.to_dict()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_message_hub_of_mmengine(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = library(monkeypatch, "mmengine.logging.history_buffer.HistoryBuffer")
    buffer = made(kind, max_length=10, _log_history=np.arange(3.0), _count_history=np.array([1, 1, 2]))
    hub = {
        "log_scalars": collections.OrderedDict({"train/loss": buffer}),
        "runtime_info": collections.OrderedDict(epoch=3, best=np.float64(0.5)),
        "resumed_keys": collections.OrderedDict({"train/loss": True}),
    }
    found = read({"meta": {"epoch": 3}, "state_dict": WEIGHTS, "message_hub": hub}, tmp_path, zipped)
    log = found["message_hub"]["log_scalars"]["train/loss"]
    assert log["max_length"] == 10
    assert log["_log_history"].tolist() == [0, 1, 2]
    assert found["message_hub"]["runtime_info"] == {"epoch": 3, "best": 0.5}
    assert found["meta"] == {"epoch": 3}


def config(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``{"model": {"name": "unet", "sizes": [32, 0.5]}}`` as omegaconf 2.3 builds it, parents included."""
    names = ("dictconfig.DictConfig", "listconfig.ListConfig", "nodes.AnyNode", "base.ContainerMetadata")
    dictionary, listing, node, container = (library(monkeypatch, f"omegaconf.{name}") for name in names)
    plain = library(monkeypatch, "omegaconf.base.Metadata")

    def metadata(kind: type, key: Any, of: Any) -> Any:
        known = {"ref_type": typing.Any, "object_type": of, "optional": True, "key": key, "flags": {}}
        types_known = {"key_type": str, "element_type": int} if kind is container else {}
        return made(
            kind, **known, **types_known, flags_root=False, resolver_cache=collections.defaultdict(dict)
        )

    root = made(dictionary, _metadata=metadata(container, None, dict), _parent=None)
    model = made(dictionary, _metadata=metadata(container, "model", dict), _parent=root)
    sizes = made(listing, _metadata=metadata(container, "sizes", list), _parent=model)
    name = made(node, _metadata=metadata(plain, "name", None), _parent=model, _val="unet")
    values = [
        made(node, _metadata=metadata(plain, i, None), _parent=sizes, _val=value)
        for i, value in enumerate([32, 0.5])
    ]
    sizes.__dict__["_content"] = values
    model.__dict__["_content"] = {"name": name, "sizes": sizes}
    root.__dict__["_content"] = {"model": model}
    return root


@pytest.mark.parametrize("zipped", [True, False])
def test_a_config_of_omegaconf(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"state_dict": WEIGHTS, "hyper_parameters": {"cfg": config(monkeypatch), "lr": 0.1}, "epoch": 2}
    found = read(content, tmp_path, zipped)
    expected = {"model": {"name": "unet", "sizes": [32, 0.5]}}
    assert found == {"hyper_parameters": {"cfg": expected, "lr": 0.1}, "epoch": 2}


NUMBERS = {
    "float": np.float64(0.5),
    "half": np.float16(2),
    "int": np.int64(-3),
    "unsigned": np.uint8(200),
    "bool": np.bool_(True),
    "text": np.str_("añ"),
    "bytes": np.bytes_(b"ab"),
    "kind": np.dtype("float32"),
    "class": np.int32,
    "nested": [(np.float32(1), {"deep": np.float64(2)})],
}
PLAIN = {
    "float": 0.5,
    "half": 2.0,
    "int": -3,
    "unsigned": 200,
    "bool": True,
    "text": "añ",
    "bytes": b"ab",
    "kind": "float32",
    "class": "numpy.int32",
    "nested": [(1.0, {"deep": 2.0})],
}


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_and_options(zipped: bool, tmp_path: Path) -> None:
    options = argparse.Namespace(lr=0.1, sizes=[1, 2], more=argparse.Namespace(**NUMBERS))
    found = read({"model": WEIGHTS, "args": options, **NUMBERS}, tmp_path, zipped)
    assert found == {"args": {"lr": 0.1, "sizes": [1, 2], "more": PLAIN}, **PLAIN}
    assert type(found["float"]) is float
    assert type(found["int"]) is int
    flat = read({**WEIGHTS, "epoch": np.int64(4), "args": options}, tmp_path, zipped)
    assert flat["epoch"] == 4
    assert flat["args"]["lr"] == 0.1


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_both_names_of_numpys_core(core: bytes, tmp_path: Path) -> None:
    kind = b"cnumpy\ndtype\n" + text("f8") + b"\x89\x88\x87R"
    kind += b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = b"c_codecs\nencode\n" + text("\x00" * 6 + "à?") + text("latin1") + b"\x86R"
    number = b"c" + core + b".multiarray\nscalar\n" + kind + data + b"\x86R"
    (tmp_path / "m.pth").write_bytes(beside_weights(number))
    assert read_checkpoint(tmp_path / "m.pth").metadata.others == {"x": 0.5}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_arrays_with_options(protocol: int, tmp_path: Path) -> None:
    options = argparse.Namespace(lr=0.1, best=np.float64(0.5), kind=np.float32, types=(int, str))
    content = {"model": {"w": np.ones(2)}, "args": options, "log": collections.defaultdict(list, a=[1])}
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_checkpoint(tmp_path / "m.pkl")
    assert found.tensors["w"].tolist() == [1, 1]
    types = found.metadata.others["args"].pop("types")
    assert types == ("builtins.int", "builtins.str") or types == ("builtins.long", "builtins.unicode")
    args = {"lr": 0.1, "best": 0.5, "kind": "numpy.float32"}
    assert found.metadata.others == {"args": args, "log": {"a": [1]}}


def test_what_was_read_can_be_saved(tmp_path: Path) -> None:
    found = read({"model": WEIGHTS, "args": argparse.Namespace(lr=np.float64(0.1))}, tmp_path)
    save_weights(tmp_path / "again.pth", WEIGHTS, found)
    assert read_checkpoint(tmp_path / "again.pth").metadata.others == {"args": {"lr": 0.1}}


def test_a_constructors_arguments_do_nothing(tmp_path: Path) -> None:
    """A namespace that is called with a command is an empty one, and one that holds itself ends there."""
    called = NAMESPACE + text("touch was_run") + b"\x85R"
    cycle = NAMESPACE + b")\x81q\x10}" + text("a") + b"h\x10sb"
    for opcodes, expected in ((called, {}), (cycle, {"a": "argparse.Namespace"})):
        (tmp_path / "m.pth").write_bytes(beside_weights(opcodes))
        assert read_checkpoint(tmp_path / "m.pth").metadata.others == {"x": expected}


def test_dicts_beside_the_weights_stay_what_they_are(tmp_path: Path) -> None:
    state = torch.nn.BatchNorm2d(2).state_dict()
    found = read({"model": WEIGHTS, "trained": state, "best": np.float64(1)}, tmp_path)
    assert type(found["trained"]) is collections.OrderedDict
    assert found["trained"]._metadata


def test_what_else_pytorch_was_told_to_trust_is_refused_here_and_trusted_afterwards(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "x": argparse.ArgumentParser}, tmp_path / "m.pth")
    before = set(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals([argparse.ArgumentParser])
    try:
        with refusal("unsafe-file", "'argparse.ArgumentParser'"):
            read_checkpoint(tmp_path / "m.pth")
        assert set(torch.serialization.get_safe_globals()) == before | {argparse.ArgumentParser}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(before))


def test_an_array_that_is_no_array_is_named(tmp_path: Path) -> None:
    torch.save({"model": WEIGHTS, "x": np.array([{}], dtype=object)}, tmp_path / "m.pth")
    with pytest.raises(UserError, match="an array of type 'O8': only numbers are read"):
        read_checkpoint(tmp_path / "m.pth")


def test_reading_options_does_not_import_their_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": WEIGHTS, "args": argparse.Namespace(a=1)}, tmp_path / "m.pth")
    monkeypatch.setitem(sys.modules, "argparse", None)  # so that importing it is an error
    assert read_checkpoint(tmp_path / "m.pth").metadata.others == {"args": {"a": 1}}

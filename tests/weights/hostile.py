"""Files that someone made to do harm, or that an accident spoiled.

Each is a function of the file that its code would create. ``python hostile.py LIST`` reads all files of a
list and prints what became of each, so that a crash of the interpreter is seen from outside.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Content = Callable[[str], bytes]


class Calls:
    """Unpickling this calls ``function(*arguments)``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def hostile(victim: str, *, how: str = "system") -> Calls:
    """Creates ``victim`` when it is unpickled."""
    import os
    import subprocess

    code = f"open({victim!r}, 'w').close()"
    functions = {
        "system": lambda: Calls(os.system, f"touch {victim}"),
        "eval": lambda: Calls(eval, code),
        "exec": lambda: Calls(exec, code),
        "popen": lambda: Calls(subprocess.Popen, ["touch", victim]),
        "import": lambda: Calls(__import__, "antigravity"),
        "open": lambda: Calls(open, victim, "w"),
        "numpy": lambda: Calls(np.save, victim, np.ones(1)),
        "load_from_bytes": lambda: Calls(
            torch.storage._load_from_bytes, pickle.dumps(Calls(os.system, f"touch {victim}"))
        ),
    }
    return functions[how]()


def pickled(content: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol=protocol)


def written(text: str) -> bytes:
    """A pickle in plain text: opcodes of protocol 0, lines behind ``\\n``."""
    return text.encode("latin1")


def deep(opcode: bytes, count: int = 1_000_000) -> bytes:
    """``{((((...)))): 1}``, or lists in lists."""
    if opcode == b"\x85":
        return b"\x80\x02}(" + b")" + opcode * count + b"K\x01u."
    return b"\x80\x02" + b"](" * count + b"e" * count + b"."


def laughs(levels: int = 40) -> bytes:
    """A tuple of ten times the same tuple of ten times the same ..., as a key."""
    steps = b"".join(b"q%c(%stq%c" % (i, b"h%c" % i * 10, i + 1) for i in range(1, levels))
    return b"\x80\x02}(K\x01\x85" + steps.replace(b"q\x01", b"q\x00q\x01", 1) + b"K\x01u."


def torch_zip(
    change: Callable[[str, bytes], bytes | None], *, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A ``.pth`` whose parts went through ``change``; None leaves one out."""
    buffer, result = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.zeros(4)}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(result, "w", compression) as target:
        for name in source.namelist():
            part = change(name, source.read(name))
            if part is not None:
                target.writestr(name, part)
    return result.getvalue()


def with_pickle(data: bytes) -> bytes:
    return torch_zip(lambda name, part: data if name.endswith("data.pkl") else part)


def saved(content: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def bigger_storage(name: str, part: bytes) -> bytes:
    """Four numbers are stored, and a hundred million promised."""
    if not name.endswith("data.pkl"):
        return part
    count = b"J" + struct.pack("<i", 100_000_000)
    forged = part.replace(b"K\x04tq", count + b"tq").replace(b"K\x04\x85", count + b"\x85")
    assert len(forged) == len(part) + 6
    return forged


def with_program() -> bytes:
    """A ``.pth`` that would be compiled and run by ``torch.jit.load``."""
    buffer = io.BytesIO(torch_zip(lambda name, part: part))
    with zipfile.ZipFile(buffer, "a") as archive:
        folder = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{folder}/constants.pkl", pickled(()))
        archive.writestr(f"{folder}/code/__torch__.py", "class Module(Module): pass")
    return buffer.getvalue()


def legacy_with_pickle(data: bytes) -> bytes:
    honest = saved({"w": torch.zeros(4)}, zipped=False)
    file = io.BytesIO(honest)
    for _ in range(3):
        pickle.load(file)
    return honest[: file.tell()] + data


def npz(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)
    return buffer.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin1") + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + data


def array(content: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, content, allow_pickle=True)
    return buffer.getvalue()


def described(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def numpy_array(shape: bytes, data: bytes = b"abcd", dtype: bytes = b"f4") -> bytes:
    """A pickle of ``{"w": array}`` written by hand; ``shape`` as opcodes."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    kind = b"cnumpy\ndtype\nU%c%sK\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01" + shape + kind % (len(dtype), dtype) + b"\x89U%c%stb" % (len(data), data)
    return b"\x80\x02}U\x01w" + made + state + b"s."


def flipped(data: bytes, place: float) -> bytes:
    """All bits of a run of bytes turned over."""
    start = int(len(data) * place)
    return data[:start] + bytes(byte ^ 255 for byte in data[start : start + 40]) + data[start + 40 :]


def beside_weights(opcodes: bytes) -> bytes:
    """A ``.pth`` of one good tensor, and beside it what the opcodes leave on the stack."""

    def with_value(name: str, part: bytes) -> bytes:
        assert not name.endswith("data.pkl") or part.endswith(b"s.")
        return part[:-1] + b"X\x01\x00\x00\x00x" + opcodes + b"s." if name.endswith("data.pkl") else part

    return torch_zip(with_value)


def text(value: str) -> bytes:
    """The opcode of a string."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def nested_lists(count: int = 5_000) -> bytes:
    """Lists in lists, each put into the one before while it is still empty, so that none seems deep."""
    made = b"".join(b"]r" + struct.pack("<I", 16 + i) for i in range(count))
    get = [b"j" + struct.pack("<I", 16 + i) for i in range(count)]
    return b"(" + made + b"t(" + b"".join(get[i] + get[i + 1] + b"a" for i in range(count - 1)) + b"t\x86"


NAMESPACE = b"cargparse\nNamespace\n"
BESIDE_WEIGHTS: dict[str, bytes] = {
    "a method of a namespace": b"cargparse\nNamespace.__init__\n",
    "the globals of a method of the message hub": (
        b"cmmengine.logging.message_hub\nMessageHub.__init__.__globals__\n"
    ),
    "getattr of a namespace": b"cbuiltins\ngetattr\n" + NAMESPACE + text("__init__") + b"\x86R",
    "getattr alone": b"c__builtin__\ngetattr\n",
    "attributes of the class of a namespace": NAMESPACE + b"}" + text("__init__") + NAMESPACE + b"sb",
    "slots of the class of a namespace": NAMESPACE + b"N}" + text("content") + NAMESPACE + b"s\x86b",
    "an item of a namespace": NAMESPACE + b")R" + text("a") + b"K\x01s",
    "an entry of a log": b"cmmengine.logging.history_buffer\nHistoryBuffer\n)\x81K\x01a",
    "a call of a namespace": NAMESPACE + b")R)R",
    "a function among options": NAMESPACE + b")\x81}" + text("f") + b"cposix\nsystem\nsb",
    "a call among options": NAMESPACE + b")\x81}" + text("f") + b"cposix\nsystem\n" + text("id") + b"\x85Rsb",
    "options in options in options": ((NAMESPACE + b")\x81}" + text("a")) * 100 + b"K\x01" + b"sb" * 100),
    "lists in lists beside weights": nested_lists(),
    "another class of argparse": b"cargparse\nArgumentParser\n)R",
    "what argparse imports": b"cargparse\n_sys\n",
    "another class of omegaconf": b"comegaconf.omegaconf\nOmegaConf\n",
    "another class of mmengine": b"cmmengine.config.config\nConfig\n",
    "another function of NumPy": b"cnumpy\nfromfile\n" + text("/etc/passwd") + b"\x85R",
    "another function of NumPy's core": b"cnumpy.core.multiarray\nfromfile\n"
    + text("/etc/passwd")
    + b"\x85R",
    "eval beside weights": b"cbuiltins\neval\n" + text("1") + b"\x85R",
    "a number of objects": b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n" + text("O8") + b"\x85RN\x86R",
    "a number without a type": b"cnumpy.core.multiarray\nscalar\n" + text("f8") + text("") + b"\x86R",
    "a number without its bytes": (
        b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"\x85R" + text("") + b"\x86R"
    ),
    "text of gigabytes": (
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\n"
        + text("U500000000")
        + b"\x85R"
        + text("a")
        + b"\x86R"
    ),
    "a type that is no text": b"cnumpy\ndtype\n" + NAMESPACE + b"\x85R",
    "a function as the state of a type": b"cnumpy\ndtype\n" + text("f8") + b"\x85R" + NAMESPACE + b"b",
    "a namespace as a tensor's storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + NAMESPACE + b")RK\x00K\x01\x85K\x01\x85\x89NtR"
    ),
    "a namespace as a tensor's class": (
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor\n" + NAMESPACE + b")}tR"
    ),
}
"""Abuses of what may stand beside weights, and its neighbours."""


GOOD = {"w": np.arange(12, dtype=np.float32)}
HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 60)

PICKLES: dict[str, Content] = {
    **{
        f"os.system, protocol {protocol}": lambda victim, p=protocol: pickled({"w": hostile(victim)}, p)  # type: ignore[misc]
        for protocol in range(6)
    },
    **{
        f"call of {how}": lambda victim, h=how: pickled({"w": hostile(victim, how=h)})  # type: ignore[misc]
        for how in ("eval", "exec", "popen", "import", "open", "numpy", "load_from_bytes")
    },
    "call of what getattr finds": lambda victim: written(
        f"cbuiltins\ngetattr\n(cposix\nenviron\nS'system'\ntR(S'touch {victim}'\ntR."
    ),
    "call hidden in a key": lambda victim: written(f"(dcposix\nsystem\n(S'touch {victim}'\ntRI1\ns."),
    "call beside good arrays": lambda victim: pickled({**GOOD, "epoch": [{"a": (hostile(victim),)}]}),
    "a class with INST": lambda victim: written(f"(S'touch {victim}'\niposix\nsystem\n."),
    "a class with OBJ": lambda victim: written(f"(cposix\nsystem\nS'touch {victim}'\no."),
    "a class with NEWOBJ": lambda victim: b"\x80\x02csubprocess\nPopen\nU\x05touch\x85\x81.",
    "a global from the memo": lambda victim: written(f"cposix\nsystem\np0\n0g0\n(S'touch {victim}'\ntR."),
    "a dotted global": lambda victim: b"\x80\x04\x8c\x05numpy\x94\x8c\x12ndarray.__class__.x\x94\x93.",
    "a dotted global, with the right length": lambda victim: (
        b"\x80\x04\x8c\x08builtins\x94\x8c\x11set.__subclasses__\x94\x93)R."
    ),
    "a function as the array's type": lambda victim: written(
        f"cnumpy.core.multiarray\n_reconstruct\n(cposix\nsystem\n(I0\ntS'touch {victim}'\ntR."
    ),
    "a persistent id as text": lambda victim: written("Pos.system\n."),
    "a persistent id": lambda victim: b"\x80\x02U\x03abcQ.",
    "a code of the registry": lambda victim: b"\x80\x02\x82\x01)R.",
    "a buffer outside": lambda victim: b"\x80\x05\x97.",
    "a function that calls itself": lambda victim: (
        b"\x80\x02cnumpy\ndtype\nq\x00(h\x00)}NtbU\x02f4\x85R."
    ),
    "attributes of a function": lambda victim: b"\x80\x02cnumpy\ndtype\n(N}U\x0c__defaults__K\x01stb.",
    "methods of a dict": lambda victim: b"\x80\x02ccollections\nOrderedDict\n)R}U\x05itemsU\x01xsb.",
    "a memo index of billions": lambda victim: b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "a memo index of billions as text": lambda victim: written("I1\np99999999999\n."),
    "tuples a million deep": lambda victim: deep(b"\x85"),
    "lists a million deep": lambda victim: deep(b"]"),
    "tuples of the same tuples": lambda victim: laughs(),
    "an array of objects": lambda victim: pickled({"w": np.array([hostile(victim)], dtype=object)}),
    "an array of records": lambda victim: pickled({"w": np.zeros(2, dtype=[("a", "f4"), ("b", "O")])}),
    "an array of text": lambda victim: pickled({"w": np.array(["a"])}),
    "an array of a huge shape": lambda victim: numpy_array(HUGE + b"\x85"),
    "an array of an overflowing shape": lambda victim: numpy_array(HUGE + HUGE + b"\x86"),
    "an empty array of a huge shape": lambda victim: numpy_array(b"K\x00" + HUGE + b"\x86", b""),
    "an array of a negative shape": lambda victim: numpy_array(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"),
    "an array without data": lambda victim: b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\n)Rs.",
    "bytes of a huge length": lambda victim: b"\x80\x02}U\x01wcbuiltins\nbytearray\n" + HUGE + b"\x85Rs.",
    "a string longer than the file": lambda victim: b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    "a number of a negative length": lambda victim: b"\x80\x02\x8b\xff\xff\xff\xff.",
    "a frame longer than the file": lambda victim: b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"K\x01.",
    "an empty stack": lambda victim: b"\x80\x02R.",
    "a mark alone": lambda victim: b"\x80\x02(.",
    "no end": lambda victim: pickled(GOOD)[:-1],
    "an unknown protocol": lambda victim: b"\x80\x63K\x01.",
    "an unknown opcode": lambda victim: b"\x80\x02\xff.",
    "spoiled bytes in a pickle": lambda victim: flipped(pickled(GOOD), 0.2),
    "not hashable": lambda victim: b"\x80\x02}(]K\x01u.",
}  # fmt: skip

ZIPS: dict[str, Content] = {
    "os.system in .pth": lambda victim: saved({"w": torch.ones(1), "x": hostile(victim)}),
    "os.system in a legacy .pth": lambda victim: saved({"w": torch.ones(1), "x": hostile(victim)}, False),
    "eval in .pth": lambda victim: saved({"x": hostile(victim, how="eval")}),
    "load_from_bytes in .pth": lambda victim: saved({"x": hostile(victim, how="load_from_bytes")}),
    "a whole module in .pth": lambda victim: saved(torch.nn.Linear(2, 2)),
    "tuples a million deep in .pth": lambda victim: with_pickle(deep(b"\x85")),
    "tuples of the same tuples in .pth": lambda victim: with_pickle(laughs()),
    "tuples a million deep in a legacy .pth": lambda victim: legacy_with_pickle(deep(b"\x85")),
    "a storage larger than its part": lambda victim: torch_zip(bigger_storage),
    "a tensor of terabytes on one number": lambda victim: saved({"w": torch.ones(1).expand(1 << 40)}),
    "a tensor of terabytes in a legacy .pth": lambda victim: saved(
        {"w": torch.ones(1).expand(1 << 40)}, zipped=False
    ),
    "a tensor without data": lambda victim: saved({"w": torch.empty(3, device="meta")}),
    "a sparse tensor": lambda victim: saved({"w": torch.eye(3).to_sparse()}),
    "a .pth without its data": lambda victim: torch_zip(
        lambda name, part: None if "/data/" in name else part
    ),
    "a .pth without its pickle": lambda victim: torch_zip(lambda name, part: None if "pkl" in name else part),
    "a .pth that unpacks to more": lambda victim: torch_zip(
        lambda name, part: bytes(50_000_000) if "/data/" in name else part, compression=zipfile.ZIP_DEFLATED
    ),
    "a TorchScript program": lambda victim: with_program(),
    "half a .pth": lambda victim: (data := saved(GOOD | {"w": torch.zeros(999)}))[: len(data) // 2],
    "half a legacy .pth": lambda victim: (data := saved({"w": torch.zeros(999)}, False))[: len(data) // 2],
    "spoiled bytes in .pth": lambda victim: flipped(saved({"w": torch.zeros(4)}), 0.15),
    "an empty zip": lambda victim: torch_zip(lambda name, part: None),
    "objects in .npz": lambda victim: npz({"w": array(np.array([hostile(victim)], dtype=object))}),
    "text in .npz": lambda victim: npz({"w": array(np.array(["a"]))}),
    "records in .npz": lambda victim: npz({"w": array(np.zeros(2, dtype=[("a", "f4")]))}),
    "a call in the header of .npz": lambda victim: npz(
        {"w": npy(f"__import__('os').system('touch {victim}')", bytes(4))}
    ),
    "brackets in the header of .npz": lambda victim: npz({"w": npy("(" * 9000, bytes(4))}),
    "a huge header in .npz": lambda victim: npz({"w": npy(described("(1,)") + " " * 60_000, bytes(4))}),
    "a huge shape in .npz": lambda victim: npz({"w": npy(described(f"({1 << 60},)"), bytes(4))}),
    "an empty huge shape in .npz": lambda victim: npz({"w": npy(described(f"(0, {1 << 80})"))}),
    "a negative shape in .npz": lambda victim: npz({"w": npy(described("(-1, -1)"), bytes(4))}),
    "an unknown version in .npz": lambda victim: npz({"w": npy(described("(1,)"), bytes(4), b"\x09\x00")}),
    "no array in .npz": lambda victim: npz({"w": b"hello"}),
    "a bomb of one array": lambda victim: npz(
        {"w": npy(described("(25000000,)"), bytes(100_000_000))}, zipfile.ZIP_DEFLATED
    ),
    "a bomb of many arrays": lambda victim: npz(
        {f"w{i}": npy(described("(100000,)"), bytes(400_000)) for i in range(200)}, zipfile.ZIP_DEFLATED
    ),
    "spoiled bytes in .npz": lambda victim: flipped(
        npz({"w": array(np.random.default_rng(0).normal(size=500))}, zipfile.ZIP_DEFLATED), 0.5
    ),
}  # fmt: skip

ZIPS |= {name: lambda victim, c=opcodes: beside_weights(c) for name, opcodes in BESIDE_WEIGHTS.items()}  # type: ignore[misc]
ZIPS |= {
    "options as a weight": lambda victim: saved({"model": {"w": torch.ones(1), "x": argparse.Namespace()}}),
    "options as weights": lambda victim: saved({"model": argparse.Namespace(w=torch.ones(1))}),
    "options as the file": lambda victim: saved(argparse.Namespace(model={"w": torch.ones(1)})),
    "an array as a weight of .pth": lambda victim: saved({"model": {"w": torch.ones(1), "x": np.ones(1)}}),
    "a type as a weight": lambda victim: saved({"model": {"w": torch.ones(1), "x": np.float32}}),
    "options as a name": lambda victim: saved({"model": {"w": torch.ones(1), argparse.Namespace: 1}}),
    "os.system among options": lambda victim: saved(
        {"w": torch.ones(1), "args": argparse.Namespace(f=hostile(victim))}
    ),
    "os.system among options of a legacy .pth": lambda victim: saved(
        {"w": torch.ones(1), "args": argparse.Namespace(f=hostile(victim))}, False
    ),
}
PICKLES_BESIDE = {
    f"{name} in .pkl": lambda victim, c=opcodes: b"\x80\x02}" + text("x") + c + b"s."  # type: ignore[misc]
    for name, opcodes in BESIDE_WEIGHTS.items()
}

ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
SAFETENSORS: dict[str, Content] = {
    "a header longer than the file": lambda victim: safetensors({"w": ENTRY}, length=1 << 62),
    "a header that is no JSON": lambda victim: safetensors(b'{"w": {{{{'),
    "brackets in a header": lambda victim: safetensors(b'{"w": ' + b"[" * 100_000),
    "data outside the file": lambda victim: safetensors({"w": {**ENTRY, "data_offsets": [0, 1 << 50]}}),
    "data from behind": lambda victim: safetensors({"w": {**ENTRY, "data_offsets": [16, 0]}}),
    "data used twice": lambda victim: safetensors({"v": ENTRY, "w": ENTRY}),
    "an overflowing shape": lambda victim: safetensors({"w": {**ENTRY, "shape": [1 << 62, 1 << 62]}}),
    "another shape than its data": lambda victim: safetensors({"w": {**ENTRY, "shape": [5]}}),
    "an unknown type": lambda victim: safetensors({"w": {**ENTRY, "dtype": "PYOBJECT"}}),
    "half a safetensors file": lambda victim: safetensors({"w": ENTRY}, bytes(8)),
    "no tensors": lambda victim: safetensors({}, b""),
}  # fmt: skip

OTHERS: dict[str, Content] = {
    "nothing": lambda victim: b"",
    "one byte": lambda victim: b"\x80",
    "a shell script": lambda victim: f"#!/bin/sh\ntouch {victim}\n".encode(),
    "Python": lambda victim: f"open({victim!r}, 'w')\n".encode(),
    "YAML that makes objects": lambda victim: f"!!python/object/apply:os.system ['touch {victim}']".encode(),
    "a web page": lambda victim: b"<html>404 Not Found</html>",
    "random bytes": lambda victim: np.random.default_rng(1).bytes(4096),
    "zeros": lambda victim: bytes(4096),
}

CASES: dict[str, tuple[str, Content]] = {
    **{name: (".pkl", content) for name, content in PICKLES.items()},
    **{name: (".pkl", content) for name, content in PICKLES_BESIDE.items()},
    **{name: (".pth", content) for name, content in ZIPS.items()},
    **{name: (".safetensors", content) for name, content in SAFETENSORS.items()},
    **{name: (".bin", content) for name, content in OTHERS.items()},
}


def read_all(files: list[str]) -> None:
    """Print a line of JSON for each file: what was raised, how long it took, and the memory so far."""
    from gn_detect.errors import UserError
    from gn_detect.weights import read_checkpoint

    for file in files:
        print(json.dumps({"file": file}), flush=True)  # seen from outside, should this be the last
        start = time.process_time()
        try:
            tensors = read_checkpoint(file).tensors
            outcome, message = "read", ", ".join(tensors)
        except UserError as error:
            outcome, message = "refused", str(error)
        except BaseException as error:
            outcome, message = type(error).__name__, str(error)
        seconds = time.process_time() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        result = {"file": file, "outcome": outcome, "message": message, "seconds": seconds, "memory": memory}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    read_all(json.loads(Path(sys.argv[1]).read_text()))

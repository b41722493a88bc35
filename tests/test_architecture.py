"""The house rules that a machine can check: imports, names of files, safe readers.

Each check returns its complaints as text, and is itself tried on a small tree that breaks the rule.
"""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BASE = {"text", "errors", "files", "progress", "structures", "distributed"}
MIDDLE = BASE | {"ops", "layers", "config"}
LOWER = MIDDLE | {"convert", "weights", "modeling"}
MAY_IMPORT: dict[str, set[str]] = {
    "text": set(),
    "errors": {"text"},
    "files": {"errors"},
    "progress": {"text"},
    "structures": {"errors"},
    "distributed": {"text", "errors", "files"},
    "ops": BASE,
    "layers": BASE | {"ops"},
    "config": {"text", "errors", "files"},
    "convert": {"text", "errors", "files", "ops", "layers"},  # knows nothing of detection
    "weights": MIDDLE,
    "modeling": MIDDLE,
    "data": LOWER,
    "visualize": LOWER | {"data"},
    "evaluation": LOWER | {"data"},
    "interop": LOWER | {"data", "evaluation"},
    "engine": LOWER | {"data", "evaluation", "visualize"},
    "export": LOWER | {"data", "evaluation", "visualize", "engine"},
    "conversion": LOWER | {"data", "interop", "engine"},
    "bench": LOWER | {"data", "engine"},
    "report": LOWER | {"data", "evaluation", "visualize", "engine"},
    "finetuning": LOWER | {"data", "evaluation", "visualize", "engine", "report"},
    "cli": LOWER
    | {"data", "evaluation", "visualize", "engine", "conversion", "export", "bench", "interop", "report"}
    | {"__init__"},
    "__main__": {"cli"},
    "__init__": LOWER
    | {"data", "evaluation", "visualize", "engine", "export", "interop", "report", "bench"}
    | {"finetuning", "conversion"},
}
"""For each file or folder of the package, what else of the package it may import (itself always)."""

SLOW_IMPORTS = ("tensorboard", "matplotlib", "hotcoco", "faster_coco_eval", "scipy", "pytest", "jinja2", "av")
SLOW_IMPORTS += (
    "onnx",
    "onnxscript",
    "onnxruntime",
    "detectron2",
    "timm",
    "albumentations",
    "cv2",
    "huggingface_hub",
    "wandb",
    "mlflow",
    "trackio",
)


def python_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path, package: Path) -> str:
    """``ops`` for ``gn_detect/ops/boxes.py``, ``files`` for ``gn_detect/files.py``."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def imported_parts(path: Path, package: Path, parts: set[str]) -> Iterator[tuple[int, str]]:
    """Line and part for each import of one of ``parts``, anywhere in the file, relative or absolute."""
    folder = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names] if module == package.name else [module]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == package.name:
                part = rest.partition(".")[0]
                yield node.lineno, part if part in parts else "__init__"


def wrong_imports(package: Path) -> list[str]:
    complaints, parts = [], {part_of(path, package) for path in python_files(package)}
    for path in python_files(package):
        part = part_of(path, package)
        if part not in MAY_IMPORT:
            complaints.append(f"{path.relative_to(package)}: give '{part}' a place in MAY_IMPORT")
            continue
        for line, target in imported_parts(path, package, parts):
            if target != part and target not in MAY_IMPORT[part]:
                complaints.append(f"{path.relative_to(package)}:{line}: '{part}' may not import '{target}'")
    return complaints


def unsafe_readers(package: Path) -> list[str]:
    """Calls that run what a file contains, such as eval or torch.load without weights_only=True, or that let
    something small become large: YAML and images have one reader each, which bounds them.
    """
    complaints = []
    for path in python_files(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            unsafe = name in {"pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load", "os.system"}
            unsafe |= name == "torch.load" and options.get("weights_only") != "True"
            unsafe |= name.endswith(".load") and options.get("allow_pickle") == "True"
            unsafe |= name in {"yaml.load", "yaml.safe_load", "yaml.safe_load_all", "yaml.full_load"}
            unsafe |= name == "Image.open" and "formats" not in options
            if unsafe:
                complaints.append(f"{path.relative_to(package)}:{node.lineno}: {name}")
    return complaints


@pytest.fixture(scope="module")
def package(repository: Path) -> Path:
    return repository / "gn_detect"


def test_imports_run_one_way(package: Path) -> None:
    assert wrong_imports(package) == []


def test_no_file_is_read_by_running_it(package: Path) -> None:
    assert unsafe_readers(package) == []


def test_the_table_has_no_way_back() -> None:
    order = list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())  # raises CycleError on a circle
    layers = ["ops", "layers", "modeling", "data", "evaluation", "engine", "cli"]
    assert sorted(layers, key=order.index) == layers
    beside = {"convert", "weights", "modeling"}
    assert all(not MAY_IMPORT[part] & beside for part in beside)
    assert not MAY_IMPORT["convert"] & {"config", "structures"}


IMPORT_ALL = """
import importlib, pkgutil, sys
import torch
threads, generator = torch.get_num_threads(), torch.random.get_rng_state()
import gn_detect
for module in pkgutil.walk_packages(gn_detect.__path__, "gn_detect."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert torch.get_num_threads() == threads, "the number of threads changed"
assert torch.equal(torch.random.get_rng_state(), generator), "random numbers were drawn"
assert not torch.cuda.is_initialized(), "CUDA was started"
slow = [name for name in sys.argv[1:] if name in sys.modules]
assert not slow, f"{slow} should be imported where they are used"
"""


def test_importing_every_module_is_light_and_has_no_side_effects(repository: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *SLOW_IMPORTS],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def write_tree(root: Path, files: dict[str, str]) -> Path:
    package = root / "gn_detect"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return package


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("ops/a.py", "from ..layers import b", "'ops' may not import 'layers'"),
        ("ops/a.py", "from .. import layers", "'ops' may not import 'layers'"),
        ("ops/a.py", "import gn_detect.layers.b as b", "'ops' may not import 'layers'"),
        ("ops/a.py", "from gn_detect.layers.b import c", "'ops' may not import 'layers'"),
        ("ops/a.py", "def f():\n    from ..layers.b import c", "'ops' may not import 'layers'"),
        ("ops/a.py", "from gn_detect import build_model", "'ops' may not import '__init__'"),
        ("ops/deep/a.py", "from ...layers import b", "'ops' may not import 'layers'"),
        ("files.py", "from .layers import b", "'files' may not import 'layers'"),
        ("convert/a.py", "from ..structures import Target", "'convert' may not import 'structures'"),
        ("modeling/a.py", "from ..weights import x", "'modeling' may not import 'weights'"),
        ("unheard_of.py", "", "give 'unheard_of' a place"),
    ],
)
def test_an_import_against_the_direction_is_found(
    tmp_path: Path, file: str, text: str, complaint: str
) -> None:
    others = {f"{name}/b.py": "" for name in ("layers", "weights", "modeling")}
    package = write_tree(tmp_path, {**others, "structures.py": "", file: text})
    found = wrong_imports(package)
    assert len(found) == 1
    assert complaint in found[0]


def test_imports_along_the_direction_are_fine(tmp_path: Path) -> None:
    files = {
        "errors.py": "import os",
        "ops/a.py": "from .b import f\nfrom ..errors import UserError\nfrom torch import Tensor",
        "ops/b.py": "import torch.nn.functional as F",
        "layers/c.py": "from .. import ops\nfrom ..ops.b import f",
        "__init__.py": "from .layers.c import f\nfrom gn_detect.ops import a",
    }
    assert wrong_imports(write_tree(tmp_path, files)) == []


def test_unsafe_files_are_found(tmp_path: Path) -> None:
    files = {
        "ops/reads.py": "import torch\ndef f(p):\n    return torch.load(p), eval(p)\n"
        "Image.open(1), yaml.load(1)",
    }
    package = write_tree(tmp_path, files)
    calls = ["3: torch.load", "3: eval", "4: Image.open", "4: yaml.load"]
    assert sorted(unsafe_readers(package)) == sorted(f"ops/reads.py:{call}" for call in calls)

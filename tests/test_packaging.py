"""The wheel holds the package, its configurations and nothing else, and works without the repository."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy, for the build leaves folders behind."""
    if importlib.util.find_spec("setuptools") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("needs pip and setuptools in this environment to build a wheel")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        if (repository / name).exists():
            shutil.copy(repository / name, copy)
    for name in ("gn_detect", "configs", "model_zoo"):
        shutil.copytree(repository / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(out), str(copy)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


def test_every_folder_of_code_is_listed_as_a_package(repository: Path, project: dict) -> None:
    folders = {path.parent for path in (repository / "gn_detect").rglob("*.py")}
    code = {".".join(folder.relative_to(repository).parts) for folder in folders}
    beside = {"gn_detect.configs", "gn_detect.model_zoo"}
    assert set(project["tool"]["setuptools"]["packages"]) == code | beside


def test_the_wheel_holds_the_code_and_the_configurations(repository: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = [path for path in (repository / "gn_detect").rglob("*.py") if "__pycache__" not in path.parts]
    expected = {path.relative_to(repository).as_posix() for path in code} | {"gn_detect/py.typed"}
    expected |= {f"gn_detect/report/page.{suffix}" for suffix in ("html.jinja", "css", "js")}
    configs = sorted((repository / "configs").rglob("*.yaml"))
    assert configs
    expected |= {f"gn_detect/{path.relative_to(repository).as_posix()}" for path in configs}
    assert shipped == expected | {"gn_detect/model_zoo/catalog.yaml"}


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configurations(repository: Path, wheel: Path, tmp_path: Path) -> None:
    """From another folder, without the repository on the path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
from importlib import resources
from pathlib import Path
import gn_detect
assert Path(gn_detect.__file__).parts[-3] == "site", gn_detect.__file__
with resources.as_file(resources.files("gn_detect") / "configs") as folder:
    files = [file for file in sorted(folder.rglob("*.yaml")) if not file.name.startswith("Base")]
    for file in files:
        gn_detect.load_config(file)
cfg = gn_detect.load_config("GN/mask_rcnn_R_50_FPN_2x_gn.yaml")
from gn_detect.weights.zoo import find_entry
assert find_entry("R-50-GN").url.endswith("R-50-GN.pkl")
print(len(files), cfg.model.resnets.norm)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    configs = [file for file in (repository / "configs").rglob("*.yaml") if not file.name.startswith("Base")]
    assert result.stdout.split() == [str(len(configs)), "GN"]


def test_the_command_is_declared_and_runs(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "gn-detect = gn_detect.cli:main" in archive.read(entry_points).decode()
        archive.extractall(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", "import sys; from gn_detect.cli import main; sys.exit(main(['--help']))"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout


def test_tested_versions_satisfy_what_the_package_asks_for(repository: Path, project: dict) -> None:
    """Each dependency is pinned once in constraints.txt, at least at its lower bound."""
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split(";")[0].strip().lower().split("==") for line in lines if line and line[0] != "#")
    assert len(pins) == sum(bool(line) and line[0] != "#" for line in lines)
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["fast-eval"]]
    wanted += project["project"]["optional-dependencies"]["onnx"]
    wanted += project["project"]["optional-dependencies"]["timm"]
    wanted += project["project"]["optional-dependencies"]["dev"]
    for requirement in wanted:
        name, _, bound = requirement.lower().partition(">=")
        if name.startswith("gn-detect"):
            continue
        pinned = [int(number) for number in re.findall(r"\d+", pins[name])]
        assert pinned >= [int(number) for number in re.findall(r"\d+", bound)], requirement


def test_what_people_install_names_no_host(repository: Path) -> None:
    for name in ("constraints.txt", "Makefile", "pyproject.toml", ".ci/run"):
        text = (repository / name).read_text(encoding="utf-8")
        assert "://" not in text and "index-url" not in text, name


def test_ci_runs_what_contributors_run(repository: Path) -> None:
    script = repository / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert "make lint" in lines
    assert "make test" in lines


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_refuses_an_interpreter_that_does_not_fit(repository: Path, tmp_path: Path) -> None:
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        capture_output=True,
        text=True,
        cwd=repository,
        check=False,
    )
    assert result.returncode != 0
    assert "error: this needs Python 3.10 to 3.13" in result.stderr
    assert str(old) in result.stderr
    assert not (tmp_path / "venv").exists()

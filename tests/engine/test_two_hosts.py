"""Two machines, as two network namespaces with a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gn_detect.weights import read_checkpoint
from tests.engine.tiny import make_dataset, write_config

NETWORK = "198.18.77"
"""An address of the range for tests (RFC 2544); nothing outside the namespaces sees it."""


def ip(*words: str) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two namespaces, the second one at the other end of the first one's ``cable``."""
    names = [f"gn_detect_{os.getpid()}_{number}" for number in range(2)]
    if shutil.which("ip") is None or not ip("netns", "add", names[0]):
        pytest.skip("only root can make network namespaces, and not in every container")
    try:
        made = ip("netns", "add", names[1]) and ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        if not made:
            pytest.skip("this system has no virtual network cables")
        for number, name in enumerate(names):
            for device in ("lo", "cable"):
                assert ip("-n", name, "link", "set", device, "up")
            assert ip("-n", name, "address", "add", f"{NETWORK}.{number + 1}/24", "dev", "cable")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.mark.slow
def test_two_hosts_train_one_model(hosts: list[str], tmp_path: Path, repository: Path) -> None:
    """Each has a folder of its own, and only the first one writes."""
    data = make_dataset(tmp_path / "train", 4)
    processes = []
    for rank, name in enumerate(hosts):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, data)
        command = [sys.executable, "tools/train_net.py", "--config-file", str(config), "--num-machines", "2"]
        command += ["--machine-rank", str(rank), "--dist-url", f"tcp://{NETWORK}.1:29500"]
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command, "SOLVER.MAX_ITER", "2"],
                cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "training on cpu, processes: 2" in outputs[0]
    assert read_checkpoint(tmp_path / hosts[0] / "run" / "model_final.pth").metadata.iteration == 1
    assert not (tmp_path / hosts[1] / "run").exists()

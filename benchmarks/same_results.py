"""Prove that a change leaves every result as it was: run two commits and compare to the last digit.

``python benchmarks/same_results.py OLD [NEW]`` checks out both commits (NEW is HEAD by default) into
temporary folders and runs the same short seeded jobs in each, with one thread:

- three trainings with an evaluation: the built-in dataset, nuclei, and own data without a config,
- the detections of detectron2's weights on images of the oracle,
- a model that is converted to GroupNorm and calibrated,
- the outputs of an exported ONNX file, where onnxruntime is installed.

It prints a line for each job and exits with 1 if a result differs. Nuclei and the oracle need ``../shared``.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchvision

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
NUCLEI = SHARED / "data" / "dsb2018"
ORACLE = SHARED / "oracles" / "dsb_r18_gn"
SHORT = ["SEED", "1", "SOLVER.MAX_ITER", "6", "SOLVER.LOG_PERIOD", "1", "TEST.EVAL_PERIOD", "0"]
TIMES = ("time", "images_per_second", "memory", "eta")  # in names of metrics, which differ from run to run


def main() -> int:
    """Compare two commits; return 1 if a result differs."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("old", metavar="OLD", help="commit")
    parser.add_argument("new", metavar="NEW", nargs="?", default="HEAD", help="commit; HEAD by default")
    parser.add_argument("--probe", metavar="FOLDER", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.probe is not None:
        print(json.dumps(probe(args.probe)))
        return 0
    with tempfile.TemporaryDirectory(prefix="same-results-") as folder:
        old = results_of(args.old, Path(folder) / "old")
        new = results_of(args.new, Path(folder) / "new")
    for name in old | new:
        same = old.get(name) == new.get(name)
        print(f"{'equal ' if same else 'DIFFERENT'} {name}: {summary(new.get(name))}")
        if not same:
            print(f"          before: {summary(old.get(name))}")
    return int(old != new)


def results_of(commit: str, folder: Path) -> dict[str, Any]:
    """Check out a commit and run this script's jobs with its code."""
    subprocess.run(["git", "clone", "--quiet", "--shared", str(REPOSITORY), str(folder / "code")], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder / "code", check=True)
    # An absolute name in the environment wins over an editable install of another commit.
    environment = os.environ | {"PYTHONPATH": str(folder / "code"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "-", "--probe", str(folder)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def summary(result: Any) -> str:
    """Return a result in one line."""
    text = json.dumps(result)
    return text if len(text) <= 150 else f"{text[:100]} ... sha256 {digest(text)}"


def digest(*parts: Any) -> str:
    """Return the first 16 digits of the SHA-256 of texts, bytes and tensors."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()[:16]


def probe(folder: Path) -> dict[str, Any]:
    """Run every job with the package that is imported, and return its results by name."""
    torch.set_num_threads(1)
    results = {"demo": training(folder / "demo", ["--config-file", "quick/demo.yaml"])}
    if NUCLEI.is_dir():
        nuclei = folder / "nuclei"
        results["nuclei"] = training(nuclei, ["--config-file", "quick/nuclei_r18_gn.yaml"])
        own = []
        for part in ("train", "val"):
            own += [f"--{part}-json", str(NUCLEI / "annotations" / f"instances_{part}.json")]
            own += [f"--{part}-images", str(NUCLEI / "images")]
        results["own data"] = training(folder / "own", own)
        if importlib.util.find_spec("onnxruntime"):
            results["ONNX"] = exported(nuclei, folder)
    if ORACLE.is_dir():
        results["oracle"] = oracle(folder)
    results["conversion"] = conversion()
    return results


def command(*words: str) -> None:
    """Run a command of the package; its output goes to standard error."""
    # The built-in datasets are looked for relative to the repository, whose own code must not be imported.
    start = "import sys; sys.path.remove(''); from gn_detect.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", start, *words], check=True, stdout=sys.stderr, cwd=REPOSITORY)


def training(folder: Path, words: list[str]) -> dict[str, Any]:
    """Train and evaluate; return losses and AP with all digits, and a digest of the weights."""
    command("train", *words, "OUTPUT_DIR", str(folder), *SHORT)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    curve = [{k: v for k, v in line.items() if not any(t in k for t in TIMES)} for line in lines]
    state = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    return {
        "losses": [line["total_loss"] for line in curve if "total_loss" in line],
        "metrics": digest(json.dumps(curve, sort_keys=True)),
        "weights": digest(*(part for name in sorted(state) for part in (name, state[name]))),
        "AP": {kind: row["AP"] for kind, row in results.items() if "AP" in row},
    }


def predictions(folder: Path, words: list[str]) -> dict[str, Any]:
    """Detect objects on the first three validation images; return their number and a digest."""
    content = json.loads((NUCLEI / "annotations" / "instances_val.json").read_text())
    images = [str(NUCLEI / "images" / image["file_name"]) for image in content["images"][:3]]
    command("predict", *words, "--no-pictures", "--output", str(folder), *images)
    found = json.loads((folder / "predictions.json").read_text())
    kept = [{key: value for key, value in entry.items() if key != "file_name"} for entry in found]
    return {"detections": len(kept), "digest": digest(json.dumps(kept, sort_keys=True))}


def oracle(folder: Path) -> dict[str, Any]:
    """Run detectron2's weights."""
    words = ["--config-file", str(ORACLE / "config.yaml"), "--weights", str(ORACLE / "model_final.pth")]
    return predictions(folder / "oracle", words)


def exported(run: Path, folder: Path) -> dict[str, Any]:
    """Export the nuclei's run to ONNX and run the file."""
    words = ["--config-file", str(run / "config.yaml"), "--weights", str(run / "model_final.pth")]
    command("export", *words, "--output", str(folder / "model.onnx"))
    return predictions(folder / "onnx", ["--model", str(folder / "model.onnx"), "--threshold", "0.01"])


def conversion() -> dict[str, Any]:
    """Convert a ResNet-18 with running statistics, and calibrate it for a few steps."""
    from gn_detect import calibrate, convert_norm

    torch.manual_seed(0)
    images = torch.randn(24, 3, 64, 64)
    original = torchvision.models.resnet18(num_classes=10)
    with torch.no_grad():
        original.train()(images)
    original.eval()
    converted, report = convert_norm(original)
    at_once = digest(*converted.state_dict().values())
    calibrate(original, converted, images, 3, report=report, progress=False)
    return {
        "converted": at_once,
        "calibrated": digest(*converted.state_dict().values()),
        "similarity": report.similarity,
    }


if __name__ == "__main__":
    sys.exit(main())

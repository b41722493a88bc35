"""``python -m benchmarks.conversion.finetune``: a converted detector against BatchNorm, fine-tuned alike.

From one BatchNorm checkpoint: the converted GroupNorm model, frozen BatchNorm, BatchNorm that goes on
counting statistics over the small batch, and GroupNorm put in afresh. All get the same images in the same
order, and the same learning rate, constant after a warm-up.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from gn_detect import convert_norm, load_config
from gn_detect.engine import evaluate, train
from gn_detect.modeling import make_model
from gn_detect.weights import load_weights, save_weights

NORMS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")
EVALUATED = 50
"""Iterations between two evaluations."""


def main() -> None:
    """Print AP by variant, batch size and iteration; save it with ``--json``."""
    args = _parse()
    torch.set_num_threads(args.threads)
    figures: list[dict[str, object]] = []
    for variant, keys in _variants(args).items():
        start = _evaluated_before(args, variant, keys)
        for batch in args.batches:
            folder = args.output / f"{variant.replace(' ', '_')}_{batch}"
            train(load_config(args.config_file, [*args.overrides, *keys, *_solver(args, batch, folder)]))
            found = {0: start} | _average_precisions(folder / "metrics.jsonl")
            figures.append({"variant": variant, "batch": batch, "AP": found})
            print(f"{variant}, batch {batch}: {_in_words(found)}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversion.finetune", description=main.__doc__
    )
    parser.add_argument("--config-file", required=True, help="that the BatchNorm model was trained with")
    parser.add_argument("--weights", required=True, help="of the BatchNorm model")
    parser.add_argument("--converted", required=True, help="what gn-detect convert made of them")
    parser.add_argument("--min-channels-per-group", type=int, default=16, help="of the converted model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--variants", nargs="+", help="some of them; by default all")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=0.001, help="times the batch size")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys for all runs")
    return parser.parse_args()


def _variants(args: argparse.Namespace) -> dict[str, list[str]]:
    grouped = ["MODEL.GN.MIN_CHANNELS_PER_GROUP", str(args.min_channels_per_group)]
    args.output.mkdir(parents=True, exist_ok=True)
    variants = {
        "converted GN": norm("GN", args.converted) + grouped,
        "frozen BN": norm("FrozenBN", args.weights),
        "live BN": norm("BN", args.weights),
        "fresh GN": norm("GN", _with_fresh_norms(args)) + grouped,
    }
    return {name: keys for name, keys in variants.items() if not args.variants or name in args.variants}


def norm(kind: str, weights: str | Path) -> list[str]:
    """Config keys of one norm everywhere, and the weights to start from."""
    return [word for key in NORMS for word in (key, kind)] + ["MODEL.WEIGHTS", str(weights)]


def _with_fresh_norms(args: argparse.Namespace) -> Path:
    """The BatchNorm model's weights and GroupNorm as it is initialised: what a plain swap gives."""
    model = make_model(load_config(args.config_file, [*args.overrides, *norm("BN", args.weights)]))
    load_weights(model, args.weights)
    model, _ = convert_norm(model, init="reset", min_channels_per_group=args.min_channels_per_group)
    path: Path = args.output / "fresh.pth"
    save_weights(path, model.state_dict())
    return path


def _solver(args: argparse.Namespace, batch: int, folder: Path) -> list[str]:
    keys = {
        "SOLVER.IMS_PER_BATCH": batch,
        "SOLVER.BASE_LR": args.learning_rate * batch,
        "SOLVER.MAX_ITER": args.iterations,
        "SOLVER.STEPS": "[]",
        "SOLVER.WARMUP_ITERS": 10,
        "TEST.EVAL_PERIOD": EVALUATED,
        "OUTPUT_DIR": folder,
    }
    return [str(word) for item in keys.items() for word in item]


def _evaluated_before(args: argparse.Namespace, variant: str, keys: list[str]) -> dict[str, float]:
    folder = args.output / f"{variant.replace(' ', '_')}_before"
    results = evaluate(load_config(args.config_file, [*args.overrides, *keys, "OUTPUT_DIR", str(folder)]))
    return {task: results[task]["AP"] for task in ("bbox", "segm")}


def _average_precisions(metrics: Path) -> dict[int, dict[str, float]]:
    found = {}
    for line in metrics.read_text().splitlines():
        values = json.loads(line)
        if "segm/AP" in values:
            found[values["iteration"] + 1] = {task: values[f"{task}/AP"] for task in ("bbox", "segm")}
    return found


def _in_words(found: dict[int, dict[str, float]]) -> str:
    return ", ".join(f"{done} it. {ap['bbox']:.1f}/{ap['segm']:.1f}" for done, ap in found.items())


if __name__ == "__main__":
    main()

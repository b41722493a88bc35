"""``python -m benchmarks.conversion MODEL``: original, fresh, copied, matched, calibrated side by side.

The row "mirrored" is the original itself on mirrored images: what a change that nobody would mind does to
the figures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import nn

from gn_detect.convert import calibrate, convert_norm

from . import crops, measure, models


def main() -> None:
    """Print a table for each kind of validation images and, with ``--json``, save them."""
    args = _parse()
    torch.set_num_threads(args.threads)
    folder = args.shared / "data" / "coco80"
    pretrained = models.load(args.model, args.shared / "weights")
    unlabelled = crops.object_crops(folder, "train", pretrained.size).images
    if args.random_crops:
        more = crops.random_crops(folder, "train", pretrained.size, args.random_crops)
        unlabelled = torch.cat([more, unlabelled])
    rule = {"num_groups": args.num_groups, "min_channels_per_group": args.min_channels}
    converted = {name: make() for name, make in measure.initialisations(pretrained.model, **rule).items()}
    for name, steps in (("balanced", 0), ("calibrated", args.steps)):
        converted[name], report = convert_norm(pretrained.model, **rule)
        start = time.perf_counter()
        calibrate(
            pretrained.model,
            converted[name],
            models.normalise(unlabelled, pretrained),
            steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            augment=not args.no_augment,
            report=report,
        )
        seconds = time.perf_counter() - start
    if args.model.startswith("resnet20_bn"):  # it has a twin
        twin = models.load(args.model.replace("bn", "gn", 1), args.shared / "weights")
        converted["trained as GN"] = twin.model
    print(f"{args.model}, {args.num_groups} groups of at least {args.min_channels} channels")
    print(
        f"calibrated in {seconds:.0f} s, {args.steps} steps of {args.batch_size}, {args.threads} threads, on "
        f"{len(unlabelled)} unlabelled images"
    )
    tables = {}
    for kind in args.on:
        validation = _validation(args, kind, pretrained, folder)
        rows = tables[kind] = _rows(pretrained.model, converted, validation)
        print(f"{len(validation.images)} {kind} of val")
        print(measure.as_table(rows))
        if "accuracy" in rows["original"]:
            kept = rows["calibrated"]["accuracy"] / rows["original"]["accuracy"]
            print(f"accuracy kept: {kept:.3f}")
    if args.report:
        report.save(args.report.with_suffix(".json"))
        report.draw(args.report.with_suffix(".png"))
    if args.json:
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
        }
        content = {"settings": settings, "seconds": seconds, "tables": tables}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def _rows(
    original: nn.Module, converted: dict[str, nn.Module], validation: measure.Validation
) -> dict[str, measure.Row]:
    expected = measure.outputs_of(original, validation.images)
    found = {name: measure.outputs_of(model, validation.images) for name, model in converted.items()}
    found["mirrored"] = measure.outputs_of(original, validation.images.flip(3))
    return {name: measure.compare(expected, outputs, validation) for name, outputs in found.items()}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversion", description=main.__doc__)
    parser.add_argument("model", choices=models.NAMES)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of weights and images")
    kinds = ("crops", "photos", "random")
    parser.add_argument("--on", choices=kinds, nargs="+", default=["crops"], help="to be compared on")
    parser.add_argument("--num-groups", type=int, default=32)
    parser.add_argument("--min-channels", type=int, default=16, help="in each group")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--random-crops", type=int, default=0, help="of whole train images, in addition")
    parser.add_argument("--no-augment", action="store_true", help="no flips and crops of crops")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--report", type=Path, help="files .json and .png of the conversion report")
    return parser.parse_args()


def _validation(
    args: argparse.Namespace, kind: str, pretrained: models.Pretrained, folder: Path
) -> measure.Validation:
    if kind != "crops":
        if kind == "photos":
            images = crops.photos(folder, "val", pretrained.size)
        else:
            images = crops.random_crops(folder, "val", pretrained.size, 1000)
        labels = torch.full((len(images),), -1)
        return measure.Validation(models.normalise(images, pretrained), labels, False)
    found = crops.object_crops(folder, "val", pretrained.size)
    by_neighbour = args.model == "mobilenet_v2"
    labels = found.categories
    if not by_neighbour:  # of what the crops show, only CIFAR's classes are the models'
        ten = args.model.startswith(("cifar", "resnet20"))
        names = [found.names[category] if ten else "" for category in found.categories.tolist()]
        labels = torch.tensor([crops.CIFAR_CLASSES.get(name, -1) for name in names])
    return measure.Validation(models.normalise(found.images, pretrained), labels, by_neighbour)


if __name__ == "__main__":
    main()

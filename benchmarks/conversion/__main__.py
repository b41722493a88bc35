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
from torch import Tensor, nn

from gn_detect.conversion import WINDOWS
from gn_detect.convert import calibrate, choose_settings, convert_norm

from . import crops, measure, models

MOST_HELD_OUT = 300
"""Images on which a calibration chooses its best state; more take time and choose no better."""


def main() -> None:
    """Print a table for each kind of validation images and, with ``--json``, save them."""
    args = _parse()
    torch.set_num_threads(args.threads)
    seen, unseen = _photos(args)
    pretrained = models.load(args.model, args.shared / "weights")
    unlabelled = _unlabelled(args, seen, pretrained.size)
    if args.by_rule:
        choice = choose_settings(pretrained.model, models.normalise(unlabelled, pretrained))
        print(choice)
        args.num_groups, args.min_channels, args.relative_eps = choice.settings.values()
    rule = {"num_groups": args.num_groups, "min_channels_per_group": args.min_channels}
    starts = measure.initialisations(pretrained.model, args.relative_eps, **rule)
    converted = {name: make() for name, make in starts.items()}
    for name, steps in (("balanced", 0), ("calibrated", args.steps)):
        converted[name], report = convert_norm(pretrained.model, relative_eps=args.relative_eps, **rule)
        start, worked = time.perf_counter(), time.process_time()
        calibrate(
            pretrained.model,
            converted[name],
            models.normalise(unlabelled, pretrained),
            steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            norm_learning_rate=args.norm_learning_rate,
            block_weight=args.block_weight,
            parameters=args.parameters,
            augment=not args.no_augment,
            held_out=min(0.1, MOST_HELD_OUT / len(unlabelled)),
            seed=args.seed,
            report=report,
        )
        seconds, worked = time.perf_counter() - start, time.process_time() - worked
    if args.model.startswith("resnet20_bn"):  # it has a twin
        twin = models.load(args.model.replace("bn", "gn", 1), args.shared / "weights")
        converted["trained as GN"] = twin.model
    print(
        f"{args.model}, {args.num_groups} groups of at least {args.min_channels} channels, relative eps "
        f"{args.relative_eps:g}"
    )
    print(
        f"calibrated in {seconds:.0f} s, {worked:.0f} s of a processor, {report.steps} steps of "
        f"{args.batch_size}, {args.threads} threads, on {len(unlabelled)} unlabelled images"
    )
    tables = {}
    for kind in args.on:
        validation = _validation(args, kind, pretrained, unseen)
        rows = tables[kind] = _rows(pretrained.model, converted, validation)
        print(f"{len(validation.images)} {kind} of {args.split} photos")
        print(measure.as_table(rows))
        if "accuracy" in rows["original"]:
            kept = rows["calibrated"]["accuracy"] / rows["original"]["accuracy"]
            print("accuracy kept: {:.3f} ({:.3f}-{:.3f})".format(kept, *rows["calibrated"]["kept_interval"]))
    if args.report:
        report.save(args.report.with_suffix(".json"))
        report.draw(args.report.with_suffix(".png"))
    if args.json:
        settings = {
            key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()
        }
        content = {"settings": settings, "seconds": seconds, "processor": worked, "steps": report.steps}
        content["tables"] = tables
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
    parser.add_argument("--relative-eps", type=float, default=0.0, help="of the GroupNorms, as 0.3")
    parser.add_argument("--steps", type=int, help="400; with --by-rule as many as the rule gives")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--norm-learning-rate", type=float, default=2e-3)
    parser.add_argument("--block-weight", type=float, default=30.0, help="relative to the outputs' weight")
    parser.add_argument("--parameters", choices=("all", "affine"), default="all", help="to train")
    parser.add_argument("--random-crops", type=int, default=0, help="windows of train photos, in addition")
    parser.add_argument(
        "--person-windows", type=int, default=0, help="of coco_person1's train photos, in addition"
    )
    parser.add_argument("--object-windows", type=int, default=0, help="around each train box, in addition")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration and of the windows")
    parser.add_argument(
        "--by-rule",
        action="store_true",
        help="groups, relative eps and steps as gn-detect convert --images chooses them, on windows of all "
        "photos without their boxes",
    )
    parser.add_argument(
        "--split",
        choices=("val", "development", "final"),
        default="val",
        help="photos to compare on; development: to choose settings, calibrated on half of the other train "
        "photos; final: a third of the train photos that no setting was chosen on",
    )
    parser.add_argument("--no-augment", action="store_true", help="no flips and crops of crops")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--report", type=Path, help="files .json and .png of the conversion report")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of each photo, with --by-rule")
    args = parser.parse_args()
    if args.steps is None and not args.by_rule:
        args.steps = 400
    return args


def _photos(args: argparse.Namespace) -> tuple[crops.Photos, crops.Photos]:
    """To calibrate on, and to compare on."""
    folder = args.shared / "data" / "coco80"
    if args.split == "val":
        return crops.Photos(folder, "train"), crops.Photos(folder, "val")
    final, development, rest = crops.parts(folder)
    seen, unseen = (development | rest, final) if args.split == "final" else (rest, development)
    return (
        crops.Photos(folder, "train", seen.__contains__),
        crops.Photos(folder, "train", unseen.__contains__),
    )


def _unlabelled(args: argparse.Namespace, photos: crops.Photos, size: int) -> Tensor:
    """The objects last: it is on them that the calibration's best state is chosen."""
    persons = crops.Photos(args.shared / "data" / "coco_person1", "train")
    if args.by_rule:
        both = (crops.windows(part, size, args.windows * part.count, args.seed) for part in (persons, photos))
        return torch.cat(list(both))
    found = [crops.object_crops(photos, size).images]
    if args.object_windows:
        found.insert(0, crops.windows_at_objects(photos, size, args.object_windows, args.seed))
    if args.random_crops:
        found.insert(0, crops.windows(photos, size, args.random_crops, args.seed))
    if args.person_windows:
        found.insert(0, crops.windows(persons, size, args.person_windows, args.seed))
    return torch.cat(found)


def _validation(
    args: argparse.Namespace, kind: str, pretrained: models.Pretrained, photos: crops.Photos
) -> measure.Validation:
    if kind != "crops":
        if kind == "photos":
            images = crops.squares(photos, pretrained.size)
        else:
            images = crops.windows(photos, pretrained.size, 1000)
        labels = torch.full((len(images),), -1)
        return measure.Validation(models.normalise(images, pretrained), labels, False)
    found = crops.object_crops(photos, pretrained.size)
    by_neighbour = args.model == "mobilenet_v2"
    labels = found.categories
    if not by_neighbour:  # of what the crops show, only CIFAR's classes are the models'
        ten = args.model.startswith(("cifar", "resnet20"))
        names = [found.names[category] if ten else "" for category in found.categories.tolist()]
        labels = torch.tensor([crops.CIFAR_CLASSES.get(name, -1) for name in names])
    return measure.Validation(models.normalise(found.images, pretrained), labels, by_neighbour)


if __name__ == "__main__":
    main()

"""``python -m benchmarks.tables``: the tables of the pages, from the figures in ``benchmarks/results``.

A page marks a table with ``<!-- table: NAME -->`` and ``<!-- end -->``; ``--write`` fills all of them in.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise, product
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

from benchmarks.norm_study import drawn
from benchmarks.norm_study.cells import plan
from gn_detect.bench.cases import LAYERS
from gn_detect.files import atomic_write_text

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
PAGES = (
    "benchmarks/ABLATIONS.md",
    "benchmarks/README.md",
    "benchmarks/memory.md",
    "docs/convert.md",
    "docs/performance.md",
    "docs/your-data.md",
)
DTYPES, ORDERS = ("bfloat16", "float32"), ("channels_last", "channels_first")
LARGE = 16  # MB; a larger tensor's time on a GPU goes to bytes, a smaller one's to launches
ONE_IMAGE = "150 iterations with 1 image, mask AP"

Figure = dict[str, Any]
"""``runs``; or a ``value`` where single runs are not known, or only rounded; or an ``interval``, or both."""


def load(topic: str) -> Any:
    """Read the figures of a topic."""
    return json.loads((RESULTS / f"{topic}.json").read_text("utf-8"))


def figures(topic: str, what: str) -> dict[str, Figure]:
    """Return the figures of a topic's record."""
    return next(record["figures"] for record in load(topic)["records"] if record["what"] == what)


def value(figure: Figure, statistic: str) -> float | int:
    """Return the value, or the mean or median of the runs."""
    return figure["value"] if "value" in figure else getattr(statistics, statistic)(figure["runs"])


def show(figure: Figure | None, statistic: str, digits: int) -> str:
    """Return the value, with the runs or the interval in brackets."""

    def number(x: float) -> str:
        return f"{x:.{digits}f}" if isinstance(x, float) else str(x)

    if figure is None:
        return ""
    interval = " to ".join(map(number, figure.get("interval", ())))
    runs = ", ".join(map(number, figure["runs"])) if len(figure["runs"] or ()) > 1 else ""
    if "value" not in figure and not figure["runs"]:
        return interval
    return number(value(figure, statistic)) + (f" ({interval or runs})" if interval or runs else "")


def markdown(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table."""
    lines = [list(columns), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


Extra = Callable[[dict[str, Any]], str]


def recorded(topic: str, **extra: Extra) -> str:
    """Return a row for each record and a column for each kind of figure, then the extra columns."""
    content = load(topic)
    columns = list(dict.fromkeys(key for record in content["records"] for key in record["figures"]))
    rows = [
        [
            record["what"],
            *(show(record["figures"].get(c), content["statistic"], content["digits"]) for c in columns),
            *(column(record) for column in extra.values()),
        ]
        for record in content["records"]
    ]
    return markdown(["", *columns, *(name.replace("_", " ") for name in extra)], rows)


def against_frozen(arms: dict[str, dict[str, Any]], arm: str) -> str:
    """Return the mean AP of an arm and of frozen BN, and the difference with its interval."""
    ours, frozen = (statistics.fmean(arms[name]["AP"]) for name in (arm, "frozen BN"))
    found = arms[arm]["against frozen BN"]
    difference = f"{found['value']:+.1f}, {found['low']:.1f} to {found['high']:.1f}"
    return f"converted GN {ours:.1f}, frozen BN {frozen:.1f} (difference {difference})"


def headlines() -> str:
    study = {name: found.get("mask AP", 0.0) for name, found in load("norms/results").items()}
    ap = {
        norm: drawn.in_words([study[f"detector_{norm}_batch1_seed{seed}"] for seed in (1, 2, 3)])
        for norm in ("GN", "BN", "FrozenBN")
    }
    ms = sums(combinations("norms-h200")["bfloat16, channels last"])
    slower = [
        median(steps["fused GN"]["seconds"]) / median(steps["frozen BN"]["seconds"])
        for steps in (load("steps-h200")[dtype] for dtype in DTYPES)
    ]
    converted, frozen = (figures("detector", what) for what in ("converted GN, calibrated", "frozen BN"))
    before, after = (value(found["mask AP"], "mean") for found in (frozen, converted))
    studies = {
        study: {row["arm"]: row for row in load("transfer/summary")[study] if row["iterations"] == 450}
        for study in ("pretrained", "final")
    }
    rows = {
        "mask AP at 1 image per batch, nuclei from random weights, 3 seeds": (
            f"GN {ap['GN']}, BatchNorm {ap['BN']}, frozen BN {ap['FrozenBN']}",
            "[norms](#norms-by-images-per-worker)",
        ),
        "mask AP after 450 iterations with 1 image from ImageNet's MobileNetV2, nuclei": (
            against_frozen(studies["pretrained"], "GN, matched"),
            "[fine-tuning](#fine-tuning-a-backbone-of-imagenet)",
        ),
        "the same from nuclei detectors with BatchNorm, which were trained with 8 images": (
            against_frozen(studies["final"], "GN, distilled"),
            "[fine-tuning](#fine-tuning-with-few-images-per-worker)",
        ),
        "all norms of R-50-FPN on an H200, forward and backward, bfloat16": (
            f"fused GN {ms['ours']:.1f} ms, PyTorch's GN {ms['native']:.1f} ms, "
            f"frozen BN {ms['frozen BN']:.1f} ms",
            "[fused GN](#on-an-nvidia-h200)",
        ),
        "training step on that H200, time with GN over time with frozen BN": (
            f"{slower[0]:.2f} (bfloat16), {slower[1]:.2f} (float32)",
            "[fused GN](#on-an-nvidia-h200)",
        ),
        "training step of R-50-FPN with GN on two CPU cores": (
            f"{over_detectron2(load('detectron2')['records'][0])} of detectron2's time",
            "[detectron2](#a-training-step-and-an-inference-of-mask-r-cnn-r-50-fpn-with-gn)",
        ),
        "mask AP of a BatchNorm detector after conversion to GN": (
            f"{after:.1f} of {before:.1f} ({after / before:.2f}); after 150 iterations of fine-tuning "
            f"with 1 image {value(converted[ONE_IMAGE], 'mean'):.1f}",
            "[conversion](#from-batchnorm-to-groupnorm)",
        ),
    }
    return markdown(("what", "result", "section"), ((what, *rest) for what, rest in rows.items()))


def over_detectron2(record: dict[str, Any]) -> str:
    ours, theirs = (value(record["figures"][name], "median") for name in ("gn_detect", "detectron2"))
    return (
        f"{record.get('ratio', ours / theirs):.2f}"  # a recorded ratio is of times before they were rounded
    )


def kept(record: dict[str, Any]) -> str:
    if record["what"].endswith(" BN"):
        return ""
    original = value(figures("detector", "frozen BN")["mask AP"], "mean")
    return f"{value(record['figures']['mask AP'], 'mean') / original:.2f}"


def combinations(topic: str) -> dict[str, list[dict[str, Any]]]:
    """Return the timings of each precision and memory order, of the layers for which all were measured."""
    timings = load(topic)["norms"]
    counts = Counter(timing["layer"] for timing in timings)
    whole = [timing for timing in timings if counts[timing["layer"]] == max(counts.values())]
    return {
        f"{dtype}, {order.replace('_', ' ')}": [
            t for t in whole if (t["dtype"], t["order"]) == (dtype, order)
        ]
        for dtype, order in product(DTYPES, ORDERS)
    }


def sums(timings: list[dict[str, Any]]) -> dict[str, float]:
    """Return the milliseconds of a model's norms, forward and backward, for each implementation."""
    found = [timing for timing in timings if timing["backward"]]
    return {
        name: sum(LAYERS[timing["layer"]].count * timing["seconds"][name] * 1e3 for timing in found)
        for name in found[0]["seconds"]
    }


def ratios(timings: list[dict[str, Any]], other: str, backward: bool) -> list[float]:
    """Return the time of another implementation over ours, layer by layer."""
    return [t["seconds"][other] / t["seconds"]["ours"] for t in timings if t["backward"] == backward]


def norms_gpu(topic: str) -> str:
    names = ("ours", "native", "autocast native", "frozen BN")
    rows = []
    for name, timings in combinations(topic).items():
        ms = sums(timings)
        over = [ratios(timings, other, backward=True) for other in ("native", "frozen BN")]
        forward = [(t["megabytes"] > LARGE, t["bandwidth"]) for t in timings if not t["backward"]]
        shares = [
            geometric_mean(share for large, share in forward if large == which) for which in (True, False)
        ]
        rows.append(
            [
                name,
                *(f"{ms[key]:.2f}" if key in ms else "" for key in names),
                *(f"{geometric_mean(found):.2f} ({min(found):.2f})" for found in over),
                *(f"{share:.0%}" for share in shares),
            ]
        )
    columns = ("", "ours", "PyTorch's GN", "under autocast", "frozen BN", "GN over ours (least)")
    return markdown((*columns, "frozen BN over ours (least)", "bandwidth, large", "small"), rows)


def norms_cpu() -> str:
    rows = []
    for name, timings in combinations("norms-cpu").items():
        found = [
            ratios(timings, other, backward)
            for backward, other in product((False, True), ("native", "frozen BN"))
        ]
        rows.append(
            [name, *(f"{geometric_mean(some):.2f}" for some in found), f"{min(found[0] + found[2]):.2f}"]
        )
    return markdown(
        ("", "GN fwd", "frozen BN fwd", "GN fwd+bwd", "frozen BN fwd+bwd", "least GN ratio"), rows
    )


def steps(**columns: dict[str, Any]) -> str:
    """Return time and memory of training steps, and in brackets how many times those of frozen BN."""
    names = {"fused GN": "fused GN", "native GN": "PyTorch's GN", "frozen BN": "frozen BN, same heads"}
    rows = []
    for variant, name in names.items():
        row = [name]
        for found in columns.values():
            for key, unit in (("seconds", "ms"), ("megabytes", "GB")):
                own, frozen = (median(found[which][key]) for which in (variant, "frozen BN"))
                text = f"{own * 1e3:.4g}" if unit == "ms" else f"{own / 1e3:.2f}"
                row.append(f"{text} {unit} ({own / frozen:.2f})")
        rows.append(row)
    return markdown(["", *(head for name in columns for head in (name, "peak memory"))], rows)


def families() -> str:
    models = list(load("families").values())
    found = [model for model in models if model["norms"]]
    trained = sum(model["ours"] == "trains" and "aot_eager" in model["compiled"] for model in found)
    left = [sum(m[key] for m in found) for key in ("norms", "opacus_left", "opacus_affine_lost", "timm_left")]
    columns = ("models", "with BatchNorm", "converted whole, train, compile", "norms", "Opacus: norms left")
    return markdown(
        (*columns, "weights lost", "timm: norms left"), [[len(models), len(found), trained, *left]]
    )


def relative_eps() -> str:
    """Return how much an eps, as a part of the expected variance, damps an image of half that variance."""
    factors = [f"{((1 + eps) / (0.5 + eps)) ** 0.5:.2f}" for eps in (0, 0.3, 1)]
    agreements = [
        [value(r["figures"]["calibrated"], "mean") for r in load(topic)["records"] if "CIFAR" in r["what"]]
        for topic in ("classifiers-eps-0", "classifiers")
    ]
    without, whole = (f"{min(found):.2f} to {max(found):.2f}" for found in agreements)
    same = "CIFAR-10's ResNets, one group, calibrated on crops of photos: same answers on other crops"
    rows = [("factor for an image of half the variance", *factors), (same, without, "", whole)]
    return markdown(("", "relative eps 0", "0.3", "1"), rows)


def norm_study() -> str:
    """Return all tables of the study; ``results/norms/tables.md`` holds them."""
    done = load("norms/results")
    return drawn.tables({cell: done[cell.name] for cell in plan(["classifier", "detector"], seeds=3)})


def transfer(study: str) -> str:
    """Return AP by arm, with the differences to others as they are paired; unclear ones in brackets."""
    rows = load("transfer/summary")[study]
    against = list(dict.fromkeys(key for row in rows for key in row if "against " in key and row[key]))
    columns = [
        name for name in ("rate", "iterations", "images", "start", "loss") if any(name in r for r in rows)
    ]
    return markdown(
        ("", *columns, "mask AP", "runs", *against),
        [
            [
                row["arm"],
                *("" if row.get(name) is None else row[name] for name in columns),
                f"{statistics.fmean(row['AP']):.1f}",
                len(row["AP"]),
                *(interval(row.get(key)) for key in against),
            ]
            for row in rows
        ],
    )


def rates(study: str) -> str:
    """Return AP by arm and learning rate, and before training where that was tested."""
    rows = load("transfer/summary")[study]
    rates = sorted({rate for row in rows for rate in row["AP"]}, key=float)
    columns = {rate: [row["AP"].get(rate) for row in rows] for rate in rates}
    if any(row["start"] is not None for row in rows):
        columns = {"start": [row["start"] for row in rows], **columns}
    cells = zip(
        *(["" if ap is None else f"{ap:.1f}" for ap in column] for column in columns.values()), strict=True
    )
    return markdown(("", *columns), [[row["arm"], *own] for row, own in zip(rows, cells, strict=True)])


def first_steps(fold: str) -> str:
    """Return the loss after one step along the mean gradient, as means over the sets of images.

    The last column has the least loss of each set, whatever the step.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for key, row in load("transfer/gradients").items():
        name, _, rest = key.partition(", images ")
        if name == fold:
            found.setdefault(rest.partition(", ")[2], []).append(row)
    steps = list(next(iter(found.values()))[0]["after"])
    rows = []
    for arm, sets in found.items():
        means = [statistics.fmean(row["before"] for row in sets)]
        means += [statistics.fmean(row["after"][step] for row in sets) for step in steps]
        least = ", ".join(f"{min(row['after'].values()):.2f}" for row in sets)
        rows.append([arm, *(f"{mean:.2f}" for mean in means), least])
    return markdown(("", "before", *steps, "least, each set"), rows)


def interval(found: dict[str, Any] | None) -> str:
    """Return a difference with its interval, in brackets if that holds zero."""
    if not found:
        return ""
    text = f"{found['value']:+.1f}, {found['low']:.1f} to {found['high']:.1f}"
    return f"({text})" if found["low"] <= 0 <= found["high"] else text


def by_arm(topic: str) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each arm, one of each seed; none if no training has ended yet."""
    done: dict[str, list[dict[str, Any]]] = {}
    recorded_runs = load(topic) if (RESULTS / f"{topic}.json").exists() else {}
    for key, record in recorded_runs.items():
        done.setdefault(key.rpartition(", seed ")[0], []).append(record)
    return done


def arms(topic: str) -> str:
    """Return AP and cost of each arm of :mod:`benchmarks.systems` or of a study like it, with its runs."""
    rows = []
    for arm, records in by_arm(topic).items():
        costs = [str(show({"runs": [r[name] for r in records]}, "median", d)) for name, d in COSTS.items()]
        for ending, added in (("", ""), ("_TTA", ", test-time augmentation")):
            if f"bbox{ending}" in records[0]:
                runs = [[r[f"{kind}{ending}"] for r in records] for kind in ("bbox", "segm")]
                averages = [show({"runs": values}, "mean", 1) for values in runs]
                rows.append([arm + added, *averages, *(costs if not ending else ["", ""])])
    return markdown(["", "box AP", "mask AP", "s for each iteration", "MiB"], rows)


def classes() -> str:
    """Return mask AP of each arm, of all classes and of each."""
    columns = {"segm": "mask AP", "segm, fluorescent": "fluorescent", "segm, stained": "stained"}
    rows = [
        [arm, *(show({"runs": [record[key] for record in records]}, "mean", 1) for key in columns)]
        for arm, records in by_arm("imbalance").items()
    ]
    return markdown(["", *columns.values()], rows)


def stopping() -> str:
    """Return the iterations that each patience saves, and the AP that it loses of a whole training's best."""
    rows = []
    for patience in (2, 3, 5):
        saved, lost = [], []
        for record in by_arm("stopping").get("long", []):
            curve = record["curve"]
            end = stops_at([ap for _, ap in curve], patience)
            saved.append(curve[-1][0] - curve[end][0])
            lost.append(max(ap for _, ap in curve) - max(ap for _, ap in curve[: end + 1]))
        if saved:
            rows.append([patience, show({"runs": saved}, "mean", 0), show({"runs": lost}, "mean", 1)])
    return markdown(["patience", "iterations saved of 1,500", "best mask AP lost"], rows)


def stops_at(aps: list[float], patience: int) -> int:
    """Return the index of the evaluation after which ``SOLVER.EARLY_STOP`` ends a training."""
    best = 0
    for index, ap in enumerate(aps):
        if ap > aps[best]:
            best = index
        if index - best >= patience:
            return index
    return len(aps) - 1


def peers() -> str:
    """Return time to an AP, final AP and cost of each training of :mod:`benchmarks.peers`."""
    rows = []
    for key, record in load("peers").items():
        found = record["evaluations"]
        times = [time_to(ap, [(row["seconds"], row["segm"]) for row in found]) for ap in (20, 30)]
        name, model, seed = key.split(", ")[0], ", ".join(key.split(", ")[1:-1]), key.rpartition(" ")[2]
        reached = ("not reached" if seconds is None else f"{seconds:.0f}" for seconds in times)
        last = found[-1]
        final = (f"{last[kind]:.1f}" for kind in ("segm", "bbox"))
        total = f"{last['seconds']:.0f} ({last['iteration']})"
        lines = " + ".join(str(count) for count in record["lines"].values() if count)
        rows.append([name, model, seed, *reached, total, *final, record["memory"], lines])
    if not rows:
        return "*No training has been recorded yet.*"
    columns = ("", "model", "seed", "s to 20 mask AP", "s to 30", "s of all (iterations)", "final mask AP")
    return markdown((*columns, "final box AP", "MiB", "lines (script + config)"), rows)


def time_to(ap: float, points: list[tuple[float, float]]) -> float | None:
    """Return the seconds at which the AP is first reached, or None.

    Args:
        ap: percent.
        points: seconds and AP of each evaluation, in order. Between two, and from 0 s with AP 0 to the
            first, the AP is taken as linear.
    """
    for (begin, before), (end, after) in pairwise([(0.0, 0.0), *points]):
        if after >= ap:
            return begin + (end - begin) * (ap - before) / (after - before)
    return None


COSTS = {"seconds": 2, "memory": 0}  # of a training, with their digits

TABLES: dict[str, Callable[[], str]] = {
    "headlines": headlines,
    "detectron2": lambda: recorded("detectron2", ratio=over_detectron2),
    "parts": lambda: recorded("parts"),
    "systems": lambda: arms("systems"),
    "augmentation": lambda: arms("augmentation"),
    "imbalance": classes,
    "freezing": lambda: arms("freezing"),
    "stopping": stopping,
    "peers": peers,
    "norms of 2 images": lambda: norms_gpu("norms-h200"),
    "norms of 1 image": lambda: norms_gpu("norms-h200-1-image"),
    "steps on an H200": lambda: steps(**{dtype: load("steps-h200")[dtype] for dtype in DTYPES}),
    "host of an H200": lambda: recorded("host-h200"),
    "step trace": lambda: recorded("step-trace"),
    "norms on a CPU": norms_cpu,
    "steps on a CPU": lambda: steps(float32=load("norms-cpu")["steps"]),
    "detector": lambda: recorded("detector", mask_AP_kept=kept),
    "transfer causes": lambda: transfer("causes"),
    "rates": lambda: rates("rates"),
    "rates best": lambda: transfer("rates-best"),
    "final": lambda: transfer("final"),
    "pretrained rates": lambda: rates("pretrained-rates"),
    "pretrained best": lambda: transfer("pretrained-best"),
    "pretrained": lambda: transfer("pretrained"),
    "first steps": lambda: first_steps("small1"),
    "first steps, young": lambda: first_steps("young1"),
    "classifiers": lambda: recorded("classifiers"),
    "by rule": lambda: recorded("by-rule"),
    "relative eps": relative_eps,
    "families": families,
    "norm study": lambda: next(part for part in norm_study().split("\n\n") if "detector: mask AP" in part),
    "nuclei": lambda: recorded("nuclei"),
    "own data": lambda: recorded("own-data"),
    "throughput": lambda: recorded("throughput"),
    "memory": lambda: recorded("memory"),
    "tiles": lambda: recorded("tiles"),
    "evaluation": lambda: recorded("evaluation", ratio=lambda record: f"{record['ratio']:.2f}"),
}


def filled(page: str) -> str:
    """Return a page with its tables as they are now."""
    return re.sub(
        r"(<!-- table: ([^\n]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    """Print all tables, or write them into their pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="fill in the pages instead of printing")
    if not parser.parse_args().write:
        for name, table in TABLES.items():
            print(f"## {name}\n{table()}\n")
        return
    for page in PAGES:
        path = REPOSITORY / page
        atomic_write_text(path, filled(path.read_text("utf-8")))


if __name__ == "__main__":
    main()

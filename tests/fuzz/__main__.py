"""``python -m tests.fuzz``: thousands of damaged files of all kinds, with limits of time and memory.

Seconds are those of the processor, so that a busy machine makes no case slow. Every case is a function of its
number, so that ``--only folders --first N --folders 1`` repeats case N.
"""

from __future__ import annotations

import argparse
import sys
import time

from tests.fuzz.kinds import KINDS, NAMED, fuzz
from tests.fuzz.limits import MOST_MEMORY
from tests.fuzz.trial import SECONDS, Tally

NEEDED = 0.95
"""Share of refused cases in which the doctor must name what was damaged."""


def main() -> int:
    """Run, print what happened; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    for kind, (_, count) in KINDS.items():
        parser.add_argument(f"--{kind}", type=int, metavar="N", help=f"cases; {count} by default")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        metavar="KIND",
        help="of the kinds above",
    )
    parser.add_argument("--verbose", action="store_true", help="print each failure whole")
    args = parser.parse_args()
    bad = False
    for kind in args.only:
        count = getattr(args, kind)
        count = KINDS[kind][1] if count is None else count
        begin = time.perf_counter()
        tally = fuzz(kind, range(args.first, args.first + count))
        show(kind, tally, time.perf_counter() - begin, args.verbose)
        bad |= bool(tally.failures or tally.slow or tally.large)
        bad |= kind in NAMED and tally.named < NEEDED * tally.refused
    return int(bad)


def show(kind: str, tally: Tally, seconds: float, verbose: bool) -> None:
    """One line for each place of a traceback, and for whatever else is wrong; the numbers last."""
    for place, labels in sorted(tally.places.items(), key=lambda item: -len(item[1])):
        print(f"  {len(labels)} x {place} [{labels[0]}]")
    traced = {label for labels in tally.places.values() for label in labels}
    for failure in tally.failures:
        if verbose or not any(failure.startswith(label) for label in traced):
            print(f"  {failure if verbose else failure.splitlines()[0]}")
    for line in tally.slow:
        print(f"  over {SECONDS} s: {line}")
    for line in tally.large:
        print(f"  over {MOST_MEMORY >> 30} GB: {line}")
    for line in tally.unnamed if verbose else ():
        print(f"  not named: {line}")
    named = f" (the doctor names {tally.named} of them)" if kind in NAMED else ""
    repaired = f"; {tally.repaired} repaired" if kind == "annotations" else ""
    print(
        f"{kind}: {tally.cases} cases in {seconds:.0f} s: {tally.refused} refused{named}; {tally.passed} used"
        f"{repaired}; {tally.tracebacks} tracebacks, {len(tally.slow)} over {SECONDS} s, "
        f"{len(tally.large)} over {MOST_MEMORY >> 30} GB, {len(tally.failures)} failures in all",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

"""``gn-detect doctor`` from a checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gn_detect.cli import main

    sys.exit(main(["doctor", *sys.argv[1:]]))

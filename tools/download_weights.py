"""``gn-detect zoo download`` from a checkout: ``python tools/download_weights.py R-50-GN``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gn_detect.cli import main

    sys.exit(main(["zoo", "download", *sys.argv[1:]]))

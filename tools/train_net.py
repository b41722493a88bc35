"""``gn-detect train`` from a checkout, with the command line of detectron2's ``tools/train_net.py``."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gn_detect.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

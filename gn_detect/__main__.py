"""``python -m gn_detect``: the same as the command ``gn-detect``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())

"""The paper's claims on real data, at the size of a laptop: see ``benchmarks/norm_study``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    from benchmarks.norm_study.__main__ import main

    main()

"""The scripts of profiling/ are run by path, and import one another by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "profiling"))

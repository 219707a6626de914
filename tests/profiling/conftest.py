"""The scripts of profiling/ are run by path, and import one another by name; so do the examples."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE.parents[1] / "profiling"), str(HERE)]

"""Child processes of these tests import the example by name."""

import os
import sys

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))

"""The stand-in for the hub and the fake xFormers of the core's tests, for Stable Diffusion."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

from toys import xformers  # noqa: F401

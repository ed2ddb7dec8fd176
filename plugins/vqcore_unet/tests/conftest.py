"""Toys and the fake xFormers of the core's tests, for the networks of this plugin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

from toys import tower, toy, xformers  # noqa: F401

"""The toy components and configs of the core's tests, for runs with the networks of this plugin."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "tests"))

from toys import tower, toy  # noqa: F401

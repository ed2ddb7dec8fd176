"""Records some steps of a run: a trace for a trace viewer and a table of the ten dearest operations."""

import contextlib
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vqcore import artefact, dist
from vqcore.console import say

WARMUP = 5
"""Steps before the recorded ones: first allocations and compilations say nothing about a run."""
ROWS = 10


class Profile:
    """Inside the block, `step` counts steps; after the recorded ones `trace.json` and `table.txt` are in the folder."""

    def __init__(self, folder: Path, steps: int | None, device: torch.device):
        self.folder, self.steps, self.done = folder, steps, 0
        self.device = device.type
        self.recorder: profile | None = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def part(self, name: str) -> contextlib.AbstractContextManager[object]:
        """A named part of the step, as it shows in the trace."""
        return record_function(f"vqcore/{name}") if self.recorder else contextlib.nullcontext()

    def step(self) -> None:
        """A step is over."""
        if self.steps is None or not dist.is_main():
            return
        self.done += 1
        if self.done == WARMUP:
            used = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
            self.recorder = profile(activities=used)
            self.recorder.start()
        elif self.done == WARMUP + self.steps:
            self._finish()

    def _finish(self) -> None:
        if self.recorder is None:
            return
        self.recorder.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recorder.export_chrome_trace(str(self.folder / "trace.json"))
        table = self.recorder.key_averages().table(sort_by=f"self_{self.device}_time_total", row_limit=ROWS)
        artefact.write_text(self.folder / "table.txt", table)
        self.recorder = None
        say(f"\n{table}\nprofile        {self.folder} (table.txt, trace.json for a trace viewer)")

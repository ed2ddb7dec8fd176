"""Records some steps of a run: a trace for a trace viewer and a table of the most expensive operations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from vqcore import config, dist
from vqcore.artefacts.folder import write_text
from vqcore.console import say
from vqcore.plugin import hookimpl


class Profile:
    """Records steps on rank 0; `<run.dir>/profile` then holds `trace.json` and `table.txt`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of the profile."""

        steps: int = 10
        """Steps to record."""
        after: int = 5
        """Steps before the recorded ones: first allocations and compilations say nothing about a run."""
        rows: int = 10
        """Operations in the table, the most expensive first."""

        def __post_init__(self) -> None:
            for name, least in (("steps", 1), ("after", 0), ("rows", 1)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def __init__(self, cfg: Config):
        self.cfg, self.done = cfg, 0
        self.device, self.folder = "cpu", Path()
        self.recorder: profile | None = None

    @hookimpl
    def vqcore_run_started(self, run: Any) -> None:
        """Learn where the run is; record at once if no step is to be left out."""
        self.device, self.folder = run.device.type, run.dir / "profile"
        if self.cfg.after == 0:
            self._begin()

    @hookimpl
    def vqcore_step_done(self) -> None:
        """Count a step; begin or end the recording."""
        self.done += 1
        if self.done == self.cfg.after:
            self._begin()
        elif self.done == self.cfg.after + self.cfg.steps:
            self._end()

    @hookimpl
    def vqcore_run_ended(self) -> None:
        """End the recording of a run that was too short for it."""
        self._end()

    def _begin(self) -> None:
        if dist.is_main():
            used = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
            self.recorder = profile(activities=used)
            self.recorder.start()

    def _end(self) -> None:
        if self.recorder is None:
            return
        recorder, self.recorder = self.recorder, None
        recorder.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        recorder.export_chrome_trace(str(self.folder / "trace.json"))
        order = f"self_{self.device}_time_total"
        table = recorder.key_averages().table(sort_by=order, row_limit=self.cfg.rows)
        write_text(self.folder / "table.txt", table)
        say(f"\n{table}\nprofile        {self.folder} (table.txt, trace.json for a trace viewer)")

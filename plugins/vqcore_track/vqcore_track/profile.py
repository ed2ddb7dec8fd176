"""Records some steps of a run: a trace for a trace viewer and a table of the most expensive operations."""

from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from vqcore import config, dist
from vqcore.config import at_least
from vqcore.console import say
from vqcore.files import aside, write_text
from vqcore.plugin import hookimpl
from vqcore.protocols import RunLike


class Profile:
    """Records steps on rank 0; `<run.dir>/profile` then holds `trace.json` and `table.txt`."""

    @dataclass(frozen=True, kw_only=True)
    class Config(config.Config):
        """Settings of the profile."""

        steps: int = 10
        """Steps to record."""
        after: int = 5
        """Steps to skip before the recording: the first steps are slower (they allocate memory and compile)."""
        rows: int = 10
        """Number of operations in the table; the most expensive operation comes first."""

        def __post_init__(self) -> None:
            at_least(self, steps=1, after=0, rows=1)

    def __init__(self, cfg: Config):
        self.cfg, self.done = cfg, 0
        self.device, self.folder = "cpu", Path()
        self.recorder: profile | None = None

    @hookimpl
    def vqcore_run_started(self, run: RunLike) -> None:
        """Note the run's device and folder; begin to record if there is no step to skip."""
        self.device, self.folder = run.device.type, run.dir / "profile"
        if self.cfg.after == 0:
            self._begin()

    @hookimpl
    def vqcore_step_done(self) -> None:
        """Count the step; begin or end the recording."""
        self.done += 1
        if self.done == self.cfg.after:
            self._begin()
        elif self.done == self.cfg.after + self.cfg.steps:
            self._end()

    @hookimpl
    def vqcore_run_ended(self) -> None:
        """End the recording if the run ended before all steps were recorded."""
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
        with aside(self.folder / "trace.json") as temporary:
            recorder.export_chrome_trace(str(temporary))
        order = f"self_{self.device}_time_total"
        table = recorder.key_averages().table(sort_by=order, row_limit=self.cfg.rows)
        write_text(self.folder / "table.txt", table)
        say(f"\n{table}\nprofile        {self.folder} (table.txt, trace.json for a trace viewer)")

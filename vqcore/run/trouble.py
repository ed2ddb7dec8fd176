"""What happens after a bad gradient: stop, leave the step out, or roll back and take other samples."""

from typing import Literal

from vqcore.console import say
from vqcore.errors import RunError
from vqcore.run.folder import log_event
from vqcore.run.state import Run
from vqcore.run.step import Trouble

IN_A_ROW = 20
"""After so many steps left out in a row the run stops."""
ROLLBACKS = 3
"""After so many rollbacks to the same checkpoint the run stops."""


class Troubles:
    """Applies `run.on_nonfinite` and `run.on_explosion`, and counts, so that a run does not repeat itself forever."""

    def __init__(self) -> None:
        self.last, self.in_a_row = -2, 0
        self.rolled_to, self.rollbacks = -1, 0

    def meet(self, run: Run, trouble: Trouble) -> Literal["skip", "rollback"]:
        """Decide what to do, and report it. Raises `RunError` if the run has to stop."""
        if trouble.policy == "fp16":
            return "skip"
        text = f"step {trouble.step + 1}: {trouble.what}"
        where = f"The checkpoints in {run.dir} are unchanged"
        if trouble.policy == "stop":
            log_event(run.dir, run.step, "stopped", detail=trouble.what)
            raise RunError(
                f"{text}. {where}; try a lower optim.lr, run.precision=fp32, or run.on_nonfinite=skip."
            )
        self.in_a_row = self.in_a_row + 1 if trouble.step == self.last + 1 else 1
        self.last = trouble.step
        if self.in_a_row > IN_A_ROW:
            raise RunError(
                f"{text}. The {IN_A_ROW} steps before it were left out as well: the run does not recover. {where}."
            )
        if trouble.policy == "skip":
            run.progress.skipped += 1
            log_event(run.dir, run.step, "skipped", detail=trouble.what)
            say(f"\n{text}. The step is left out.")
            return "skip"
        self._count_rollback(run, text)
        log_event(run.dir, run.step, "rolled back", detail=trouble.what, to=run.progress.saved)
        say(f"\n{text}. Rolled back to step {run.progress.saved}; the samples since then are left out.")
        run.progress.offset += trouble.step + 1 - run.progress.saved
        return "rollback"

    def _count_rollback(self, run: Run, text: str) -> None:
        if run.progress.saved < 0:
            raise RunError(f"{text}. No checkpoint exists to roll back to; try run.on_nonfinite=skip.")
        same = run.progress.saved == self.rolled_to
        self.rolled_to, self.rollbacks = run.progress.saved, self.rollbacks + 1 if same else 1
        if self.rollbacks > ROLLBACKS:
            raise RunError(
                f"{text}. The run has rolled back to step {run.progress.saved} {ROLLBACKS} times already. "
                "Try a lower optim.lr; the run goes on from that step."
            )

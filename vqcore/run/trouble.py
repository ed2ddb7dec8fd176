"""What happens when a step goes wrong: stop, leave the step out, or go back and take other samples."""

from typing import Literal

from vqcore.console import say
from vqcore.errors import RunError
from vqcore.run.folder import log_event
from vqcore.run.state import Run
from vqcore.run.step import Trouble

IN_A_ROW = 20
"""Steps left out one after the other before the run stops: it does not recover."""
ROLLBACKS = 3
"""Times a run rolls back to one and the same checkpoint before it stops."""


class Troubles:
    """Applies the policies, and counts, so that nothing goes on in circles."""

    def __init__(self) -> None:
        self.last, self.in_a_row = -2, 0
        self.rolled_to, self.rollbacks = -1, 0

    def meet(self, run: Run, trouble: Trouble) -> Literal["skip", "rollback"]:
        """Decide; says and records what happened. Raises `RunError` where the run has to stop."""
        if trouble.policy == "fp16":
            return "skip"
        text = f"step {trouble.step + 1}: {trouble.what}"
        where = f"The checkpoints in {run.dir} are as they were"
        if trouble.policy == "stop":
            log_event(run.dir, run.step, "stopped", detail=trouble.what)
            raise RunError(
                f"{text}. {where}; try a lower optim.lr, run.precision=fp32, or run.on_nonfinite=skip."
            )
        self.in_a_row = self.in_a_row + 1 if trouble.step == self.last + 1 else 1
        self.last = trouble.step
        if self.in_a_row > IN_A_ROW:
            raise RunError(
                f"{text}. {IN_A_ROW} steps before it were left out, too: it does not recover. {where}."
            )
        if trouble.policy == "skip":
            run.progress.skipped += 1
            log_event(run.dir, run.step, "skipped", detail=trouble.what)
            say(f"\n{text}. The step is left out.")
            return "skip"
        self._count_rollback(run, text)
        log_event(run.dir, run.step, "rolled back", detail=trouble.what, to=run.progress.saved)
        say(f"\n{text}. Back to step {run.progress.saved}; the samples since then are left out.")
        run.progress.offset += trouble.step + 1 - run.progress.saved
        return "rollback"

    def _count_rollback(self, run: Run, text: str) -> None:
        if run.progress.saved < 0:
            raise RunError(f"{text}. There is no checkpoint to roll back to; try run.on_nonfinite=skip.")
        same = run.progress.saved == self.rolled_to
        self.rolled_to, self.rollbacks = run.progress.saved, self.rollbacks + 1 if same else 1
        if self.rollbacks > ROLLBACKS:
            raise RunError(
                f"{text}. The run has rolled back to step {run.progress.saved} {ROLLBACKS} times already. "
                "Try a lower optim.lr; it goes on from there."
            )

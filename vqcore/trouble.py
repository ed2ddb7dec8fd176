"""What happens when a step goes wrong: stop, leave the step out, or go back and take other samples."""

from typing import TYPE_CHECKING, Literal

from vqcore import runfolder
from vqcore.console import say
from vqcore.errors import RunError

if TYPE_CHECKING:
    from vqcore.trainer import Run

IN_A_ROW = 20
"""Steps left out one after the other before the run stops: it does not recover."""
ROLLBACKS = 3
"""Times a run rolls back to one and the same checkpoint before it stops."""


class Trouble(Exception):
    """A step whose gradient must not be used: where, what is wrong with it, and what the config says to do.

    The policy `fp16` is no trouble at all: the loss was scaled too high.
    """

    def __init__(self, step: int, what: str, policy: Literal["stop", "skip", "rollback", "fp16"]):
        super().__init__(what)
        self.step, self.what, self.policy = step, what, policy


class Troubles:
    """Applies the policies, and counts, so that nothing goes on in circles."""

    def __init__(self) -> None:
        self.last, self.in_a_row = -2, 0
        self.rolled_to, self.rollbacks = -1, 0

    def meet(self, run: "Run", trouble: Trouble) -> Literal["skip", "rollback"]:
        """Decide; says and records what happened. Raises `RunError` where the run has to stop."""
        if trouble.policy == "fp16":
            return "skip"
        text = f"step {trouble.step + 1}: {trouble.what}"
        where = f"The checkpoints in {run.dir} are as they were"
        if trouble.policy == "stop":
            runfolder.log_event(run, "stopped", detail=trouble.what)
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
            run.skipped += 1
            runfolder.log_event(run, "skipped", detail=trouble.what)
            say(f"\n{text}. The step is left out.")
            return "skip"
        self._count_rollback(run, text)
        runfolder.log_event(run, "rolled back", detail=trouble.what, to=run.saved_step)
        say(f"\n{text}. Back to step {run.saved_step}; the samples since then are left out.")
        run.offset += trouble.step + 1 - run.saved_step
        return "rollback"

    def _count_rollback(self, run: "Run", text: str) -> None:
        if run.saved_step < 0:
            raise RunError(f"{text}. There is no checkpoint to roll back to; try run.on_nonfinite=skip.")
        same = run.saved_step == self.rolled_to
        self.rolled_to, self.rollbacks = run.saved_step, self.rollbacks + 1 if same else 1
        if self.rollbacks > ROLLBACKS:
            raise RunError(
                f"{text}. The run has rolled back to step {run.saved_step} {ROLLBACKS} times already. "
                "Try a lower optim.lr; it goes on from there."
            )

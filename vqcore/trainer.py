"""The training loop: load, step, log, evaluate, save. Quantizers that are not trained are fitted instead.

The trainer knows batches, players and steps; the objective knows what a loss is made of. Every random choice follows
from (seed, purpose, step), so a run that was killed and resumed ends with the same bits.
"""

import errno
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from vqcore import dist, pictures
from vqcore.artefacts.resolve import checkpoints
from vqcore.assembly import eval_sizes, pick_device
from vqcore.borrowed import Access
from vqcore.check.checks import cheap
from vqcore.check.findings import settle
from vqcore.console import ProgressLine, in_words, say
from vqcore.data.feed import Feed
from vqcore.errors import ConfigError, RunError, cause, listed
from vqcore.evaluate.baseline import SHARE, Baselines, Source, cache_key, fitted, keep, kept
from vqcore.evaluate.best import direction
from vqcore.evaluate.compare import keys_sha256, protocol
from vqcore.evaluate.measure import Measured, evaluate_data, sample_pictures, sampling_options
from vqcore.evaluate.verdict import is_fitted, verdicts
from vqcore.network import asking
from vqcore.protocols import Batch
from vqcore.registry import registry
from vqcore.run.checkpoints import add_evaluation, is_evaluated, resume, roll_back, save
from vqcore.run.fitting import fit_quantizer
from vqcore.run.folder import check_folder, log_event, log_metrics, opened
from vqcore.run.optim import rate_in_words
from vqcore.run.signals import StopSignals
from vqcore.run.state import Run, build
from vqcore.run.step import Trouble, train_step
from vqcore.run.trouble import Troubles
from vqcore.schema import EmaSection, RunConfig

PICTURE_STEPS = frozenset(m * 10**e for m in (1, 2, 5) for e in range(1, 10))
"""Steps after which `samples/strip.png` gets another row: 10, 20, 50, 100 and so on."""
_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)
"""Errors of a disk that is full or cannot be written."""


def train(config: RunConfig, access: Access | None = None) -> Run:
    """Train to the end; if `run.dir` holds this run already, resume it. A signal ends the run early, after saving."""
    with _built(config, access) as run:
        with dist.together():
            found = cheap(run)
            settle(found)
        with opened(config, run.data):
            resume(run)
            for finding in found if run.step == 0 else ():
                if finding.grade == "warning":
                    log_event(run.dir, 0, "warning", detail=str(finding))
            with _told_of_the_end(run):
                _Loop(run).train()
    return run


def fit(config: RunConfig, access: Access | None = None) -> tuple[Run, dict[str, str]]:
    """Fit the quantizer of a config to its training samples, save and evaluate; returns facts of the fit, too.

    The result is the folder of a run that has made all its steps. Raises `RunError` if it holds a checkpoint already.
    """
    config = replace(config, ema=EmaSection(decay=None))  # nothing is trained, so there is nothing to average
    with _built(config, access) as run:
        if dist.world_size() > 1:
            raise RunError("vqcore fit works in one process: start it without torchrun.")
        if checkpoints(run.dir):
            raise RunError(
                f"run.dir={run.dir} holds a tokenizer already. Choose another run.dir, or remove it."
            )
        loop = _Loop(run)
        facts = fit_quantizer(run)
        settle(cheap(run, trained=False))
        with opened(config, run.data), _told_of_the_end(run):
            run.progress.step = run.steps
            loop.finish(facts)
    return run, facts


@contextmanager
def _built(config: RunConfig, access: Access | None) -> Iterator[Run]:
    """The run of a config with metrics that are ready, in a process group; nothing is written yet."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    device = pick_device(config.run.device)
    with dist.process_group(device), asking(bool(access and access.download)):
        with dist.together():
            check_folder(config)
        run = build(config, device, access)
        with dist.together():
            run.metrics.ready(device)  # what is missing is said before the first step, not after the last
        yield run


@contextmanager
def _told_of_the_end(run: Run) -> Iterator[None]:
    """Keep warnings, explain an error, and tell the hooks of the end of the run."""
    error: BaseException | None = None
    try:
        with _kept_warnings(run):
            yield
    except BaseException as caught:
        error = caught
        _explain(run, caught)
        raise
    finally:
        run.hooks.vqcore_run_ended(run=run, error=error)


class _Loop:
    """Makes the steps of a run that are left, with all that happens between two steps."""

    def __init__(self, run: Run):
        self.run = run
        self.averages, self.troubles = Averages(), Troubles()
        self.began, self.first, self.key = time.monotonic(), run.step, ""

    def train(self) -> None:
        """Make the steps that are left."""
        run, config = self.run, self.run.config
        # A process may end between a checkpoint and its evaluation. Rank 0 alone looks at the disk.
        (unmeasured,) = dist.any_(bool(run.step) and self.due() and dist.is_main() and not is_evaluated(run))
        if run.step >= run.steps and not unmeasured:
            say(
                f"{run.dir}: finished already ({run.step} of {run.steps} steps). Lengthen it with run.steps=N."
            )
            return
        sampling = sampling_options(config, run.tokenizer)
        strip = pictures.Strip(run.dir / "samples", _fixed_samples(run), run.step, sampling)
        run.hooks.vqcore_run_started(run=run)
        rate = rate_in_words(config.optim, run.total_batch)
        say(f"{run.dir}: {run.steps} steps of {run.total_batch} samples, {rate}")
        if unmeasured:
            self.evaluate()
        with (
            StopSignals() as signals,
            Feed(config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed,
            ProgressLine("train", run.steps, done=run.step) as line,
        ):
            clock = time.monotonic()
            while run.step < run.steps:
                try:
                    with record_function("vqcore/load"):  # the ranges are for profilers
                        batches = feed.next(run.step, run.progress.offset)
                    with record_function("vqcore/step"):
                        self.averages.add(train_step(run, batches))
                except Trouble as trouble:
                    if self.troubles.meet(run, trouble) == "rollback":
                        roll_back(run)
                        continue
                run.progress.step += 1
                run.hooks.vqcore_step_done(run=run, step=run.step)
                last = run.step == run.steps
                shown = None
                if last or run.step % config.run.log_every == 0:
                    shown = self.log(feed)
                line.update(run.step, shown)
                overdue = time.monotonic() - clock > (config.run.save_every_seconds or math.inf)
                stop, overdue = dist.any_(bool(signals.received), overdue and dist.is_main())
                if last or stop or overdue or self.saves_now():
                    run.hooks.vqcore_saved(run=run, step=run.step, path=str(save(run)))
                    clock = time.monotonic()
                if last or run.step in PICTURE_STEPS:
                    with run.as_evaluated():
                        row = strip.add(run.tokenizer, run.step)
                    if row is not None:
                        self.pictured("samples", row)
                if self.due():
                    self.evaluate()
                if stop and not last:
                    run.progress.stopped_by = signals.received or "a signal to another process"
                    say(
                        f"\nstopped by {run.progress.stopped_by} after step {run.step}, which is saved; the same "
                        "command resumes the run."
                    )
                    break

    def finish(self, facts: Mapping[str, str]) -> None:
        """What follows the last step, for a run whose quantizer was fitted: save it and evaluate."""
        run = self.run
        run.hooks.vqcore_run_started(run=run)
        log_event(run.dir, run.step, "fitted", **facts)
        run.hooks.vqcore_saved(run=run, step=run.step, path=str(save(run)))
        if run.eval_data is not None:
            self.evaluate()

    def log(self, feed: Feed) -> dict[str, float]:
        """Write this step's line of metrics.jsonl; returns the metrics of this line for the progress line."""
        run = self.run
        shown = self.averages.take() | run.window.metrics(run.step) | feed.bad.metrics()
        if run.progress.skipped:
            shown["skipped_steps"] = float(run.progress.skipped)
        log_metrics(run.dir, run.step, shown)
        if run.step > (run.config.optim.warmup or 0) and (change := run.window.change(shown)):
            event, text = change
            say(f"\nstep {run.step}: {text}")
            log_event(run.dir, run.step, event, detail=text)
        run.hooks.vqcore_step_ended(run=run, step=run.step, metrics=shown)
        return shown

    def baselines(self) -> Baselines:
        """The baselines of an evaluation: the constant; after the last step k-means, if it costs little of the run."""
        run = self.run
        constant = run.constant.everywhere().value()
        if run.step < run.steps:
            return Baselines(constant)
        assert run.eval_data is not None
        here = max(1, run.step - self.first)  # steps that this process has made
        budget = SHARE * (time.monotonic() - self.began) / here * run.steps
        sizes, found = eval_sizes(run.config, run.tokenizer), Baselines(constant)
        with dist.together(), run.as_evaluated():
            if dist.is_main():
                self.key = cache_key(run.tokenizer, run.config, run.eval_data, sizes, run.loans)
                found = kept(run.dir, self.key, constant) or fitted(
                    run.tokenizer,
                    run.config,
                    Source(run.data, run.extra),
                    sizes,
                    constant,
                    budget=budget,
                )
        return dist.from_main(found)

    def tell(
        self,
        measured: Mapping[tuple[int, ...], Measured],
        baselines: Baselines,
        said: Mapping[tuple[int, ...], list[str]],
    ) -> None:
        """Print an evaluation on one line for each size; after the last step also baselines and verdicts."""
        run, last = self.run, self.run.step == self.run.steps
        for size, got in measured.items():
            where = "" if len(measured) == 1 else f" {'x'.join(map(str, size))}"
            say(f"\nstep {run.step}: evaluation{where}  {in_words(got.metrics)}")
            for name, scores in got.baselines.items() if last else ():
                say(f"  {name}  {in_words(scores)}")
            for text in said[size] if last else ():
                say(f"  warning: {text}")
        if last and baselines.note:
            say(f"  {baselines.note}")
        if last and baselines.guesses and dist.is_main():
            keep(run.dir, self.key, baselines.scored({s: got.baselines for s, got in measured.items()}))

    def pictured(self, name: str, path: Path) -> None:
        """Tell the hooks of a picture; rank 0 does, if it could write one."""
        self.run.hooks.vqcore_pictured(run=self.run, step=self.run.step, name=name, path=str(path))

    def due(self) -> bool:
        """Whether the config asks for an evaluation after the present step."""
        run, every = self.run, self.run.config.eval.every
        return run.eval_data is not None and (run.step == run.steps or bool(every and run.step % every == 0))

    def saves_now(self) -> bool:
        """Whether the config asks for a checkpoint now. If the best one counts, every evaluation needs a checkpoint."""
        run = self.run
        return run.step % run.config.run.save_every == 0 or (run.config.eval.best is not None and self.due())

    def evaluate(self) -> None:
        """Evaluate, after the checkpoint of this step was saved: nothing that fails here takes training with it."""
        run = self.run
        baselines = self.baselines()
        measured = evaluate_run(run, baselines)
        sizes = list(measured)
        found = run.progress.evaluation = {
            name: value for size in sizes for name, value in _logged(sizes, size, measured[size]).items()
        }
        log_metrics(run.dir, run.step, found)
        fitted = is_fitted(run.tokenizer)
        said = {size: verdicts(got.metrics, got.baselines, fitted=fitted) for size, got in measured.items()}
        add_evaluation(run, record_of(run, found) | _judged(measured, baselines, said))
        self.tell(measured, baselines, said)
        sampling = sampling_options(run.config, run.tokenizer)
        with run.as_evaluated():
            sheet = pictures.contact_sheet(run.tokenizer, _fixed_samples(run), sampling)
        path = run.dir / "samples" / "sheet.png"
        if sheet is not None and pictures.try_to_save(sheet, path):
            self.pictured("sheet", path)
        run.hooks.vqcore_evaluated(run=run, step=run.step, metrics=found)


def evaluate_run(run: Run, baselines: Baselines | None = None) -> dict[tuple[int, ...], Measured]:
    """The evaluation at each of its sizes, with the running averages if there are any."""
    assert run.eval_data is not None
    baselines, found = baselines or Baselines(), {}
    with run.as_evaluated():
        for size in eval_sizes(run.config, run.tokenizer):
            got = evaluate_data(
                run.tokenizer,
                run.config,
                run.eval_data,
                run.extra,
                size,
                metrics=run.metrics,
                step=run.step,
                baselines=baselines.at(size),
            )
            found[size] = Measured(got.metrics, baselines.joined(size, got.baselines))
    return found


def _logged(sizes: Sequence[tuple[int, ...]], size: tuple[int, ...], got: Measured) -> dict[str, float]:
    """What metrics.jsonl holds of an evaluation. K-means is not among it: time decides whether it is measured."""
    constant = {f"constant/{name}": value for name, value in got.baselines.get("constant", {}).items()}
    return {_prefix(sizes, size) + name: value for name, value in (got.metrics | constant).items()}


def _judged(
    measured: Mapping[tuple[int, ...], Measured],
    baselines: Baselines,
    said: Mapping[tuple[int, ...], list[str]],
) -> dict[str, Any]:
    """What `eval.json` of a checkpoint holds besides the metrics: results by size with their baselines and verdict."""
    results = [
        {
            "size": list(size),
            "metrics": got.metrics,
            "baselines": got.baselines,
            "verdict": said[size],
        }
        for size, got in measured.items()
    ]
    return {"results": results, "kmeans": {**baselines.facts, "note": baselines.note}}


def record_of(run: Run, found: Mapping[str, float]) -> dict[str, Any]:
    """What `eval.json` of a checkpoint holds: the metrics, how they were measured, and the value of `eval.best`."""
    assert run.eval_data is not None
    best, sizes = run.config.eval.best, eval_sizes(run.config, run.tokenizer)
    if best is not None and _prefix(sizes, sizes[0]) + best not in found:
        raise ConfigError(f"eval.best={best}: the evaluation has no such value. It has: {listed(found, 40)}.")
    count = min(len(run.eval_data), run.config.eval.samples or len(run.eval_data))
    # Keys without contents: reading all samples once more would take as long as the evaluation.
    how = protocol(
        run.config,
        run.tokenizer,
        run.metrics,
        loans=run.loans,
        set_hash=keys_sha256(run.eval_data, count),
        total=count,
        count=count,
        sizes=sizes,
    )
    return {
        "step": run.step,
        "best": best,
        "value": None if best is None else found.get(_prefix(sizes, sizes[0]) + best),
        "better": None if best is None else direction(best, run.metrics),
        "protocol": how,
        "metrics": dict(found),
    }


def _prefix(sizes: Sequence[tuple[int, ...]], size: tuple[int, ...]) -> str:
    """What stands before the names of metrics at a size: with several sizes they name the size."""
    return "eval/" if len(sizes) == 1 else f"eval@{'x'.join(map(str, size))}/"


class Averages:
    """Means of metrics since the last `take`, each over the steps that had this metric.

    Tensors stay on their device until `take`: reading a tensor waits for the GPU.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Add the metrics of one step."""
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means over all processes; resets the sums."""
        own = {name: torch.as_tensor(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return {name: float(value) / dist.world_size() for name, value in dist.sum_dicts(own).items()}


class _Keeper(logging.Handler):
    """Makes what plugins warn of in the log an event of the run, so that the report names it."""

    def __init__(self, run: Run):
        super().__init__(logging.WARNING)
        origins = (origin for found in registry().ids().values() for origin in found)
        self.run, self.plugins = run, {origin.module.partition(".")[0] for origin in origins} - {"vqcore"}

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line of events.jsonl."""
        if record.name.partition(".")[0] in self.plugins:
            log_event(self.run.dir, self.run.step, "warning", detail=record.getMessage())


@contextmanager
def _kept_warnings(run: Run) -> Iterator[None]:
    keeper = _Keeper(run)
    logging.getLogger().addHandler(keeper)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(keeper)


def _fixed_samples(run: Run) -> Batch:
    """The samples on the strip and on the contact sheet: evaluation samples, or training samples if there are none."""
    data = run.eval_data if run.eval_data is not None else run.data
    return sample_pictures(run.tokenizer, run.config, data, run.extra)


def _explain(run: Run, error: BaseException) -> None:
    """Raise `RunError` with one clear line if the disk is full or another process has ended; else do nothing."""
    kept = f"The checkpoints are complete up to step {max(run.progress.saved, 0)}"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        raise RunError(
            f"run.dir={run.dir}: the disk takes no more data ({cause(error)}). {kept}: make room, then the same "
            "command resumes the run."
        ) from error
    if dist.world_size() > 1 and isinstance(error, RuntimeError) and "by peer" in str(error):
        raise RunError(
            f"rank {dist.rank()}, step {run.step + 1}: another process of this run has ended; its message stands "
            f"above or in its own log. {kept}: the same command resumes the run; torchrun --max-restarts=3 does so by "
            "itself."
        ) from error

"""The training loop: build, resume, check, then {load, losses, backward, clip, step, average, log, evaluate, save}.

It knows batches, players and steps; what a loss is made of is the objective's business. Every random choice follows
from (seed, purpose, step), so a run that was killed and taken up again ends with the same bits.
"""

import contextlib
import errno
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vqcore import artefact, check, dist, initial, pictures, report, runfolder
from vqcore.assembly import build_extra, check_size, eval_sizes, open_data, pick_device, tokenizer_config_of
from vqcore.console import ProgressLine, command, say
from vqcore.data.loader import sizes
from vqcore.errors import RunError, listed
from vqcore.evaluation import build_metrics, evaluate_data, sample_pictures
from vqcore.feed import Feed
from vqcore.findings import settle
from vqcore.hooks.guarded import GuardedHooks
from vqcore.interrupt import StopSignals
from vqcore.metrics import CodeWindow, learns_codes
from vqcore.optim import Ema, rate_in_words
from vqcore.players import Player
from vqcore.profiling import Profile
from vqcore.protocols import Batch, Data, Modality
from vqcore.registry import registry
from vqcore.rng import derive, sample_generators, seeded
from vqcore.schema import OptimSection, RunConfig
from vqcore.tokenizer import Tokenizer
from vqcore.trouble import Trouble, Troubles

log = logging.getLogger(__name__)
PICTURE_STEPS = frozenset(m * 10**e for m in (1, 2, 5) for e in range(1, 10))
"""Steps after which the strip grows by a row."""


@dataclass
class Run:
    """A run as its hooks may see it.

    `offset` is how far the stream of samples runs ahead of the steps, after rolling back; `skipped` counts steps whose
    update was left out; `stopped_by` names the signal that ended the run early.
    """

    config: RunConfig
    dir: Path
    device: torch.device
    tokenizer: Tokenizer
    data: Data
    extra: dict[str, Modality]
    eval_data: Data | None
    steps: int
    step: int = 0
    players: dict[str, Player] = field(default_factory=dict)
    ema: Ema | None = None
    window: CodeWindow | None = None
    hooks: Any = None
    best_score: float | None = None
    last_evaluation: dict[str, float] = field(default_factory=dict)
    saved_step: int = -1
    skipped: int = 0
    offset: int = 0
    stopped_by: str = ""

    @property
    def objective(self) -> Any:
        """How the tokenizer is trained."""
        return self.tokenizer.objective

    @property
    def seed(self) -> int:
        """Where all randomness begins."""
        return self.config.run.seed

    def player(self, name: str) -> Player:
        """A player by name; built when it is first asked for."""
        if name not in self.players:
            module = self.tokenizer if name == "model" else getattr(self.objective, name)
            self.players[name] = Player(name, module, self)
        return self.players[name]


def train(config: RunConfig) -> Run:
    """Train to the end, taking up the run in `run.dir` if there is one; a signal ends it early, saved."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    device = pick_device(config.run.device)
    with dist.process_group(device):
        with dist.together():
            runfolder.check(config)
        run = build(config, device)
        with dist.together():
            settle(check.cheap(run))
        with runfolder.opened(config):
            runfolder.resume(run)
            error: BaseException | None = None
            try:
                _train(run)
                _write_report(run)
            except BaseException as caught:
                error = caught
                _explain(run, caught)
                raise
            finally:
                run.hooks.vqcore_run_ended(run=run, error=error)
    return run


def build(config: RunConfig, device: torch.device) -> Run:
    """Data, tokenizer and objective of a config; raises what a user can mend before anything is written."""
    with dist.together():
        run = _built(config, device)
    for name in ("model", *run.objective.players(run.steps)):
        run.player(name)  # under DDP all processes meet here
    return run


def _built(config: RunConfig, device: torch.device) -> Run:
    tokenizer_config = tokenizer_config_of(config)
    tokenizer = Tokenizer(tokenizer_config, seed=config.run.seed, fetch=False)
    extra = build_extra(config, tokenizer)
    data, eval_data = open_data(config, tokenizer.modality, extra)
    for size in (*sizes(config.data, tokenizer.spec), *eval_sizes(config, tokenizer)):
        check_size(tokenizer, size)
    build_metrics(config.eval.metrics, tokenizer)
    if not artefact.checkpoints(config.run.folder):
        initial.start_from(tokenizer, config.model)
    if config.model.freeze_enc:
        tokenizer.freeze_encoder()
    tokenizer.to(device)
    with seeded(config.run.seed, "init", "setup"):
        tokenizer.objective.setup(tokenizer)
    steps = config.run.steps or _steps(config, len(data))
    config = replace(config, optim=_in_steps(config, len(data)))
    run = Run(config, config.run.folder, device, tokenizer, data, extra, eval_data, steps)
    run.ema = Ema(tokenizer, config.ema.decay) if config.ema.decay else None
    run.window = CodeWindow(
        tokenizer.codebook_size,
        tokenizer.num_codebooks,
        learned=learns_codes(tokenizer.quantizer),
        tokens=len(data) * math.prod(tokenizer.grid(sizes(config.data, tokenizer.spec)[-1])),
    )
    run.hooks = _hooks(config)
    if config.run.compile:
        for part in (tokenizer.encoder, tokenizer.quantizer, tokenizer.decoder):
            part.compile(dynamic=len(sizes(config.data, tokenizer.spec)) > 1)
    return run


def total_batch(config: RunConfig) -> int:
    """Samples of one optimizer step, over all processes."""
    return config.data.batch_size * config.optim.accumulate * dist.world_size()


def _steps(config: RunConfig, samples: int) -> int:
    assert config.run.epochs is not None
    return max(1, math.ceil(config.run.epochs * samples / total_batch(config)))


def _in_steps(config: RunConfig, samples: int) -> OptimSection:
    """The optimizer's settings with the warm-up in steps."""
    optim = config.optim
    if optim.warmup_epochs is None:
        return optim
    return replace(
        optim, warmup=round(optim.warmup_epochs * samples / total_batch(config)), warmup_epochs=None
    )


def _hooks(config: RunConfig) -> GuardedHooks:
    return GuardedHooks(
        {label: registry().build("hook", cfg, f"hooks.{label}") for label, cfg in config.hooks.items()}
    )


def _train(run: Run) -> None:
    if run.step >= run.steps:
        say(f"{run.dir}: finished already ({run.step} of {run.steps} steps). Lengthen it with run.steps=N.")
        return
    config, strip, averages, troubles = run.config, None, _Averages(), Troubles()
    if dist.is_main():
        strip = pictures.Strip(run.dir / "samples", _fixed_samples(run), run.step)
    run.hooks.vqcore_run_started(run=run)
    batch = total_batch(config)
    say(f"{run.dir}: {run.steps} steps of {batch} samples, {rate_in_words(config.optim, batch)}")
    with (
        StopSignals() as signals,
        Profile(run.dir / "profile", config.run.profile, run.device) as profile,
        Feed(config, run.data, run.tokenizer.modality, run.extra, run.steps) as feed,
        ProgressLine("train", run.steps, done=run.step) as line,
    ):
        clock = time.monotonic()
        while run.step < run.steps:
            try:
                with profile.part("load"):
                    batches = feed.next(run.step, run.offset)
                averages.add(train_step(run, batches))
            except Trouble as trouble:
                if troubles.meet(run, trouble) == "rollback":
                    runfolder.roll_back(run)
                    continue
            run.step += 1
            profile.step()
            last = run.step == run.steps
            shown = None
            if last or run.step % config.run.log_every == 0:
                shown = _log(run, averages, feed)
            line.update(run.step, shown)
            if strip and (last or run.step in PICTURE_STEPS):
                with _as_evaluated(run):
                    strip.add(run.tokenizer, run.step)
                _pictured(run, "samples", run.dir / "samples" / f"step_{run.step}.png")
            overdue = time.monotonic() - clock > (config.run.save_every_seconds or math.inf)
            stop, overdue = dist.any_(bool(signals.received), overdue and dist.is_main())
            if _evaluate_and_save(run, last, overdue or stop):
                clock = time.monotonic()
            if stop and not last:
                run.stopped_by = signals.received or "a signal to another process"
                say(
                    f"\nstopped by {run.stopped_by} after step {run.step}, which is saved; the same command goes on."
                )
                break


def _log(run: Run, averages: "_Averages", feed: Feed) -> dict[str, float]:
    """Write this step's line of metrics.jsonl; what is shown beside the progress."""
    shown = averages.take() | (run.window.figures(run.step) if run.window else {}) | feed.bad.figures()
    if run.skipped:
        shown["skipped_steps"] = float(run.skipped)
    runfolder.log_metrics(run, shown)
    if run.window and (warning := run.window.warning(shown)):
        say(f"\nstep {run.step}: {warning}")
        runfolder.log_event(run, "codebook collapse", detail=warning)
    run.hooks.vqcore_step_ended(run=run, step=run.step, metrics=shown)
    return shown


def _pictured(run: Run, name: str, path: Path) -> None:
    run.hooks.vqcore_pictured(run=run, step=run.step, name=name, path=str(path))


def _evaluate_and_save(run: Run, last: bool, now: bool) -> bool:
    """Evaluate and save where the config (or `now`) asks for it; a new best evaluation is saved in any case."""
    every = run.config.eval.every
    score = None
    if run.eval_data is not None and (last or (every and run.step % every == 0)):
        figures = evaluate_run(run)
        score = figures[next(key for key in figures if key.endswith("/loss"))]
        run.hooks.vqcore_evaluated(run=run, step=run.step, metrics=figures)
    # Decided from what every rank knows, never from the disk, which rank 0 may have changed already.
    is_best = score is not None and (run.best_score is None or score < run.best_score)
    if is_best:
        run.best_score = score
    if not (last or now or is_best or run.step % run.config.run.save_every == 0):
        return False
    with _as_evaluated(run):
        fingerprint = run.tokenizer.fingerprint
    path = runfolder.save(run, score, fingerprint)
    run.saved_step = run.step
    run.hooks.vqcore_saved(run=run, step=run.step, path=str(path))
    return True


def train_step(run: Run, batches: list[Batch]) -> dict[str, float | Tensor]:
    """One optimizer step of every player; returns the figures of this step.

    Raises `Trouble` where a player's gradient is not finite or too long; then that player's step did not happen.
    """
    figures: dict[str, float | Tensor] = {}
    horizon = run.config.optim.horizon or run.steps
    for name in run.objective.players(run.step):
        player = run.player(name)
        before = _Buffers(run) if _may_skip(run, player) else None
        _set_modes(run, name)
        rate = player.schedule(run.step, horizon=horizon, total_batch=total_batch(run.config))
        player.optimizer.zero_grad(set_to_none=True)
        for micro, batch in enumerate(batches):
            for key, value in _backward(run, player, batch, micro, len(batches)).items():
                figures[key] = figures[key] + value / len(batches) if key in figures else value / len(batches)
        player.scaler.unscale_(player.optimizer)
        norm = nn.utils.clip_grad_norm_(player.trained, player.cfg.clip or math.inf)
        trouble = _trouble(run, player, figures, norm, batches)
        if trouble is None:
            player.scaler.step(player.optimizer)
            if name == "model" and run.ema:
                run.ema.update()
        elif before:
            before.restore()
        player.scaler.update()
        _let_learn(run)
        if trouble is not None:
            raise trouble
        suffix = "" if name == "model" else f"/{name}"
        figures |= {f"lr{suffix}": rate, f"grad_norm{suffix}": norm}
        if player.scaler.is_enabled():
            figures[f"loss_scale{suffix}"] = player.scaler.get_scale()
    return figures


def _backward(run: Run, player: Player, batch: Batch, micro: int, parts: int) -> dict[str, float | Tensor]:
    keys = (run.step + run.offset, micro, player.name, dist.rank())
    torch.manual_seed(derive(run.seed, "layers", *keys))  # dropout, and whatever a quantizer draws
    rng = sample_generators(range(len(batch.keys)), run.seed, "objective", *keys)
    synced = micro == parts - 1 or dist.world_size() == 1
    with contextlib.nullcontext() if synced else player.forward.no_sync():  # type: ignore[operator]
        total, out = player.forward(batch.to(run.device), run.step, rng)
        player.scaler.scale(total / parts).backward()
    if player.name == "model" and out.codes is not None and run.window:
        run.window.add(out.codes, run.step)
    suffix = "" if player.name == "model" else f"/{player.name}"
    return {f"loss{suffix}": total.detach(), **{k: v.detach() for k, v in (out.terms | out.metrics).items()}}


def _set_modes(run: Run, playing: str) -> None:
    """Only the player at work learns; the tokenizer's codebook moves only when the tokenizer plays."""
    for name, player in run.players.items():
        player.module.train(name == playing)
        for p in player.trained:
            p.requires_grad_(name == playing)
    run.tokenizer.train(playing == "model")


def _let_learn(run: Run) -> None:
    for player in run.players.values():
        for p in player.trained:
            p.requires_grad_(True)


def _trouble(
    run: Run, player: Player, figures: dict[str, Any], norm: Tensor, batches: list[Batch]
) -> Trouble | None:
    """What is wrong with a gradient, if anything is. Its norm is the same on all ranks, and so is the answer."""
    length, limit = float(norm), player.cfg.max_norm
    if math.isfinite(length) and length <= (limit or math.inf):
        return None
    if player.scaler.is_enabled() and not math.isfinite(length) and player.scaler.get_scale() > 1:
        return Trouble(run.step, "", "fp16")  # the loss scale was too high; it is halved, and that is all
    policy = run.config.run.on_explosion if math.isfinite(length) else run.config.run.on_nonfinite
    broken = [k for k, v in figures.items() if isinstance(v, Tensor) and not bool(torch.isfinite(v).all())]
    keys = [key for batch in batches for key in batch.keys]
    found = dist.gathered((broken, keys) if broken or math.isfinite(length) else ([], []))
    names = sorted({name for names, _ in found for name in names})
    keys = [key for _, keys in found for key in keys] or keys
    if math.isfinite(length):
        what = f"the gradient norm of {player.name}, {length:.3g}, is above optim.max_norm={limit:g}"
    else:
        what = f"{listed(names) or f'the gradient of {player.name}'} is not finite"
    return Trouble(run.step, f"{what} (samples {listed(keys, 4)})", policy)


def _may_skip(run: Run, player: Player) -> bool:
    explodes = player.cfg.max_norm is not None and run.config.run.on_explosion == "skip"
    return explodes or run.config.run.on_nonfinite == "skip"


class _Buffers:
    """The buffers of all modules as they were, for a step that is left out: a codebook learns in the forward pass."""

    def __init__(self, run: Run):
        modules = [run.tokenizer, *(p.module for name, p in run.players.items() if name != "model")]
        self.saved = [(b, b.clone()) for module in modules for b in module.buffers()]

    def restore(self) -> None:
        """Put them back."""
        for buffer, value in self.saved:
            buffer.copy_(value)


class _Averages:
    """Means of figures over the steps that had them, since they were last taken; tensors are read only then."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, figures: dict[str, float | Tensor]) -> None:
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        own = {name: torch.as_tensor(value) / self.counts[name] for name, value in self.sums.items()}
        world = dist.world_size()
        self.sums, self.counts = {}, {}
        return {name: float(value) / world for name, value in dist.sum_dicts(own).items()}


def _fixed_samples(run: Run) -> Batch:
    """What the strip and the contact sheet show: samples to evaluate on, else to train on."""
    data = run.eval_data if run.eval_data is not None else run.data
    return sample_pictures(run.tokenizer, run.config, data, run.extra).to(run.device)


@contextlib.contextmanager
def _as_evaluated(run: Run) -> Iterator[None]:
    """The tokenizer as it will be used: running averages instead of weights, eval mode."""
    was_training = run.tokenizer.training
    run.tokenizer.eval()
    try:
        with run.ema.applied() if run.ema else contextlib.nullcontext():
            yield
    finally:
        run.tokenizer.train(was_training)


def evaluate_run(run: Run) -> dict[str, float]:
    """Figures on the evaluation data, with the running averages if there are any; the contact sheet beside them."""
    figures: dict[str, float] = {}
    sizes = eval_sizes(run.config, run.tokenizer)
    with _as_evaluated(run):
        for size in sizes:
            prefix = "eval/" if len(sizes) == 1 else f"eval@{'x'.join(map(str, size))}/"
            got = evaluate_data(run.tokenizer, run.config, run.eval_data, run.extra, size, step=run.step)
            figures |= {prefix + name: value for name, value in got.items()}
        if dist.is_main():
            shown = pictures.contact_sheet(run.tokenizer, _fixed_samples(run), run.config.eval.refine)
            pictures.save_picture(shown, run.dir / "samples" / "sheet.png")
            _pictured(run, "sheet", run.dir / "samples" / "sheet.png")
    run.last_evaluation = figures
    runfolder.log_metrics(run, figures)
    return figures


def _write_report(run: Run) -> None:
    """The page about the run. It is made of what is on disk already, so that a failure here loses nothing."""
    if dist.is_main() and run.step > 0:
        try:
            report.write(run.dir)
        except Exception as error:  # whatever a plugin's pictures raise: the run itself is done
            log.warning("the report could not be written (%s); try: %s", error, command("report", run.dir))


def _explain(run: Run, error: BaseException) -> None:
    """A disk that takes no more, or another process that died, is no bug of ours."""
    kept = f"Its checkpoints are whole, up to step {max(run.saved_step, 0)}"
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        raise RunError(
            f"run.dir={run.dir} takes no more ({error.strerror}). {kept}: make room, and the same command goes on."
        ) from error
    if dist.world_size() > 1 and isinstance(error, RuntimeError) and "by peer" in str(error):
        raise RunError(
            f"rank {dist.rank()}, step {run.step + 1}: another process of this run is gone; what it said stands "
            f"above or in its own log. {kept}: the same command goes on; torchrun --max-restarts=3 does so by itself."
        ) from error


_NO_ROOM = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS)

"""Checks of the model on one batch: shapes, losses, a step that must lower the loss, the memory of a step."""

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vqcore.check.findings import Finding, Grade
from vqcore.errors import ConfigError, VqcoreError, did_you_mean, listed, reason
from vqcore.evaluate.best import check_best
from vqcore.evaluate.measure import measured
from vqcore.protocols import Batch, Losses, is_denoiser
from vqcore.rng import sample_generators
from vqcore.run.optim import peak_rate
from vqcore.run.players import check_held
from vqcore.run.state import Run
from vqcore.run.step import Trouble, train_step


@torch.no_grad()
def model_findings(run: Run, batch: Batch) -> list[Finding]:
    """Shapes from input to losses, the names in `objective.weights`, and whether every loss is finite."""
    batch = run.tokenizer.prepare(batch, run.extra)
    found: dict[str, Losses] = {}
    for module in run.modules:
        module.eval()
    with _watched(run) as seen:
        for player in run.player_names:
            try:
                with warnings.catch_warnings():  # torch warns of different shapes; a finding says more
                    warnings.filterwarnings("ignore", "Using a target size", UserWarning)
                    found[player] = _losses(run, batch, player)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                what = f"fails on a batch {tuple(batch.x.shape)}: {reason(error)}"
                way = f"Up to there: {seen.way}." if seen.passed else ""
                return [_misshapen(run, batch, seen) or Finding("error", seen.at, what, way)]
    wrong = _misshapen(run, batch, seen) or _unmeasurable(run, batch)
    terms = {name: term for out in found.values() for name, term in out.terms.items()}
    return [
        *([wrong] if wrong else []),
        Finding("note", "model", seen.way),
        *_repeated(found),
        *weight_findings(run, terms),
        *_best_findings(run, found["model"].terms),
    ]


def _repeated(found: Mapping[str, Losses]) -> Iterator[Finding]:
    """An error for each name that two players have: one figure in the log cannot be both."""
    owners: dict[str, str] = {}
    for player, out in found.items():
        for name in (*(f"loss/{name}" for name in out.terms), *(f"metric/{name}" for name in out.metrics)):
            if owners.setdefault(name, player) != player:
                what = f"the players {owners[name]} and {player} both return {name}"
                yield Finding("error", "objective", what, "Give each its own name.")


def _best_findings(run: Run, terms: Iterable[str]) -> list[Finding]:
    """An error if `eval.best` names no metric and no loss."""
    best = run.config.eval.best
    if best is None:
        return []
    try:
        check_best(best, run.metrics, terms)
    except ConfigError as error:
        return [Finding("error", "eval.best", str(error).removeprefix(f"eval.best={best}: "))]
    return []


def _losses(run: Run, batch: Batch, player: str) -> Losses:
    rng = sample_generators(batch.keys, run.seed, "check")
    return run.objective.losses(run.tokenizer, batch, player=player, step=run.steps, rng=rng, shared={})


def _misshapen(run: Run, batch: Batch, seen: "_Seen") -> Finding | None:
    """A finding if the output of a plain decoder has another shape than the data."""
    spec, out = run.tokenizer.spec, seen.outputs.get("decoder")
    if out is None or is_denoiser(run.tokenizer.decoder):
        return None
    wanted = (len(batch.x), spec.out_channels, *batch.x.shape[-spec.rank :])
    if tuple(out) == wanted:
        return None
    where = f"model.decoder ({run.config.model.decoder.name})"
    what = f"its output is {tuple(out)}, but the data needs {wanted} ({seen.way})"
    return Finding(
        "error",
        where,
        what,
        "Check that the decoder enlarges the grid as much as the encoder shrinks the input.",
    )


def _unmeasurable(run: Run, batch: Batch) -> Finding | None:
    """A finding if the first sample cannot be decoded and measured as evaluations will do it."""
    tokenizer, size = run.tokenizer, tuple(batch.x.shape[-run.tokenizer.spec.rank :])
    first = batch.part(slice(1))
    codes = tokenizer.quantize(tokenizer.latents(first.x)).codes
    sampling: dict[str, Any] = {**run.config.eval.sampling}
    brief = copy.copy(tokenizer)
    if is_denoiser(tokenizer.decoder):
        brief.__dict__["decoder"] = _Brief(tokenizer.decoder)
    try:
        x_hat = brief.decode(codes, size=size, extras=first.conditions, **sampling)
    except VqcoreError as error:
        return Finding("error", "eval.sampling", str(error))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        return Finding("error", "objective", f"decoding a sample of size {list(size)} fails: {reason(error)}")
    wanted = (1, tokenizer.spec.out_channels, *size)
    if tuple(x_hat.shape) != wanted:
        what = f"a decoded sample is {tuple(x_hat.shape)}, but the data needs {wanted}"
        return Finding("error", "objective", what)
    try:
        ready = run.metrics.ready(run.device)
    except VqcoreError as error:
        where, _, what = str(error).partition(": ")
        return Finding("error", where, what)
    for label, metric in ready.items():
        try:
            measured(metric, tokenizer, x_hat, first)
        except VqcoreError as error:
            return Finding("error", f"eval.metrics.{label}", str(error))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            return Finding("error", f"eval.metrics.{label}", f"measuring a sample fails: {reason(error)}")
    return None


_CALLS = 2
"""So many calls of a denoiser are made: all steps of a sampler ask alike, and there may be hundreds."""


class _Brief:
    """A denoiser that works for a few calls, and returns the last result again for later ones of the same shape."""

    def __init__(self, net: Any):
        self._net, self._made = net, dict[torch.Size, list[Tensor]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._net, name)

    def __call__(self, x_t: Tensor, *args: Any, **named: Any) -> Tensor:
        made = self._made.setdefault(x_t.shape, [])
        if len(made) < _CALLS:
            made.append(self._net(x_t, *args, **named))
        return made[-1]


def weight_findings(run: Run, terms: dict[str, Tensor]) -> Iterator[Finding]:
    """Weights without a loss, losses that are not finite, and what each contributes at the start."""
    weights = run.config.objective.weights
    for name, weight in weights.items():
        unused = weight == 0 or (isinstance(weight, dict) and not any(weight.values()))
        if name not in terms and not unused:
            what = f"no loss is called '{name}'.{did_you_mean(name, terms)}"
            yield Finding("error", "objective.weights", what, f"Losses: {listed(terms)}.")
    if terms and not any(run.config.objective.weight(name, run.step) for name in terms):
        what = f"at step {run.step} every loss has weight 0, so nothing is learned"
        yield Finding("error", "objective.weights", what, f"Losses: {listed(terms)}.")
    found = {name: float(value) for name, value in terms.items()}
    broken = [name for name, value in found.items() if not math.isfinite(value)]
    if broken:
        what = f"{listed(broken)} is not finite before any training"
        yield Finding("error", "objective", what, "Check the range of the data; try run.precision=fp32.")
    parts = (f"{name} {value:.4g} x {_weight(weights.get(name, 1.0))}" for name, value in found.items())
    yield Finding("note", "objective", f"losses before training: {', '.join(parts)}")


def _weight(weight: float | dict[int, float]) -> str:
    if isinstance(weight, dict):
        steps = sorted(weight)
        return f"({weight[steps[0]]:g} at step {steps[0]} to {weight[steps[-1]]:g} at step {steps[-1]})"
    return f"{weight:g}"


_FACTORS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
"""Shares of the learning rate at which a step is tried, until the loss falls."""
_WARMED = 0.01
"""A warm-up is enough where the loss falls at this share of the rate."""


def learns(run: Run, batch: Batch) -> Iterator[Finding]:
    """One optimizer step on one batch must lower that batch's loss."""
    player, rate = run.player("model"), peak_rate(run.config.optim, run.total_batch)
    batch = run.tokenizer.prepare(batch, run.extra)
    run.tokenizer.train()
    with torch.no_grad():
        player.forward(
            batch, run.steps, _chance(run, batch), {}
        )  # some quantizers begin with the first batch
    total, _ = player.forward(batch, run.steps, _chance(run, batch), {})
    if not total.requires_grad:
        yield Finding(
            "error",
            "objective",
            "the loss depends on no trained parameter",
            "Look for a detach() in the model.",
        )
        return
    player.optimizer.zero_grad(set_to_none=True)
    total.backward()
    still = _still_parts(run)
    before, saved = _loss(run, batch), [p.detach().clone() for p in player.trained]
    gradients = [p.grad for p in player.trained]
    tried: list[float] = []
    for factor in _FACTORS:
        with torch.no_grad():
            for p, value, gradient in zip(player.trained, saved, gradients):
                p.copy_(value)
                p.grad = gradient
        player.optimizer.state.clear()
        for group in player.optimizer.param_groups:
            group["lr"] = rate * factor
        player.optimizer.step()
        tried.append(_loss(run, batch))
        if tried[-1] < before:
            break
    if still:  # a last layer that starts at zero lets no gradient through before the first step
        run.tokenizer.train()
        player.optimizer.zero_grad(set_to_none=True)
        player.forward(batch, run.steps, _chance(run, batch), {})[0].backward()
        for name in sorted(still & _still_parts(run)):
            what = "no loss gives this part a gradient"
            yield Finding("error", f"model.{name}", what, "This part would never learn.")
    yield _learning(run, rate, before, tried)


def _learning(run: Run, rate: float, before: float, tried: list[float]) -> Finding:
    """What the losses `tried` mean; the last one is at the highest rate at which the loss falls, if there is one."""
    told = ", ".join(f"{after:.4g} at a rate of {rate * _FACTORS[i]:.3g}" for i, after in enumerate(tried))
    what = f"one step on one batch takes the loss from {before:.4g} to {told}"
    if not tried[-1] < before:
        return Finding(
            "error",
            "objective",
            what,
            "The gradient does not lower the loss at any rate: check detach(), signs and weights.",
        )
    setting = "optim.lr" if run.config.optim.lr is not None else "optim.base_lr"
    factor, warmup = _FACTORS[len(tried) - 1], run.config.optim.warmup
    if factor == 1:
        return Finding("note", setting, what)
    if factor >= _WARMED and warmup:
        return Finding("note", setting, f"{what}; the warm-up of {warmup} steps begins lower")
    lower = (run.config.optim.lr or run.config.optim.base_lr or 0.0) * factor
    remedy = f"Lower {setting}, e.g. {setting}={lower:.2g}"
    begin = (
        f", or begin with a warm-up, e.g. optim.warmup={max(1, run.steps // 20)}" if factor >= _WARMED else ""
    )
    return Finding("warning", setting, what, f"{remedy}{begin}.")


def _still_parts(run: Run) -> set[str]:
    """The parts in which no trained parameter has a gradient."""
    still = set()
    for name, module in run.tokenizer.named_children():
        own = [p for p in module.parameters() if p.requires_grad]
        if own and not any(p.grad is not None and bool(p.grad.any()) for p in own):
            still.add(name)
    return still


def _loss(run: Run, batch: Batch) -> float:
    run.tokenizer.eval()
    with torch.no_grad():
        return float(run.player("model").forward(batch, run.steps, _chance(run, batch), {})[0])


def _chance(run: Run, batch: Batch) -> list[torch.Generator]:
    return sample_generators(batch.keys, run.seed, "check")


def whole_step(run: Run, batch: Batch) -> Iterator[Finding]:
    """A step of all players; on a GPU its peak memory at the batch size asked for."""
    run.progress.step = max(0, run.steps - 1)  # the last step, at which every player plays
    try:
        train_step(run, [batch] * run.config.optim.accumulate)
        check_held(run.config, run.objective, run.player_names, run.tokenizer, run.held)
    except Trouble as trouble:
        yield _troubled(run, trouble)
        return
    except (VqcoreError, RuntimeError, ValueError) as error:
        yield Finding("error", "objective", f"a training step fails: {reason(error)}")
        return
    if run.device.type == "cuda":
        yield _memory(run, batch)


def _troubled(run: Run, trouble: Trouble) -> Finding:
    """A gradient of the first step that training would not use."""
    if trouble.policy == "fp16":
        return Finding(
            "note", "run.precision", "the first loss scale is too high for fp16; training halves it"
        )
    limit = run.config.optim.max_norm
    if limit is not None and "optim.max_norm" in trouble.what:
        remedy = (
            f"Raise optim.max_norm={limit:g}, which is meant for rare steps, or lower the weights of losses."
        )
        return Finding("error", "optim.max_norm", trouble.what, remedy)
    remedy = "Lower optim.lr or the weights of losses; try run.precision=fp32."
    return Finding("error", "objective", f"in one step {trouble.what}", remedy)


def _memory(run: Run, batch: Batch) -> Finding:
    """Peak memory of a step on the GPU, measured in steps with one and two samples."""
    peaks = []
    try:
        held = torch.cuda.memory_allocated(run.device)
        for samples in (1, 2):
            torch.cuda.reset_peak_memory_stats(run.device)
            train_step(run, [batch.part(slice(samples))] * run.config.optim.accumulate)
            torch.cuda.synchronize(run.device)
            peaks.append(torch.cuda.max_memory_allocated(run.device))
    except torch.OutOfMemoryError as error:
        what = f"two samples do not fit on {run.device}: {reason(error)}"
        return Finding("error", "data.batch_size", what, "Take a smaller model.")
    except (VqcoreError, Trouble, RuntimeError, ValueError) as error:
        what = f"peak memory is not known: a step with one sample fails: {reason(error)}"
        return Finding("note", "data.batch_size", what)
    free = torch.cuda.mem_get_info(run.device)[0] + torch.cuda.memory_reserved(run.device)
    return memory_finding(run.config.data.batch_size, held, (peaks[0], peaks[1]), free, str(run.device))


def memory_finding(count: int, held: int, peaks: tuple[int, int], free: int, device: str) -> Finding:
    """Whether a step with `count` samples fits: `held` bytes before a step, `peaks` with one and two samples."""
    total = peaks[0] + (count - 1) * max(0, peaks[1] - peaks[0])
    what = (
        f"a step with {count} samples needs about {_size(total)}, {_size(held)} of it for weights, averages and "
        f"optimizer; {_size(free)} are free on {device}"
    )
    safe = 0.9 * free  # the allocator keeps holes
    fits = max(0, int((safe - held) / max(1, total - held) * count))
    grade: Grade = "note" if total < safe else "error" if total > free else "warning"
    remedy = (
        f"Set data.batch_size={fits} or less and raise optim.accumulate." if fits else "Take a smaller model."
    )
    return Finding(grade, "data.batch_size", what, "" if grade == "note" else remedy)


class _Seen:
    """The shapes that went through a tokenizer's parts, and the part that is at work."""

    def __init__(self) -> None:
        self.at = "objective"
        self.passed: list[str] = []
        self.outputs: dict[str, tuple[int, ...]] = {}

    @property
    def way(self) -> str:
        """The shapes so far."""
        return " -> ".join(self.passed)


@contextlib.contextmanager
def _watched(run: Run) -> Iterator[_Seen]:
    """Record which part of the tokenizer is at work and the shape that it returns."""
    seen, handles = _Seen(), []
    for name, module in run.tokenizer.named_children():
        cfg = getattr(run.config.model, name, None)
        where = f"model.{name} ({cfg.name})" if cfg is not None else f"model ({name})"
        handles.append(module.register_forward_pre_hook(_entering(seen, name, where)))
        handles.append(module.register_forward_hook(_leaving(seen, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _entering(seen: _Seen, name: str, where: str) -> Callable:
    def enter(module: nn.Module, args: tuple) -> None:
        seen.at = where
        if not seen.passed and args and isinstance(args[0], Tensor):
            seen.passed.append(f"{'z_q' if name == 'decoder' else 'x'} {tuple(args[0].shape)}")

    return enter


def _leaving(seen: _Seen, name: str) -> Callable:
    def leave(module: nn.Module, args: tuple, out: Any) -> None:
        seen.at = "objective"
        made = getattr(out, "codes", out)
        if not isinstance(made, Tensor):
            return
        seen.outputs[name] = tuple(made.shape)
        text = f"{'codes' if hasattr(out, 'codes') else name} {tuple(made.shape)}"
        if text not in seen.passed:
            seen.passed.append(text)

    return leave


def _size(number: int) -> str:
    return f"{number / 2**30:.3g} GiB" if number >= 2**30 else f"{number / 2**20:.3g} MiB"

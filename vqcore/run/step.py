"""One optimizer step of every player, and what can be wrong with a gradient."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqcore import dist
from vqcore.borrowed import own_buffers
from vqcore.errors import PluginLoadError, listed
from vqcore.protocols import Batch, set_modes
from vqcore.rng import derive, sample_generators
from vqcore.run.players import Player
from vqcore.run.state import Run
from vqcore.tokenizer import cells


class Trouble(Exception):
    """A gradient that must not be used: the step, what is wrong, and the policy that the config has for this case.

    The policy `fp16` is not in the config: the loss scale was too high, which is harmless, and the step is left out.
    """

    def __init__(self, step: int, what: str, policy: Literal["stop", "skip", "rollback", "fp16"]):
        super().__init__(what)
        self.step, self.what, self.policy = step, what, policy


def train_step(run: Run, batches: list[Batch]) -> dict[str, float | Tensor]:
    """One optimizer step of every player; returns the metrics of this step.

    Raises `Trouble` if a player's gradient is not finite or too long. Then the optimizer does not change this player.
    """
    metrics: dict[str, float | Tensor] = {}
    horizon = run.config.optim.horizon or run.steps
    names = run.objective.players(run.step)
    prepared: dict[int, Batch] = {}
    shared: list[dict[str, Any]] = [{} for _ in batches]
    for name in names:
        if name not in run.player_names:
            raise PluginLoadError(
                f"objective {run.config.objective.name}: players({run.step}) names '{name}', which the objective did "
                f"not name when it was asked before the run ({listed(run.player_names)})."
            )
        player = run.player(name)
        if player.first is None:
            player.first = run.step
        before = _Buffers(run) if _may_skip(run, player) else None
        _only_learning(run, name)
        rate = player.schedule(run.step, horizon=horizon, total_batch=run.total_batch)
        player.optimizer.zero_grad(set_to_none=True)
        for micro, raw in enumerate(batches):
            batch = prepared.pop(micro, None) or run.tokenizer.prepare(raw, run.extra)
            for key, value in _backward(run, player, batch, micro, len(batches), shared[micro]).items():
                metrics[key] = metrics[key] + value / len(batches) if key in metrics else value / len(batches)
            if name == names[-1]:
                shared[micro] = {}
            else:
                prepared[micro], shared[micro] = batch, detached(shared[micro])
        player.scaler.unscale_(player.optimizer)
        norm = nn.utils.clip_grad_norm_(player.trained, player.cfg.clip or math.inf)
        trouble = _trouble(run, player, metrics, norm, batches)
        if trouble is None:
            player.scaler.step(player.optimizer)
            if name == "model" and run.ema:
                run.ema.update()
        elif before:
            before.restore()
        player.scaler.update()
        _all_learning(run)
        # Running statistics: a checkpoint has those of rank 0, and a resumed run must go on with the same bits.
        dist.broadcast_(run.statistics)
        if trouble is not None:
            raise trouble
        metrics |= {f"lr{player.suffix}": rate, f"grad_norm{player.suffix}": norm}
        if player.scaler.is_enabled():
            metrics[f"loss_scale{player.suffix}"] = player.scaler.get_scale()
    return metrics


def _backward(
    run: Run, player: Player, batch: Batch, micro: int, parts: int, shared: dict[str, Any]
) -> dict[str, float | Tensor]:
    """Add the gradient of batch number `micro` of the `parts` batches of a step; returns the losses and metrics."""
    place = (run.step + run.progress.offset, micro)
    torch.manual_seed(derive(run.seed, "layers", *place, player.name, dist.rank()))  # dropout and quantizers
    # The same generators for every player: one that needs what the model makes of this batch can compute it alone. They
    # follow from a sample's place in the step, so that ranks and micro-batches draw what one large batch would draw.
    first = (micro * dist.world_size() + dist.rank()) * len(batch.keys)
    rng = sample_generators(range(first, first + len(batch.keys)), run.seed, "objective", place[0], "model")
    synced = micro == parts - 1 or dist.world_size() == 1
    with contextlib.nullcontext() if synced else player.forward.no_sync():  # type: ignore[operator]
        total, out = player.forward(batch, run.step, rng, shared)
        player.scaler.scale(total / parts).backward()
    if player.name == "model" and out.codes is not None:
        valid = None if batch.valid is None else cells(batch.valid, out.codes.shape[1:-1])
        run.window.add(out.codes, run.step, valid=valid)
    if player.name == "model":
        run.constant.add(batch)
    found = {f"loss{player.suffix}": total} | {f"loss/{name}": term for name, term in out.terms.items()}
    found |= {f"factor/{name}": torch.as_tensor(factor) for name, factor in out.factors.items()}
    found |= {f"metric/{name}": value for name, value in out.metrics.items()}
    return {name: value.detach() for name, value in found.items()}


def detached(value: Any) -> Any:
    """The value with every tensor in it detached, also in mappings, lists, tuples and dataclasses."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: detached(inner) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(detached(inner) for inner in value))
    if isinstance(value, (list, tuple)):
        return type(value)(detached(inner) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {f.name: detached(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **changed)
    return value


def _only_learning(run: Run, playing: str) -> None:
    """Let the player `playing` learn and no other. In eval mode the codebook of the tokenizer does not change."""
    if isinstance(run.objective, nn.Module):
        run.objective.train(playing == "model")
    # The player at work comes last: it may share modules with another one.
    for name in sorted(run.players, key=lambda name: name == playing):
        player = run.players[name]
        player.module.train(name == playing)
        for p in player.trained:
            p.requires_grad_(name == playing)
    set_modes(run.objective, playing)


def _all_learning(run: Run) -> None:
    for player in run.players.values():
        for p in player.trained:
            p.requires_grad_(True)


def _trouble(
    run: Run, player: Player, metrics: dict[str, Any], norm: Tensor, batches: list[Batch]
) -> Trouble | None:
    """What is wrong with a gradient, or None. All ranks have the same norm, so all ranks have the same answer."""
    length, limit = float(norm), player.cfg.max_norm
    if math.isfinite(length) and length <= (limit or math.inf):
        return None
    if player.scaler.is_enabled() and not math.isfinite(length) and player.scaler.get_scale() > 1:
        return Trouble(run.step, "", "fp16")  # the scaler halves its scale, and nothing else happens
    policy = run.config.run.on_explosion if math.isfinite(length) else run.config.run.on_nonfinite
    broken = [k for k, v in metrics.items() if isinstance(v, Tensor) and not bool(torch.isfinite(v).all())]
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
    """A copy of all buffers, for a step that is left out: a codebook changes in the forward pass already."""

    def __init__(self, run: Run):
        moving = {id(b): b for b in (*own_buffers(run.tokenizer.get_submodule("quantizer")), *run.statistics)}
        self.saved = [(b, b.clone()) for b in moving.values()]

    def restore(self) -> None:
        """Set the buffers back to the copy."""
        for buffer, value in self.saved:
            buffer.copy_(value)

"""The laws of schedulers, objectives, hooks and formats."""

import copy
import inspect
import json
import re
import tempfile
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pluggy
import torch
from torch import Tensor, nn

from vqcore.artefacts.formats import PICKLES
from vqcore.compose.build import from_tree
from vqcore.diffusion import coefficients
from vqcore.errors import CheckpointError, ConfigError, VqcoreError
from vqcore.plugin import RunHooks
from vqcore.protocols import (
    Batch,
    Foreign,
    ForeignConfig,
    KnowsFamilies,
    Objective,
    Published,
    Publishes,
    ReadsConfigs,
    ReadsTokenizers,
    config_reader,
    explained,
    is_denoiser,
    knows_families,
    time,
    tokenizer_reader,
    tokenizer_writer,
)
from vqcore.rng import generator, sample_generators
from vqcore.run.players import heads, held
from vqcore.run.step import detached
from vqcore.sampling import UNSTATED, options, resolved
from vqcore.schema import ObjectiveConfig, RunConfig
from vqcore.testing.basics import (
    check_gradients,
    check_members,
    check_waived,
    close,
    finite,
    noise,
    same_state,
    state_of,
)
from vqcore.tokenizer import Tokenizer

SCHEDULER_WAIVABLE = ("affine", "walk")
"""Laws that can be waived: a scheduler may not mix x and noise linearly."""
OBJECTIVE_WAIVABLE = ("deterministic",)
"""Laws that can be waived: an objective may have own layers that draw random numbers."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check_scheduler(
    scheduler: Any, *, steps: int = 10, tolerance: float = 0.05, waived: Mapping[str, str] | None = None
) -> None:
    """The laws of a scheduler; a walk of `steps` steps with perfect predictions ends at x, up to `tolerance`.

    `waived` maps laws of `SCHEDULER_WAIVABLE` that the scheduler does not follow to the reason.
    """
    waived = check_waived(waived, SCHEDULER_WAIVABLE)
    check_members("scheduler", scheduler)
    assert scheduler.num_steps >= 1, f"steps law: num_steps is {scheduler.num_steps}"
    x, eps = noise(4, 3, 5, seed=1), noise(4, 3, 5, seed=2)
    t = _check_time(scheduler, torch.linspace(0, 1, 4))
    for name in ("add_noise", "target"):
        _check_pure(getattr(scheduler, name), name, x, eps, t)
    one, its_eps = (
        x[:1].expand_as(x),
        eps[:1].expand_as(eps),
    )  # of one sample: others may lie farther from their noise
    distances = (scheduler.add_noise(one, its_eps, t) - one).flatten(1).norm(dim=1)
    assert bool((distances.diff() > 0).all()), (
        f"noise law: the distance to x does not grow with t: {[round(float(d), 3) for d in distances]}"
    )
    if "affine" not in waived:
        _check_affine(scheduler, x, eps, t)
    _check_sampler(scheduler, steps)
    if "walk" not in waived:
        end = _walk(scheduler, x, eps, steps)
        close(
            end,
            x,
            "walk law: with perfect predictions the walk does not end at x, but differs",
            share=tolerance,
        )


def _check_time(scheduler: Any, u: Tensor) -> Tensor:
    """The noise levels of four numbers in [0, 1]: monotone, inside the range, one for each number."""
    many = torch.cat([u, torch.linspace(0, 1, 33)])
    t = time(scheduler, many.clone())
    assert t.shape == many.shape, f"time law: {len(many)} numbers have {tuple(t.shape)} noise levels"
    finite(t, "time")
    inside = bool((t >= 0).all()) and bool((t <= scheduler.num_steps).all())
    assert inside, (
        f"time law: noise levels run from {float(t.min()):g} to {float(t.max()):g}, not inside "
        f"[0, num_steps={scheduler.num_steps}]"
    )
    assert bool((t[len(u) :].diff() >= 0).all()), "time law: a larger u has a smaller noise level"
    return t[: len(u)]


def _check_affine(scheduler: Any, x: Tensor, eps: Tensor, t: Tensor) -> None:
    """`add_noise` is a x + b eps and `target` is c x + d eps, with numbers that depend on t alone."""
    try:
        numbers = [each.float().view(-1, *[1] * (x.ndim - 1)) for each in coefficients(scheduler, t, x.ndim)]
    except ValueError as error:
        raise AssertionError(f"affine law: {error}") from error
    for name, (of_x, of_eps) in (("add_noise", numbers[:2]), ("target", numbers[2:])):
        close(
            getattr(scheduler, name)(x, eps, t),
            of_x * x + of_eps * eps,
            f"affine law: {name} is not a share of x and a share of eps, which depend on t alone, but differs",
        )


def _check_pure(function: Any, name: str, x: Tensor, eps: Tensor, t: Tensor) -> None:
    given = x.clone(), eps.clone(), t.clone()
    y = function(x, eps, t)
    assert y.shape == x.shape, f"shape law: {name} gives {tuple(y.shape)}, not {tuple(x.shape)}"
    finite(y, name)
    assert torch.equal(function(x, eps, t), y), f"purity law: two calls of {name} differ"
    unchanged = all(torch.equal(a, b) for a, b in zip(given, (x, eps, t)))
    assert unchanged, f"purity law: {name} changes its input"
    alone = torch.cat([function(x[i : i + 1], eps[i : i + 1], t[i : i + 1]) for i in range(len(x))])
    close(alone, y, f"batch law: {name} of a sample changes in a batch")
    whole = t.floor()
    close(
        function(x, eps, whole.float()),
        function(x, eps, whole.long()),
        f"time law: {name} takes t as integer and as float, but the two results differ",
    )


def _check_sampler(scheduler: Any, steps: int) -> None:
    times = [float(t) for t in scheduler.sampler(steps).timesteps]
    assert times, "timesteps law: there are no time steps"
    falling = times == sorted(times, reverse=True)
    inside = times[-1] >= 0 and times[0] <= scheduler.num_steps
    assert falling and inside, (
        f"timesteps law: {times} do not fall from at most num_steps={scheduler.num_steps} to 0"
    )
    x, prediction = noise(3, 2, 4, seed=3), noise(3, 2, 4, seed=4)

    def walk(rows: slice) -> Tensor:
        sampler, y = scheduler.sampler(steps), x[rows]
        rng = [generator(i, "check") for i in range(3)[rows]]
        for t in sampler.timesteps:
            y = sampler.step(prediction[rows], t, y, rng)
        return y

    whole = walk(slice(0, 3))
    finite(whole, "a walk with any predictions")
    assert torch.equal(walk(slice(0, 3)), whole), (
        "determinism law: two samplers with equal generators have different ends: state is shared, or rng is not used"
    )
    alone = torch.cat([walk(slice(i, i + 1)) for i in range(3)])
    close(alone, whole, "batch law: a sample's walk changes in a batch")


def _walk(scheduler: Any, x: Tensor, eps: Tensor, steps: int) -> Tensor:
    """A walk from noise to x; each step gets the target that a perfect network would predict."""
    sampler = scheduler.sampler(steps)
    rng = [generator(i, "check") for i in range(len(x))]

    def share(which: Tensor, t: Tensor) -> Tensor:
        return scheduler.add_noise(which, 1 - which, t)

    def times_of(t: Any) -> Tensor:
        return torch.full((len(x),), t, dtype=torch.float32 if float(t) % 1 else torch.int64)

    y = scheduler.add_noise(x, eps, times_of(sampler.timesteps[0]))
    for t in sampler.timesteps:
        times = times_of(t)
        signal, spread = share(torch.ones_like(x), times), share(torch.zeros_like(x), times)
        rest = (y - signal * x) / spread.clamp(min=1e-6)
        y = sampler.step(scheduler.target(x, rest, times), t, y, rng)
    return y


def check_objective(
    objective: Any, tokenizer: Tokenizer, batch: Batch, *, waived: Mapping[str, str] | None = None
) -> None:
    """The laws of an objective with a tokenizer that it can train, on a batch of at least two samples.

    `waived` maps laws of `OBJECTIVE_WAIVABLE` that the objective does not follow to the reason.
    """
    waived = check_waived(waived, OBJECTIVE_WAIVABLE)
    check_members("objective", objective)
    objective, tokenizer = copy.deepcopy(objective), copy.deepcopy(tokenizer)
    torch.manual_seed(0)
    objective.setup(tokenizer)
    asked = {name for step in (0, 1, 10**6) for name in objective.players(step) if hasattr(objective, name)}
    state = held(objective, asked, tokenizer).keys()
    if is_denoiser(tokenizer.decoder):
        tokenizer.decoder.register_forward_pre_hook(_check_level, with_kwargs=True)
    names = dict.fromkeys(name for step in (0, 1, 10**6) for name in objective.players(step))
    assert "model" in names, (
        f"players law: the players {list(names)} never train the tokenizer, the player 'model'"
    )
    players: dict[str, Any] = {
        name: tokenizer if name == "model" else getattr(objective, name, None) for name in names
    }
    strange = [name for name, player in players.items() if not isinstance(player, nn.Module)]
    assert not strange, f"players law: the objective has no module with the player's name '{strange[0]}'"
    modules = _modules(objective, tokenizer)
    assert not any(inner is tokenizer for module in modules[1:] for inner in module.modules()), (
        "state law: the objective keeps the tokenizer as a submodule; its state would be saved twice"
    )
    for name, player in players.items():
        _check_player(objective, tokenizer, batch, name, player, modules, waived)
    _check_heads(objective, tokenizer, batch, tuple(names), modules)
    _check_shared(objective, tokenizer, batch, tuple(names), modules)
    late = held(objective, asked, tokenizer).keys() ^ state
    assert not late, (
        f"state law: {sorted(late)[0]} came or went after setup; a checkpoint could not be resumed"
    )
    _check_options(type(objective))
    _check_decode(objective, tokenizer, batch, modules)


def _check_level(denoiser: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """A denoiser is called with one noise level per sample, as float."""
    given = inspect.signature(denoiser.forward).bind(*args, **named).args
    x_t, t = given[:2]
    assert t.shape == (len(x_t),), (
        f"time law: a denoiser gets t of shape {tuple(t.shape)} for {len(x_t)} samples"
    )
    assert t.is_floating_point(), f"time law: a denoiser gets t as {t.dtype}; cast it to float"


def _modules(objective: Any, tokenizer: Tokenizer) -> list[nn.Module]:
    held = [objective] if isinstance(objective, nn.Module) else list(vars(objective).values())
    return [tokenizer, *[module for module in held if isinstance(module, nn.Module)]]


def _check_player(
    objective: Objective,
    tokenizer: Tokenizer,
    batch: Batch,
    name: str,
    player: nn.Module,
    modules: list[nn.Module],
    waived: Mapping[str, str],
) -> None:
    def losses(step: int, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        rng = sample_generators(batch.keys, 0, "check")
        return objective.losses(tokenizer, batch, player=name, step=step, rng=rng, shared={})

    steps = [step for step in (0, 1, 10**6) if name in objective.players(step)]
    for module in modules:
        module.train()
    out = losses(steps[0])
    _check_terms(out, name)
    player.zero_grad()
    torch.stack([torch.as_tensor(term) for term in out.terms.values()]).sum().backward()
    check_gradients(player)
    late = losses(steps[-1])
    for module in modules:
        module.eval()
    before = [state_of(module) for module in modules]
    with torch.no_grad():
        quiet = losses(steps[0])
        for step in steps[1:]:
            other = losses(step)
            assert set(other.terms) == set(quiet.terms), (
                f"names law: in eval mode {name} has {sorted(quiet.terms)}, but {sorted(other.terms)} at another step"
            )
        _check_trained(out, late, quiet, name, tokenizer.cfg.objective, steps[-1])
        if "deterministic" not in waived:
            again = losses(steps[0], seed=1).terms
            same = all(torch.equal(again[key], value) for key, value in quiet.terms.items())
            assert same, (
                f"determinism law: losses of {name} have another source of randomness than rng (in eval mode)"
            )
    for old, module in zip(before, modules):
        same_state(old, state_of(module), "eval changes no state")


def _check_trained(early: Any, late: Any, quiet: Any, name: str, cfg: ObjectiveConfig, step: int) -> None:
    """The names of losses in training are those in eval mode; a loss may wait for its start, or for its weight."""
    for found in (early, late):
        assert set(found.terms) <= set(quiet.terms), (
            f"names law: {name} has {sorted(found.terms)} in training, {sorted(quiet.terms)} in eval mode"
        )
    lacks = [key for key in quiet.terms if key not in late.terms and cfg.weight(key, step)]
    assert not lacks, f"names law: {name} never has the loss {lacks[0]} in training, but its weight is not 0"


def _check_heads(
    objective: Any, tokenizer: Tokenizer, batch: Batch, names: tuple[str, ...], modules: list[nn.Module]
) -> None:
    """Parameters of the objective that belong to no player learn from the losses of `model`."""
    learning = heads(objective, names, tokenizer)
    if not learning:
        return
    for module in modules:
        module.train()
    rng = sample_generators(batch.keys, 0, "check")
    out = objective.losses(tokenizer, batch, player="model", step=10**6, rng=rng, shared={})
    total = torch.stack([torch.as_tensor(term) for term in out.terms.values()]).sum()
    slopes = torch.autograd.grad(total, list(learning.values()), allow_unused=True)
    for name, slope in zip(learning, slopes):
        assert slope is not None, (
            f"gradient law: no gradient of the losses of model reaches '{name}' of the objective, a head of no player"
        )


def _check_shared(
    objective: Any, tokenizer: Tokenizer, batch: Batch, names: tuple[str, ...], modules: list[nn.Module]
) -> None:
    """A player's losses are the same with what the turns of the others left in `shared`, and with nothing there."""
    for module in modules:
        module.eval()

    def losses(name: str, shared: dict[str, Any]) -> Any:
        rng = sample_generators(batch.keys, 0, "check")
        with torch.no_grad():
            return objective.losses(tokenizer, batch, player=name, step=10**6, rng=rng, shared=shared).terms

    owners: dict[str, str] = {}
    for name in names:
        alone, shared = losses(name, {}), dict[str, Any]()
        for key in alone:
            owner = owners.setdefault(key, name)
            assert owner == name, f"names law: the players {owner} and {name} both return {key}"
        for other in names:
            if other != name:
                losses(other, shared)
                shared = detached(shared)
        for key, value in losses(name, shared).items():
            off = float((value - alone[key]).abs())
            assert off <= 1e-4 * max(1.0, float(alone[key].abs())), (
                f"shared law: {key} of {name} differs by {off:.2g} if the other players had their turns before"
            )


def _check_terms(out: Any, name: str) -> None:
    assert out.terms, f"names law: {name} has no losses"
    strange = [key for key in out.factors if key not in out.terms]
    assert not strange, f"names law: the factor {strange[:1]} belongs to no loss of {name}"
    for key, factor in out.factors.items():
        value = torch.as_tensor(factor)
        assert value.ndim == 0 and not value.requires_grad, f"names law: the factor {key} is no plain scalar"
    for key, value in out.terms.items():
        assert value.ndim == 0, f"names law: {key} is not a scalar but of shape {tuple(value.shape)}"
        finite(value, key)
    for key, value in out.metrics.items():
        assert value.ndim == 0, f"names law: the metric {key} is not a scalar"


def _check_options(objective_cls: type) -> None:
    """Every sampling option has a type that a config can hold, a default of this type and a text."""
    for option in options(objective_cls):
        how = f'write {option.name}: Annotated[int, "What it does."] = 25'
        where = f"options law: decode's option {option.name}"
        taken = option.name in inspect.signature(Tokenizer.decode).parameters
        assert not taken, f"{where} has the name of a parameter of Tokenizer.decode; choose another name"
        assert option.type is not UNSTATED, f"{where} has no type; {how}"
        united = typing.get_origin(option.type) in (typing.Union, types.UnionType)
        for one in typing.get_args(option.type) if united else (option.type,):
            fits = one in (int, float, bool, str, type(None)) or typing.get_origin(one) is Literal
            assert fits, (
                f"{where} is {option.type_text}; an option is int, float, bool, str, Literal, or one of these or None"
            )
        assert option.default is not UNSTATED, f"{where} has no default; {how}"
        assert option.text, f"{where} has no text; {how}"
    try:
        resolved(objective_cls, {one.name: one.default for one in options(objective_cls)}, "options law")
    except ConfigError as error:
        raise AssertionError(f"{error} This is the option's default.") from error


def _check_decode(objective: Objective, tokenizer: Tokenizer, batch: Batch, modules: list[nn.Module]) -> None:
    spec = tokenizer.spec
    size = tuple(batch.x.shape[-spec.rank :])
    codes = tokenizer.encode(batch.x)
    before = [state_of(module) for module in modules]
    chosen = resolved(type(objective), {}, "options law")

    def decode(rows: slice, seed: int = 0) -> Tensor:
        torch.manual_seed(seed)
        rng = sample_generators(batch.keys[rows], 0, "check")
        extras = batch.part(rows).conditions
        with torch.no_grad():
            return objective.decode(tokenizer, codes[rows], size=size, rng=rng, extras=extras, **chosen)

    every = slice(0, len(codes))
    x_hat, wanted = decode(every), (len(codes), spec.out_channels, *size)
    assert tuple(x_hat.shape) == wanted, f"shape law: decode gives {tuple(x_hat.shape)}, not {wanted}"
    finite(x_hat, "decode")
    assert torch.equal(decode(every, seed=1), x_hat), (
        "determinism law: decode has another source of randomness than rng"
    )
    alone = torch.cat([decode(slice(i, i + 1)) for i in range(len(codes))])
    close(alone, x_hat, "batch law: decoding a sample changes in a batch", share=1e-3)
    for old, module in zip(before, modules):
        same_state(old, state_of(module), "decode changes no state")


def check_hook(hook: Any) -> None:
    """A hook has known methods with known arguments, each with `@hookimpl`. Takes an object or its class."""
    target = object.__new__(hook) if isinstance(hook, type) else hook
    known = [name for name in vars(RunHooks) if name.startswith("vqcore_")]
    manager = pluggy.PluginManager("vqcore")
    manager.add_hookspecs(RunHooks)
    try:
        manager.register(target)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise AssertionError(f"hook law: {error}. Known: {', '.join(known)}") from error
    heard = {caller.name for caller in manager.get_hookcallers(target) or ()}
    silent = [name for name in dir(type(target)) if name.startswith("vqcore_") and name not in heard]
    assert not silent, f"hook law: {silent[0]} is never called; put @hookimpl above it"
    assert heard, (
        f"hook law: {type(target).__name__} has no method that a run calls. Known: {', '.join(known)}"
    )


def check_observer(run: RunConfig, hooks: Mapping[str, Any]) -> None:
    """Training with these hooks (configs by label) gives the same weights and metrics as training without them.

    Both runs write into temporary folders. A hook must not raise.
    """
    from vqcore.trainer import train

    ends = []
    with tempfile.TemporaryDirectory() as folder:
        for name, observers in (("plain", {}), ("watched", dict(hooks))):
            section = replace(run.run, dir=str(Path(folder) / name))
            made = train(replace(run, run=section, hooks=observers))
            assert not made.hooks.off, f"hook law: {next(iter(made.hooks.off.values()))}"
            ends.append((state_of(made.tokenizer), made.progress.evaluation))
    (plain, figures), (watched, other) = ends
    same_state(plain, watched, "a run ends with other weights with the hook")
    assert figures.keys() == other.keys(), "hook law: a run has other metrics with the hook"


def check_format(format_: Any, path: Path, *, config: Path | None = None) -> None:
    """The laws of a format on a small file or folder that it reads as a tokenizer.

    `config` is a training config that it reads as a config; by default `path`, if the format reads nothing else.
    """
    check_members("format", format_)
    reader, configs = tokenizer_reader(format_), config_reader(format_)
    config = path if reader is None else config
    for sample in (path, config):
        if sample is not None:
            assert format_.recognises(sample) is True, (
                f"recognition law: the format does not recognise {sample.name}"
            )
    absent = Path(f"{path.parent}/nothing-there.unknown")
    try:
        found = format_.recognises(absent)
    except Exception as error:
        raise AssertionError(
            f"recognition law: {type(error).__name__} for a path that does not exist: {error}"
        ) from error
    assert found is False, f"recognition law: the format recognises {absent.name}, a file of no format"
    _check_published(format_)
    if (knows := knows_families(format_)) is not None:
        _check_families(knows)
    if reader is not None:
        _check_reading(format_, reader, path)
    if configs is not None and config is not None:
        _check_config(configs, config)


def _check_reading(format_: Any, reader: ReadsTokenizers, path: Path) -> None:
    read = reader.read(path, allow_pickle=True)
    again = reader.read(path, allow_pickle=True)
    tokenizer = _filled(read, path)
    other = _filled(again, path, seed=1)
    assert tokenizer.fingerprint == other.fingerprint, (
        "determinism law: two readings have different fingerprints"
    )
    assert _is_plain(read.origin), f"origin law: origin is not plain JSON data with text keys: {read.origin}"
    _check_damaged(lambda each: reader.read(each, allow_pickle=True), path)
    files = [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]
    if any(each.suffix in PICKLES for each in files):
        _refuses(lambda: reader.read(path, allow_pickle=False), "a pickle without allow_pickle")
    writer = tokenizer_writer(format_)
    if writer is not None:
        fingerprint, state = tokenizer.fingerprint, state_of(tokenizer)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / path.stem
            folder.mkdir()
            writer.write(tokenizer, folder)
            written = next(filter(format_.recognises, [folder, *sorted(folder.iterdir())]), None)
            names = sorted(each.name for each in folder.iterdir())
            assert written is not None, (
                f"round trip law: the format does not recognise what it wrote: {names}"
            )
            back = _filled(reader.read(written, allow_pickle=True), written)
        assert back.fingerprint == fingerprint, (
            "round trip law: what the format wrote reads back with another fingerprint"
        )
        same_state(state, state_of(back), "a tensor changes when the format writes and reads it")


def _filled(read: Foreign, path: Path, seed: int = 0) -> Tokenizer:
    tokenizer = Tokenizer(read.config, seed=seed, fetch=False)
    try:
        tokenizer.fill(read.tensors, str(path))
    except CheckpointError as error:
        raise AssertionError(f"filling law: {error}") from error
    return tokenizer


def _check_config(reader: ReadsConfigs, path: Path) -> None:
    tree, again = reader.config(path), reader.config(path)
    assert _is_plain(tree), (
        "training config law: config gives more than nested mappings, lists, numbers and texts"
    )
    assert tree == again, "determinism law: two readings give different configs"
    found = explained(reader, path, ())
    assert found.tree == tree, "training config law: explained and config read different configs"
    for key in found.notes:
        assert _holds(tree, key), f"training config law: a note for {key}, which the config does not have"
    try:
        as_run({**tree, "run": {"dir": "unused", **tree.get("run", {})}})
    except VqcoreError as error:
        raise AssertionError(f"training config law: vqcore refuses the config: {error}") from error
    _check_damaged(reader.config, path)


def _holds(tree: Any, key: str) -> bool:
    for name in key.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _check_published(format_: Any) -> None:
    if not isinstance(format_, Publishes):
        return
    found = format_.published
    assert isinstance(type(format_).published, tuple), (
        "published law: published is not a tuple of the class, where `vqcore import --list` reads it"
    )
    for one in found:
        assert isinstance(one, Published), f"published law: {one!r} is not a Published"
        assert one.name and _HUB_ID.fullmatch(one.id), (
            f"published law: {one} has no name, or its id is not of the form user/name"
        )
    names = [one.name for one in found]
    assert len(names) == len(set(names)), f"published law: a name occurs twice: {', '.join(names)}"


def _check_families(format_: KnowsFamilies) -> None:
    names = format_.families
    assert isinstance(type(format_).families, tuple) and names, (
        "family law: families is not a tuple of the class with a name in it"
    )
    assert len({name.lower() for name in names}) == len(names), "family law: a name occurs twice"
    for name in names:
        assert name and not re.search(r"[\s/]", name), f"family law: {name!r} is no name for PLUGIN/NAME"
        _check_family(name, format_.like(name))
    try:
        format_.like("no such family")
    except ConfigError:
        return
    except Exception as error:
        raise AssertionError(
            f"family law: {type(error).__name__} for an unknown family: {error}; raise ConfigError"
        ) from error
    raise AssertionError("family law: the format has a family for every name")


def _check_family(name: str, found: ForeignConfig) -> None:
    assert _is_plain(found.tree), (
        f"family law: {name} gives more than nested mappings, lists, numbers and texts"
    )
    for section in ("data.modality", "data.batch_size", "model", "objective", "run", "optim"):
        assert _holds(found.tree, section), f"family law: {name} says nothing about {section}"
    data: Mapping[str, Any] = found.tree["data"]
    places = sorted(key for key in data if "path" in key or key in ("eval_share", "group"))
    assert not places, f"family law: {name} says data.{places[0]}, which its user's files decide"
    for key in found.notes:
        assert _holds(found.tree, key), (
            f"family law: {name} has a note for {key}, which its config does not have"
        )
    kept = {key: value for key, value in data.items() if key != "resolution_step" or "input_size_min" in data}
    run = {"dir": "unused", **found.tree["run"]}
    try:
        as_run({**found.tree, "data": {"name": "folder", "path": "unused", **kept}, "run": run})
    except VqcoreError as error:
        raise AssertionError(f"family law: vqcore refuses the config of {name}: {error}") from error


def _is_plain(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def _check_damaged(read: Callable[[Path], Any], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        damaged = Path(folder) / path.name
        if path.is_file():
            damaged.write_bytes(b"\x00damaged")
        else:
            damaged.mkdir()
        _refuses(lambda: read(damaged), "a damaged file" if path.is_file() else "an empty folder")


def _refuses(read: Callable[[], Any], what: str) -> None:
    try:
        read()
    except (CheckpointError, ConfigError):
        return
    except Exception as error:
        raise AssertionError(
            f"damage law: {what} raises {type(error).__name__}: {error}; raise CheckpointError"
        ) from error
    raise AssertionError(f"damage law: the format takes {what}")


def as_run(tree: Mapping[str, Any]) -> RunConfig:
    """A run's config from plain data, checked like a config file."""
    return from_tree(dict(tree), schema=RunConfig, file="conformance")

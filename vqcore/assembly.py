"""From a config to its parts: device, tokenizer, extra modalities, data. All errors here are errors of the user."""

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from vqcore import dist
from vqcore.borrowed import Lender, Loans
from vqcore.data.reader import check_rides
from vqcore.data.sizes import nominal_size, sizes
from vqcore.data.split import Split, side
from vqcore.data.windows import windowed
from vqcore.errors import ConfigError, DataError, did_you_mean, in_bytes, listed
from vqcore.evaluate.best import check_best
from vqcore.evaluate.measure import Metrics, build_metrics
from vqcore.memory import machine_memory
from vqcore.protocols import Data, DataSpec, HasValues, Modality, in_units, is_denoiser, knows_codes
from vqcore.registry import registry
from vqcore.sampling import resolved
from vqcore.schema import RunConfig, TokenizerConfig
from vqcore.tokenizer import Tokenizer

Attempt = Callable[[str], AbstractContextManager[object]]
"""Makes the context in which one part is built, from the config key of this part."""


@dataclass(frozen=True)
class Assembly:
    """The parts that a config names: the tokenizer as initialised, extra modalities, data, metrics."""

    tokenizer: Tokenizer
    extra: dict[str, Modality]
    data: Data
    eval_data: Data | None
    metrics: Metrics


def assemble(config: RunConfig, attempt: Attempt = contextlib.nullcontext) -> Assembly | None:
    """Build every part of a config, in order.

    Each part is built inside `attempt(key)`. By default the first error is raised. `vqcore check` gives an `attempt`
    that collects errors: then assembly continues with all parts that do not need a missing part, and returns None if
    the tokenizer or the training data are missing.
    """
    modality = tokenizer = data = eval_data = None
    extra: dict[str, Modality] = {}
    metrics = Metrics()
    with attempt("data.modality"):
        wanted = config.data.input_size or config.data.input_size_max
        modality = registry().build("modality", config.data.modality, "data.modality", size=wanted)
    if modality is None:
        return None
    with attempt("data"):
        check_batch(config, modality.spec, sizes(config.data, modality.spec)[-1])
    with attempt("model"):
        tokenizer = Tokenizer(tokenizer_config(config, modality), seed=config.run.seed, fetch=False)
    wanted_sizes: list[tuple[int, ...]] = []
    if tokenizer is not None:
        modality = tokenizer.modality  # the other one may hold a large network too
        with attempt("data"):
            wanted_sizes = [*sizes(config.data, tokenizer.spec), *eval_sizes(config, tokenizer)]
        for size in dict.fromkeys(wanted_sizes):
            with attempt("model"):
                check_size(tokenizer, size)
        with attempt("eval.best"):
            if config.eval.best is not None and not config.data.evaluates:
                raise ConfigError(
                    f"eval.best={config.eval.best} is set, but there is nothing to evaluate on. Set "
                    "data.eval_share=0.1 or data.eval_path, or eval.best=null: then the last checkpoint counts."
                )
            if config.eval.best is not None:
                check_best(config.eval.best, build_metrics(config.eval.metrics, tokenizer))
        with attempt("eval.sampling"):
            resolved(type(tokenizer.objective), config.eval.sampling, "eval.sampling")
        with attempt("eval.metrics"):
            metrics = build_metrics(config.eval.metrics, tokenizer)
            for label, metric in metrics.items():
                if in_units(metric) and not isinstance(modality, HasValues):
                    raise ConfigError(
                        f"eval.metrics.{label}: this metric needs values in the units of the files, and the modality "
                        f"{config.data.modality.name} has no method `values`. Name other metrics in eval.metrics."
                    )
    with attempt("data.extra"):
        extra = build_extra(config, modality.spec.size if tokenizer is None else tokenizer.cfg.size)
        for size in dict.fromkeys(wanted_sizes):
            check_rides(extra, size, modality.spec)
    with attempt("data"):
        data = open_data(config, modality, extra, "train")
    if data is not None and knows_codes(data) and not config.model.freeze_enc:
        with attempt("model.freeze_enc"):
            raise ConfigError(
                f"model.freeze_enc: data.name={config.data.name} trains a decoder on codes that are there already, so "
                "the tokens must stay as they are. Set model.freeze_enc=true and model.full_ckpt to the tokenizer that "
                "made the codes."
            )
    with attempt("data"):
        if config.data.evaluates:
            eval_data = open_data(config, modality, extra, "eval")
        elif config.eval.every is not None:
            raise DataError(
                "eval.every is set, but there is nothing to evaluate on. Set data.eval_share=0.1 or data.eval_path."
            )
    if tokenizer is None or data is None:
        return None
    return Assembly(tokenizer, extra, data, eval_data, metrics)


def devices() -> list[str]:
    """The devices of this machine that torch can use."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def pick_device(name: str | None, where: str = "run.device") -> torch.device:
    """The device that a setting asks for; by default this process's GPU if there is one.

    `where` is the setting. Raises `ConfigError` for a device that torch does not know or that is not here.
    """
    here = devices()
    if name is None:
        name = "cuda" if "cuda" in here else "cpu"
    if name not in here:
        if name.startswith("cuda") and "cuda" not in here:
            raise ConfigError(f"{where}={name}: this torch sees no CUDA device. Use {where}=cpu.")
        meant = "cuda" if name.lower() in ("gpu", "nvidia") and "cuda" in here else name.lower()
        hint = did_you_mean(meant, here)
        raise ConfigError(f"{where}={name}: there is no such device here.{hint} Devices: {listed(here)}.")
    if name == "cuda":
        torch.cuda.set_device(dist.local_rank())
        name = f"cuda:{dist.local_rank()}"
    return torch.device(name)


def check_batch(config: RunConfig, spec: DataSpec, size: tuple[int, ...]) -> None:
    """Raise `ConfigError` if the samples of one step do not fit into the memory of this machine."""
    count = config.data.batch_size * config.optim.accumulate
    needed = count * math.prod(size) * (1 if spec.labels else spec.channels) * 4
    if needed > machine_memory():
        raise ConfigError(
            f"data.batch_size={config.data.batch_size}: a step of {count:,} samples of size {list(size)} needs "
            f"{in_bytes(needed)} of memory, and this machine has {in_bytes(machine_memory())}. Take smaller batches."
        )


def tokenizer_config(config: RunConfig, modality: Modality) -> TokenizerConfig:
    """The part of a run's config that an artefact keeps."""
    asked = nominal_size(config.data, modality.spec.rank)
    size = asked if isinstance(asked, tuple) else modality.spec.size
    return TokenizerConfig(
        modality=config.data.modality, size=size, model=config.model.bare, objective=config.objective
    )


def lend_riders(extra: Mapping[str, Modality], lender: Lender) -> Loans:
    """Let the extra modalities borrow their weights; returns what they borrow. They have no weights before."""
    return lender.lend({f"extra.{label}": each for label, each in extra.items()})


def build_extra(config: RunConfig, size: tuple[int, ...]) -> dict[str, Modality]:
    """The extra modalities by label; `size` is the nominal size of the main one."""
    return {
        label: registry().build("modality", cfg, f"data.extra.{label}", size=size)
        for label, cfg in config.data.extra.items()
    }


def open_data(config: RunConfig, modality: Modality, extra: dict[str, Modality], split: Split) -> Data:
    """The samples of a split, `train` or `eval`; an evaluation goes over all windows of a sample that is longer.

    Raises `DataError` where there are none.
    """
    whole = "train" if config.data.eval_share is not None else split
    data = registry().build("data", config.data, "data", split=whole, modality=modality, extra=extra)
    data = side(data, config.data, split)
    return windowed(data, modality, modality.spec.size) if split == "eval" else data


def eval_sizes(config: RunConfig, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The sizes to evaluate at: `eval.sizes` (a number stands for every axis), else the nominal one."""
    if not config.eval.sizes:
        return [tuple(tokenizer.cfg.size)]
    rank = tokenizer.spec.rank
    return [(side,) * rank if isinstance(side, int) else side for side in config.eval.sizes]


def check_size(tokenizer: Tokenizer, size: tuple[int, ...]) -> None:
    """Raise `ConfigError` for a size that the encoder cannot take, or that a denoiser cannot make."""
    model, part = tokenizer.cfg.model, "encoder"
    try:
        tokenizer.grid(size)
        part = "decoder"
        if is_denoiser(tokenizer.decoder):
            tokenizer.decoder.target_shape(size)
    except ValueError as error:
        raise ConfigError(f"model.{part} ({getattr(model, part).name}): {error}.") from error

"""From a config to live parts: device, modalities, data, sizes. Everything here raises what a user can mend."""

import torch

from vqcore import dist
from vqcore.data.loader import nominal_size
from vqcore.errors import ConfigError, DataError
from vqcore.protocols import Data, Modality
from vqcore.registry import registry
from vqcore.schema import RunConfig, TokenizerConfig
from vqcore.tokenizer import Tokenizer


def pick_device(name: str | None) -> torch.device:
    """The device a config asks for; by default this process's GPU if there is one."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device={name}: this torch sees no CUDA device. Use run.device=cpu.")
    if name == "cuda":
        torch.cuda.set_device(dist.local_rank())
        name = f"cuda:{dist.local_rank()}"
    return torch.device(name)


def build_extra(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Modality]:
    """The modalities that ride along, by label."""
    return {
        label: registry().build("modality", cfg, f"data.extra.{label}", size=tokenizer.cfg.size)
        for label, cfg in config.data.extra.items()
    }


def tokenizer_config_of(config: RunConfig) -> TokenizerConfig:
    """The part of a run's config that an artefact keeps."""
    data = config.data
    wanted = data.input_size or data.input_size_max
    modality = registry().build("modality", data.modality, "data.modality", size=wanted)
    size = nominal_size(data, modality.spec.rank)
    size = size if isinstance(size, tuple) else modality.spec.size
    return TokenizerConfig(
        modality=data.modality, size=size, model=config.model.bare, objective=config.objective
    )


def open_data(config: RunConfig, modality: Modality, extra: dict[str, Modality]) -> tuple[Data, Data | None]:
    """Training samples, and evaluation samples when the config names any."""
    wiring = {"modality": modality, "extra": extra}
    data = registry().build("data", config.data, "data", split="train", **wiring)
    wanted = config.data.has_eval
    if not wanted and config.eval.every is not None:
        raise DataError("eval.every is set, but there is nothing to evaluate on. Set data.eval_path.")
    return data, registry().build("data", config.data, "data", split="eval", **wiring) if wanted else None


def open_eval_data(config: RunConfig, modality: Modality, extra: dict[str, Modality]) -> Data:
    """Evaluation samples alone; raises `DataError` when the config names none."""
    return registry().build("data", config.data, "data", split="eval", modality=modality, extra=extra)


def eval_sizes(config: RunConfig, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The sizes to evaluate at: `eval.sizes` (a number stands for every axis), else the nominal one."""
    if not config.eval.sizes:
        return [tuple(tokenizer.cfg.size)]
    rank = tokenizer.spec.rank
    return [(side,) * rank if isinstance(side, int) else side for side in config.eval.sizes]


def check_size(tokenizer: Tokenizer, size: tuple[int, ...]) -> None:
    """Raise `ConfigError` for a size the encoder cannot take."""
    try:
        tokenizer.grid(size)
    except ValueError as error:
        raise ConfigError(f"model.encoder ({tokenizer.cfg.model.encoder.name}): {error}.") from error

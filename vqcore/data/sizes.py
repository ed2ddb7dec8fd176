"""The sizes in a config: the nominal size, and the possible sizes of training batches."""

from vqcore.errors import ConfigError
from vqcore.protocols import DataSpec, expand
from vqcore.schema import DataConfig

MOST_SIZES = 10_000


def nominal_size(cfg: DataConfig, rank: int | None = None) -> int | tuple[int, ...] | None:
    """`input_size`, or the largest size `input_size_max`; one number per axis if `rank` is given."""
    size = cfg.input_size if cfg.input_size_max is None else cfg.input_size_max
    return size if size is None or rank is None else _expand("input_size", size, rank)


def sizes(cfg: DataConfig, spec: DataSpec) -> list[tuple[int, ...]]:
    """The possible sizes of a training batch, from input_size_min up to at most input_size_max.

    Each size is larger than the size before by resolution_step along every axis. Raises `ConfigError` if the axes have
    different numbers of sizes.
    """
    if cfg.input_size_min is None or cfg.input_size_max is None:
        return [spec.size if cfg.input_size is None else _expand("input_size", cfg.input_size, spec.rank)]
    least = _expand("input_size_min", cfg.input_size_min, spec.rank)
    most = _expand("input_size_max", cfg.input_size_max, spec.rank)
    shown = f"data: input_size_min={cfg.input_size_min}, input_size_max={cfg.input_size_max}"
    if any(low > high for low, high in zip(least, most)):
        raise ConfigError(f"{shown}: the minimum is above the maximum")
    steps = [(high - low) // cfg.resolution_step for low, high in zip(least, most)]
    if len(set(steps)) > 1:
        raise ConfigError(
            f"{shown}: with resolution_step={cfg.resolution_step} the axes take {steps} steps, but "
            "all axes must take the same number of steps, because all axes grow together"
        )
    if steps[0] >= MOST_SIZES:
        raise ConfigError(
            f"{shown}: with resolution_step={cfg.resolution_step} these are {steps[0] + 1:,} sizes; "
            f"{MOST_SIZES:,} are the most. Take a larger resolution_step."
        )
    return [tuple(low + k * cfg.resolution_step for low in least) for k in range(steps[0] + 1)]


def _expand(setting: str, size: int | tuple[int, ...], rank: int) -> tuple[int, ...]:
    try:
        return expand(size, rank)
    except ValueError as error:
        raise ConfigError(f"data.{setting}: {error}") from error

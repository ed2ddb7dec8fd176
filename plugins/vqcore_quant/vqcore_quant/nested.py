"""What quantizers made of other quantizers share: building the inner ones, and adding up what they say."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqcore.config import Config
from vqcore.registry import registry
from vqcore_quant.usage import code_metrics, distance


def build_inner(cfg: Config, count: int) -> nn.ModuleList:
    """Build `count` quantizers of one config. Raises ValueError for one that changes the grid."""
    inner = nn.ModuleList(registry().build("quantizer", cfg, "quantizer") for _ in range(count))
    if any(hasattr(one, "grid_out") for one in inner):
        raise ValueError(
            f"quantizer={cfg.name} changes the grid; only one that keeps it can stand inside another"
        )
    return inner


def broken(z: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]) -> Bool[Tensor, "b *grid"]:
    """Where a valid latent is not finite. Every part has to see it, since a step with such a latent teaches nothing."""
    return valid & ~z.detach().isfinite().all(-1)


def token_states(inner: nn.ModuleList, prefix: str) -> dict[str, Tensor]:
    """What decides the codes of the inner quantizers, named as in the state dict."""
    state: dict[str, Tensor] = {}
    for i, one in enumerate(inner):
        own: Any = getattr(one, "token_state", one.state_dict)
        state |= {f"{prefix}.{i}.{name}": value for name, value in own().items()}
    return state


def average(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Float[Tensor, ""]]:
    """Average scalars by name."""
    return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}


def each(
    label: str,
    parts: Iterable[tuple[Int[Tensor, "b *grid q"], Float[Tensor, "b *grid d"], Bool[Tensor, "b *grid"]]],
    codebook_size: int,
    *,
    training: bool,
) -> dict[str, Float[Tensor, ""]]:
    """Metrics of part i as `<label><i>/...`: how its codes are used, what they leave over; and the parts' mean use.

    A part is its codes, what is left of its latents, and where it counts.
    """
    metrics: dict[str, Tensor] = {}
    uses = []
    for i, (codes, left, valid) in enumerate(parts):
        uses.append(code_metrics(codes, valid, codebook_size, training=training))
        figures = uses[-1] | {"codes/distance": distance(left.detach(), torch.zeros_like(left), valid)}
        metrics |= {f"{label}{i}/{name}": value for name, value in figures.items()}
    return metrics | average(uses)

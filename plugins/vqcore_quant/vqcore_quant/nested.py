"""Helpers for quantizers that contain other quantizers: build the inner quantizers and join their results."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vqcore.config import Config
from vqcore.protocols import ChangesGrid, token_state
from vqcore.registry import registry
from vqcore_quant.usage import code_metrics, distance


def build_inner(cfg: Config, count: int) -> nn.ModuleList:
    """Build `count` quantizers from one config. Raises ValueError if the inner quantizer changes the grid."""
    inner = nn.ModuleList(registry().build("quantizer", cfg, "quantizer") for _ in range(count))
    if any(isinstance(one, ChangesGrid) for one in inner):
        raise ValueError(
            f"quantizer={cfg.name} changes the grid; a quantizer inside another quantizer must keep the grid"
        )
    return inner


def broken(z: Float[Tensor, "b *grid d"], valid: Bool[Tensor, "b *grid"]) -> Bool[Tensor, "b *grid"]:
    """Where a valid latent is not finite. All inner quantizers must see it: then none of them learns in this step."""
    return valid & ~z.detach().isfinite().all(-1)


def token_states(inner: nn.ModuleList, prefix: str) -> dict[str, Tensor]:
    """The tensors that decide the codes of the inner quantizers, with the names of the state dict."""
    state: dict[str, Tensor] = {}
    for i, one in enumerate(inner):
        state |= {f"{prefix}.{i}.{name}": value for name, value in token_state(one).items()}
    return state


def average(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Float[Tensor, ""]]:
    """Average the scalars that have the same name."""
    return {name: torch.stack([one[name] for one in found]).mean() for name in found[0]}


def each(
    label: str,
    parts: Iterable[tuple[Int[Tensor, "b *grid q"], Float[Tensor, "b *grid d"], Bool[Tensor, "b *grid"]]],
    codebook_size: int,
    *,
    training: bool,
) -> dict[str, Float[Tensor, ""]]:
    """Metrics of each part i under `<label><i>/...` (use of codes, size of the residual), and the mean use over parts.

    A part is a tuple: its codes, the residual of its latents, and the mask of its valid positions.
    """
    metrics: dict[str, Tensor] = {}
    uses = []
    for i, (codes, left, valid) in enumerate(parts):
        uses.append(code_metrics(codes, valid, codebook_size, training=training))
        own = uses[-1] | {"codes/distance": distance(left.detach(), torch.zeros_like(left), valid)}
        metrics |= {f"{label}{i}/{name}": value for name, value in own.items()}
    return metrics | average(uses)

"""The ranges that settings of several quantizers have in common."""

from collections.abc import Sequence
from typing import Any

LARGEST_CODEBOOK = 2**31
"""So that every code fits into 32 bits."""


def check_ranges(
    cfg: Any, *, counts: Sequence[str] = (), factors: Sequence[str] = (), positive: Sequence[str] = ()
) -> None:
    """Raise ValueError unless `counts` are at least 1, `factors` at least 0 and `positive` above 0.

    Also unless `codebook_size`, if `cfg` has one, is at most 2^31.
    """
    for name in counts:
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} is below 1")
    for name in factors:
        if not getattr(cfg, name) >= 0:
            raise ValueError(f"{name}={getattr(cfg, name)} is below 0")
    for name in positive:
        if not getattr(cfg, name) > 0:
            raise ValueError(f"{name}={getattr(cfg, name)} is not above 0")
    if (getattr(cfg, "codebook_size", None) or 0) > LARGEST_CODEBOOK:
        raise ValueError(f"codebook_size={cfg.codebook_size} is more than {LARGEST_CODEBOOK}")

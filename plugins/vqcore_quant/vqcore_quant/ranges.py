"""Range checks for the settings of several quantizers."""

from collections.abc import Sequence
from typing import Any

LARGEST_CODEBOOK = 2**31
"""Every code of a codebook of this size fits into 32 bits."""


def check_ranges(
    cfg: Any, *, counts: Sequence[str] = (), factors: Sequence[str] = (), positive: Sequence[str] = ()
) -> None:
    """Raise ValueError if one of `counts` is below 1, one of `factors` is below 0, or one of `positive` is not above 0.

    Also raise ValueError if `cfg` has a `codebook_size` above 2^31.
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

"""Range checks for the settings of several quantizers."""

from collections.abc import Sequence
from typing import Any

from vqcore.config import above_zero, at_least
from vqcore.errors import SettingError

LARGEST_CODEBOOK = 2**31
"""Every code of a codebook of this size fits into 32 bits."""


def check_ranges(
    cfg: Any, *, counts: Sequence[str] = (), factors: Sequence[str] = (), positive: Sequence[str] = ()
) -> None:
    """Raise `SettingError` if one of `counts` is below 1, of `factors` below 0, or one of `positive` is not above 0.

    Also raise it if `cfg` has a `codebook_size` above 2^31.
    """
    at_least(cfg, **dict.fromkeys(counts, 1), **dict.fromkeys(factors, 0))
    above_zero(cfg, *positive)
    if (getattr(cfg, "codebook_size", None) or 0) > LARGEST_CODEBOOK:
        raise SettingError("codebook_size", f"{cfg.codebook_size} is more than {LARGEST_CODEBOOK}")

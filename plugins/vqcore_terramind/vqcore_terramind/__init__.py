"""The tokenizers of TerraMind (arXiv 2504.11171) in vqcore, token for token."""

from typing import Any

__all__ = ["Backbone"]


def __getattr__(name: str) -> Any:
    # The manifest of this package is read without torch.
    if name in __all__:
        from vqcore_terramind import backbone

        return getattr(backbone, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

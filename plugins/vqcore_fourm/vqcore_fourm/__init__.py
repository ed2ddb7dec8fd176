"""The tokenizers of 4M (arXiv 2312.06647, 2406.09406) in vqcore, token for token."""

from typing import Any

__all__ = ["get_image_tokenizer"]


def __getattr__(name: str) -> Any:
    # The manifest of this package is read without torch.
    if name in __all__:
        from vqcore_fourm import drop_in

        return getattr(drop_in, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

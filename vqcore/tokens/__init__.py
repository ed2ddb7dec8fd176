"""Data sets of codes."""

from vqcore.tokens.dataset import TokenDataset

__all__ = ["TokenDataset"]

"""Learned discrete tokenizers for any modality. Import names from their own modules: one path per name."""

__version__ = "0.1.0"

"""Stable Diffusion with a ControlNet as the decoder of a tokenizer."""

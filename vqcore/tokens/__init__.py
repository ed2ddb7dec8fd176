"""Data sets of codes."""

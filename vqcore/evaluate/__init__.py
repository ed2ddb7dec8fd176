"""Measures a tokenizer, and compares measurements."""

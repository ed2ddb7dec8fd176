"""Hooks that come with the core, and what calls them."""

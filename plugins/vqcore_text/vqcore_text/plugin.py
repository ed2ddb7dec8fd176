"""The manifest of vqcore-text. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `text/`."""
    return Plugin(
        api=1,
        summary="Tokenizers of text, and of what can be written as text",
        components=(
            Component(
                "text",
                "wordpiece",
                "vqcore_text.wordpiece:WordPiece",
                "WordPiece, with tokens for spans, coordinates and classes",
            ),
        ),
    )

"""The manifest of vqcore-terramind. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `terramind/`."""
    return Plugin(
        api=1,
        summary="The tokenizers of TerraMind, token for token",
        components=(
            Component(
                "format",
                "checkpoint",
                "vqcore_terramind.checkpoint:Checkpoint",
                "tokenizers of TerraMind: the published files, and files for terratorch",
            ),
        ),
    )

"""The manifest of vqcore-fourm. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `fourm/`."""
    return Plugin(
        api=1,
        summary="The tokenizers of 4M, token for token",
        components=(
            Component(
                "format",
                "checkpoint",
                "vqcore_fourm.checkpoint:Checkpoint",
                "tokenizers of 4M: training checkpoints and published files; writes these",
            ),
            Component(
                "format",
                "config",
                "vqcore_fourm.config:Config",
                "training configs of 4M's three scripts, with flags of their command line",
            ),
            Component(
                "store",
                "tokens",
                "vqcore_fourm.tokens:Tokens",
                "4M's token folders: int16 (crops, tokens) at CLASS/ID.npy, with crop_settings beside",
            ),
            Component(
                "data",
                "folder",
                "vqcore_fourm.folder:Folder",
                "4M's tree of files, root/<task>/<class>/<name>.<suffix>, aligned by name",
            ),
            Component(
                "decoder",
                "none",
                "vqcore_fourm.none:NoDecoder",
                "no decoder, for 4M's VQ, which only encodes",
            ),
        ),
    )

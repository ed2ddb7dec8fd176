"""The manifest of vqcore-vit. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `vit/`."""
    return Plugin(
        api=1,
        summary="Vision transformers for inputs of one to three axes",
        components=(
            Component("encoder", "encoder", "vqcore_vit.vit:ViTEncoder", "patches or features to latents"),
            Component("decoder", "decoder", "vqcore_vit.vit:ViTDecoder", "latents to patches or features"),
        ),
    )

"""The manifest of vqcore-vit. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `vit/`."""
    return Plugin(
        api=1,
        summary="Transformers and MLPs for inputs of one to three axes, and timm's models",
        components=(
            Component("encoder", "encoder", "vqcore_vit.vit:ViTEncoder", "patches or features to latents"),
            Component("decoder", "decoder", "vqcore_vit.vit:ViTDecoder", "latents to patches or features"),
            Component(
                "encoder", "mlp-encoder", "vqcore_vit.mlp:MLPEncoder", "each position alone to a latent"
            ),
            Component(
                "decoder", "mlp-decoder", "vqcore_vit.mlp:MLPDecoder", "each latent alone to its position"
            ),
            Component("encoder", "query-encoder", "vqcore_vit.query:QueryEncoder", "any size to N latents"),
            Component("decoder", "query-decoder", "vqcore_vit.query:QueryDecoder", "N latents to any size"),
            Component("encoder", "timm-encoder", "vqcore_vit.timm_encoder:TimmEncoder", "any model of timm"),
        ),
    )

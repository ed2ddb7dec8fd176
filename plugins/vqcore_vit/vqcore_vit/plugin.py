"""The manifest of vqcore-vit. Light layer: this module imports only `vqcore.plugin`."""

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
                "encoder",
                "mlp-encoder",
                "vqcore_vit.mlp:MLPEncoder",
                "MLP: each position separately to a latent",
            ),
            Component(
                "decoder",
                "mlp-decoder",
                "vqcore_vit.mlp:MLPDecoder",
                "MLP: each latent separately to its position",
            ),
            Component(
                "encoder",
                "query-encoder",
                "vqcore_vit.query:QueryEncoder",
                "any size to a fixed number of latents",
            ),
            Component(
                "decoder",
                "query-decoder",
                "vqcore_vit.query:QueryDecoder",
                "a fixed number of latents to any size",
            ),
            Component(
                "encoder", "timm-encoder", "vqcore_vit.timm_encoder:TimmEncoder", "any image model of timm"
            ),
        ),
    )

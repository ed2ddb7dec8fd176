"""The manifest of vqcore-controlnet. Light layer: this module imports only `vqcore.plugin`."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `controlnet/`."""
    return Plugin(
        api=1,
        summary="Stable Diffusion with a ControlNet as the decoder",
        components=(
            Component(
                "decoder",
                "sd",
                "vqcore_controlnet.sd:StableDiffusion",
                "denoiser: Stable Diffusion, steered by tokens",
            ),
            Component(
                "decoder",
                "adapter",
                "vqcore_controlnet.adapter:Adapter",
                "tokens to latents of Stable Diffusion, for sd",
            ),
        ),
    )

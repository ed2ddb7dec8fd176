"""The manifest of vqcore-unet. Light layer: this module imports only `vqcore.plugin`."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `unet/`."""
    return Plugin(
        api=1,
        summary="Diffusion and flow: schedulers, denoisers, and the convolutional pair of VQGAN",
        components=(
            Component("decoder", "unet", "vqcore_unet.unet:UNet", "denoiser: a U-Net on patches"),
            Component(
                "decoder", "uvit", "vqcore_unet.uvit:UViT", "denoiser: convolutions around a transformer"
            ),
            Component("scheduler", "ddpm", "vqcore_unet.schedulers:DDPM", "diffusion; sampling with noise"),
            Component(
                "scheduler", "ddim", "vqcore_unet.schedulers:DDIM", "diffusion; sampling without noise"
            ),
            Component("scheduler", "pndm", "vqcore_unet.schedulers:PNDM", "diffusion; multistep sampling"),
            Component(
                "scheduler",
                "diffusers",
                "vqcore_unet.schedulers:Diffusers",
                "diffusion; sampling with any scheduler of diffusers",
            ),
            Component("scheduler", "flow", "vqcore_unet.flow:Flow", "rectified flow; Euler and Heun"),
            Component(
                "objective",
                "distill",
                "vqcore_unet.distill:Distill",
                "a decoder of a few steps, learned from a diffusion decoder",
            ),
            Component("encoder", "cnn-encoder", "vqcore_unet.cnn:CNNEncoder", "VQGAN's convolutions"),
            Component("decoder", "cnn-decoder", "vqcore_unet.cnn:CNNDecoder", "VQGAN's convolutions"),
        ),
    )

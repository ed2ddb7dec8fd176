"""The manifest of vqcore-percept. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `percept/`."""
    return Plugin(
        api=1,
        summary="Networks that judge reconstructions: perceptual losses, teachers, a GAN's adversary",
        components=(
            Component(
                "percept",
                "lpips",
                "vqcore_percept.lpips:LPIPS",
                "features of VGG, AlexNet or SqueezeNet, weighed by people",
            ),
            Component(
                "percept",
                "timm",
                "vqcore_percept.timm:Timm",
                "features or logits of any picture model of timm",
            ),
            Component(
                "percept",
                "clip",
                "vqcore_percept.clip:Clip",
                "features or embedding of a tower of CLIP",
            ),
            Component("teacher", "timm", "vqcore_percept.timm:TimmTeacher", "a frozen picture model of timm"),
            Component("teacher", "clip", "vqcore_percept.clip:ClipTeacher", "a frozen picture tower of CLIP"),
            Component("discriminator", "dino", "vqcore_percept.dino:Dino", "light heads on a frozen teacher"),
            Component(
                "adversary",
                "gan",
                "vqcore_percept.gan:Gan",
                "a discriminator, its losses and what keeps them in balance",
            ),
            Component(
                "discriminator",
                "patchgan",
                "vqcore_percept.patchgan:PatchGAN",
                "strided convolutions judge patches",
            ),
        ),
    )

"""The manifest of vqcore-percept. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `percept/`."""
    return Plugin(
        api=1,
        summary="Networks that judge reconstructions: perceptual losses, metrics, teachers, a GAN's adversary",
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
            Component(
                "metric", "lpips", "vqcore_percept.pairs:LPIPSMetric", "a distance that people agree with"
            ),
            Component(
                "metric", "ms-ssim", "vqcore_percept.pairs:MSSSIM", "structural similarity at five scales"
            ),
            Component(
                "metric",
                "fid",
                "vqcore_percept.fid:FID",
                "distance of two sets in Inception's features, KID, precision and recall",
            ),
            Component("metric", "fdd", "vqcore_percept.fdd:FDD", "distance of two sets in DINOv2's features"),
            Component(
                "metric", "cmmd", "vqcore_percept.cmmd:CMMD", "distance of two sets in CLIP's embeddings"
            ),
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

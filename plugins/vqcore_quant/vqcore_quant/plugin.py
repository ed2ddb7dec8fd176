"""The manifest: names of the quantizers. Light layer: imports `vqcore.plugin` and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """Quantizers that turn latents into codes and back."""
    return Plugin(
        api=1,
        summary="Quantizers: learned codebooks and finite scalars",
        components=(
            Component(
                "quantizer",
                "vq",
                "vqcore_quant.vq:VQ",
                "one codebook that follows the means of the latents; cosine or Euclidean; revives dead codes",
            ),
            Component(
                "quantizer",
                "fsq",
                "vqcore_quant.fsq:FSQ",
                "rounds each channel to a few levels; nothing to learn",
            ),
        ),
    )

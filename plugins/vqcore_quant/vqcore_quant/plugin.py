"""The manifest: names of the quantizers. Light layer: imports `vqcore.plugin` and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """Quantizers that turn latents into codes and back."""
    return Plugin(
        api=1,
        summary="Quantizers: learned codebooks, finite scalars, bits, and combinations of them",
        components=(
            Component(
                "quantizer",
                "vq",
                "vqcore_quant.vq:VQ",
                "codebooks that follow the latents' means or learn; cosine or Euclidean; revives dead codes",
            ),
            Component(
                "quantizer",
                "fsq",
                "vqcore_quant.fsq:FSQ",
                "rounds each channel to a few levels; nothing to learn",
            ),
            Component(
                "quantizer",
                "lfq",
                "vqcore_quant.lfq:LFQ",
                "one bit a channel, its sign; an entropy loss keeps the codes in use",
            ),
            Component(
                "quantizer",
                "bsq",
                "vqcore_quant.bsq:BSQ",
                "one bit a channel of the latent's direction; bounded error, any number of bits",
            ),
            Component(
                "quantizer",
                "memcodes",
                "vqcore_quant.memcodes:Memcodes",
                "codebooks by heads, asked like an attention layer, drawn by Gumbel-softmax in training",
            ),
            Component(
                "quantizer",
                "simvq",
                "vqcore_quant.simvq:SimVQ",
                "a frozen random codebook times one learned matrix: every code moves at every step",
            ),
            Component(
                "quantizer",
                "ibq",
                "vqcore_quant.ibq:IBQ",
                "a learned codebook chosen by dot product, with gradient to every code",
            ),
            Component(
                "quantizer",
                "residual",
                "vqcore_quant.residual:Residual",
                "levels of any quantizer, each for what the ones before left over",
            ),
            Component(
                "quantizer",
                "product",
                "vqcore_quant.product:Product",
                "any quantizer on groups of channels",
            ),
            Component(
                "quantizer",
                "vqp",
                "vqcore_quant.vqp:VQP",
                "further methods of the package vector-quantize-pytorch, if it is installed",
            ),
        ),
    )

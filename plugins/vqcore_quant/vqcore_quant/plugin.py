"""The manifest: the names of the quantizers. Light layer: this module imports only `vqcore.plugin`."""

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
                "codebooks that follow the latents' means or are trained; cosine or Euclidean; replaces dead codes",
            ),
            Component(
                "quantizer",
                "fsq",
                "vqcore_quant.fsq:FSQ",
                "rounds each channel to a few levels; has no parameters",
            ),
            Component(
                "quantizer",
                "lfq",
                "vqcore_quant.lfq:LFQ",
                "one bit per channel: the sign; an entropy loss keeps the codes in use",
            ),
            Component(
                "quantizer",
                "bsq",
                "vqcore_quant.bsq:BSQ",
                "one bit per channel of the normalized latent; bounded quantization error",
            ),
            Component(
                "quantizer",
                "memcodes",
                "vqcore_quant.memcodes:Memcodes",
                "one codebook per head, searched like in an attention layer; Gumbel-softmax in training",
            ),
            Component(
                "quantizer",
                "simvq",
                "vqcore_quant.simvq:SimVQ",
                "a frozen random codebook times one trained matrix: every code moves at every step",
            ),
            Component(
                "quantizer",
                "ibq",
                "vqcore_quant.ibq:IBQ",
                "a trained codebook; codes are chosen by dot product; every code gets a gradient",
            ),
            Component(
                "quantizer",
                "residual",
                "vqcore_quant.residual:Residual",
                "several levels of any quantizer; each level quantizes the residual of the levels before it",
            ),
            Component(
                "quantizer",
                "product",
                "vqcore_quant.product:Product",
                "groups of channels, each with its own quantizer of any kind",
            ),
            Component(
                "quantizer",
                "vqp",
                "vqcore_quant.vqp:VQP",
                "further methods of the package vector-quantize-pytorch (if installed)",
            ),
        ),
    )

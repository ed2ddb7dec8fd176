"""The manifest of vqcore-fit. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `fit/`."""
    return Plugin(
        api=1,
        summary="Tokenizers that are fitted to data, without training",
        components=(
            Component("encoder", "patches", "vqcore_fit.patches:Patches", "the values of patches, unchanged"),
            Component("decoder", "patches", "vqcore_fit.patches:PatchesDecoder", "values back to patches"),
            Component("encoder", "dct", "vqcore_fit.patches:DCT", "cosine transform of patches"),
            Component(
                "decoder", "dct", "vqcore_fit.patches:DCTDecoder", "inverse cosine transform of patches"
            ),
            Component("quantizer", "scalar", "vqcore_fit.scalar:Scalar", "intervals for each column"),
            Component(
                "quantizer", "kmeans", "vqcore_fit.kmeans:KMeans", "the nearest of centres from k-means"
            ),
            Component(
                "quantizer", "fast", "vqcore_fit.fast:FAST", "rounded coefficients, then byte-pair codes"
            ),
        ),
    )

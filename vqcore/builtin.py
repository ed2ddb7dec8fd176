"""The core's own manifest: the core is its own first plugin. Light layer."""

from vqcore.plugin import API, Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names have no slash."""
    return Plugin(
        api=API,
        summary="Protocols, trainer, data, tokens and command line",
        components=(
            Component("modality", "rgb", "vqcore.modalities.rgb:RGB", "photographs and other RGB pictures"),
            Component(
                "modality",
                "array",
                "vqcore.modalities.array:Array",
                "any array of 1 to 3 axes: channels, range and kind are declared",
            ),
            Component("data", "folder", "vqcore.data.sources:Folder", "a folder of files, at any depth"),
            Component(
                "data", "array", "vqcore.data.sources:ArrayFile", "samples stacked in one .npy or .npz file"
            ),
            Component(
                "objective",
                "reconstruction",
                "vqcore.objectives:Reconstruction",
                "the decoder returns the input: pixel loss plus the quantizer's own losses",
            ),
            Component(
                "metric", "psnr", "vqcore.metrics:PSNR", "peak signal-to-noise ratio in dB, mean over samples"
            ),
            Component("metric", "mae", "vqcore.metrics:MAE", "mean absolute error in units of the data"),
            Component(
                "metric", "accuracy", "vqcore.metrics:Accuracy", "share of positions with the right class"
            ),
        ),
    )

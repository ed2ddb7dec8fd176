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
            Component(
                "modality",
                "mask",
                "vqcore.modalities.mask:Mask",
                "which positions of the sample beside it count",
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
                "metric",
                "psnr",
                "vqcore.metrics.pixels:PSNR",
                "peak signal-to-noise ratio in dB, mean over samples",
            ),
            Component(
                "metric",
                "ssim",
                "vqcore.metrics.ssim:SSIM",
                "structural similarity of 8-bit pictures, mean over samples",
            ),
            Component(
                "metric",
                "mae",
                "vqcore.metrics.pixels:MAE",
                "mean absolute error in the values that the tokenizer sees",
            ),
            Component(
                "metric",
                "accuracy",
                "vqcore.metrics.labels:Accuracy",
                "share of positions with the right class",
            ),
            Component(
                "metric",
                "iou",
                "vqcore.metrics.labels:IoU",
                "intersection over union, mean over the classes that occur",
            ),
            Component(
                "metric", "f1", "vqcore.metrics.labels:F1", "F1 of what lies above a threshold: edges, masks"
            ),
            Component(
                "metric",
                "angle",
                "vqcore.metrics.vectors:Angle",
                "degrees between directions: mean, median, shares",
            ),
            Component(
                "metric",
                "cosine",
                "vqcore.metrics.vectors:Cosine",
                "mean cosine between vectors over channels",
            ),
        ),
    )

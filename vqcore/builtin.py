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
                "depth",
                "vqcore.modalities.depth:Depth",
                "depth maps with holes: 16-bit, npy, EXR",
            ),
            Component(
                "modality", "normal", "vqcore.modalities.normal:Normal", "surface normals: 8-bit, npy, EXR"
            ),
            Component("modality", "semseg", "vqcore.modalities.semseg:Semseg", "maps of class ids"),
            Component(
                "modality", "edge", "vqcore.modalities.edge:Edge", "edge maps: Canny's, SAM's, any 8-bit"
            ),
            Component(
                "modality",
                "features",
                "vqcore.modalities.features:Features",
                "feature maps of another network",
            ),
            Component("modality", "vector", "vqcore.modalities.vector:Vector", "one feature vector a sample"),
            Component(
                "modality", "pose", "vqcore.modalities.pose:Pose", "joints of a body, or their rotations"
            ),
            Component(
                "modality", "instance", "vqcore.modalities.instance:Instance", "masks of single instances"
            ),
            Component(
                "modality",
                "mask",
                "vqcore.modalities.mask:Mask",
                "which positions of a sample beside it count",
            ),
            Component("modality", "audio", "vqcore.modalities.audio:Audio", "waveforms"),
            Component(
                "modality",
                "log-mel",
                "vqcore.modalities.audio:LogMel",
                "spectrograms of sounds, in dB over mel bands",
            ),
            Component("data", "folder", "vqcore.data.sources:Folder", "a folder of files, at any depth"),
            Component(
                "data", "array", "vqcore.data.sources:ArrayFile", "samples stacked in one .npy or .npz file"
            ),
            Component(
                "data",
                "synthetic",
                "vqcore.data.synthetic.source:Synthetic",
                "seeded scenes whose labels are exact",
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
            Component(
                "metric",
                "ssim",
                "vqcore.ssim:SSIM",
                "structural similarity of 8-bit pictures, mean over samples",
            ),
            Component(
                "metric",
                "joint-error",
                "vqcore.scores_signal:JointError",
                "distance of joints, in units of the files",
            ),
            Component(
                "metric",
                "rotation-error",
                "vqcore.scores_signal:RotationError",
                "angle between rotations, in degrees",
            ),
            Component(
                "metric",
                "si-snr",
                "vqcore.scores_signal:SISNR",
                "scale-invariant signal-to-noise ratio in dB",
            ),
            Component("metric", "mae", "vqcore.metrics:MAE", "mean absolute error, a range being -1 to 1"),
            Component(
                "metric", "accuracy", "vqcore.metrics:Accuracy", "share of positions with the right class"
            ),
            Component(
                "metric",
                "iou",
                "vqcore.scores:IoU",
                "intersection over union, mean over the classes that occur",
            ),
            Component("metric", "f1", "vqcore.scores:F1", "F1 of what lies above a threshold: edges, masks"),
            Component(
                "metric", "angle", "vqcore.scores:Angle", "degrees between directions: mean, median, shares"
            ),
            Component(
                "metric", "cosine", "vqcore.scores:Cosine", "mean cosine between vectors over channels"
            ),
            Component("metric", "abs-rel", "vqcore.scores:AbsRel", "mean relative error of depths, and rmse"),
            Component("metric", "delta", "vqcore.scores:Delta", "shares of depths within a factor of 1.25^k"),
            Component(
                "hook",
                "tensorboard",
                "vqcore.hooks.tensorboard:TensorBoard",
                "figures, pictures and code usage as TensorBoard event files",
            ),
            Component(
                "hook",
                "wandb",
                "vqcore.hooks.wandb:Wandb",
                "figures, pictures and code usage to Weights & Biases",
            ),
        ),
    )

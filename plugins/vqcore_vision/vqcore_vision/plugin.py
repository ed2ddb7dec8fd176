"""The manifest of vqcore-vision. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `vision/`."""
    return Plugin(
        api=1,
        summary="Depth, normals, segmentation, edges, instances, features, poses: modalities and their metrics",
        components=(
            Component(
                "modality", "depth", "vqcore_vision.depth:Depth", "depth maps with holes: 16-bit, npy, EXR"
            ),
            Component(
                "modality", "normal", "vqcore_vision.normal:Normal", "surface normals: 8-bit, npy, EXR"
            ),
            Component("modality", "semseg", "vqcore_vision.semseg:Semseg", "maps of class ids"),
            Component("modality", "edge", "vqcore_vision.edge:Edge", "edge maps: Canny's, SAM's, any 8-bit"),
            Component("modality", "instance", "vqcore_vision.instance:Instance", "masks of single instances"),
            Component(
                "modality", "features", "vqcore_vision.features:Features", "feature maps of another network"
            ),
            Component("modality", "vector", "vqcore_vision.vector:Vector", "one feature vector a sample"),
            Component("modality", "pose", "vqcore_vision.pose:Pose", "joints of a body, or their rotations"),
            Component(
                "metric", "abs-rel", "vqcore_vision.metrics:AbsRel", "mean relative error of depths, and rmse"
            ),
            Component(
                "metric", "delta", "vqcore_vision.metrics:Delta", "shares of depths within a factor of 1.25^k"
            ),
            Component(
                "metric",
                "joint-error",
                "vqcore_vision.metrics:JointError",
                "distance of joints, in units of the files",
            ),
            Component(
                "metric",
                "rotation-error",
                "vqcore_vision.metrics:RotationError",
                "angle between rotations, in degrees",
            ),
        ),
    )

"""The manifest of vqcore-vision. It imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl

MODALITIES = (
    ("depth", "vqcore_vision.depth:Depth", "depth maps with holes: 16-bit pictures, npy, EXR"),
    ("normal", "vqcore_vision.normal:Normal", "surface normals: 8-bit pictures, npy, EXR"),
    ("semseg", "vqcore_vision.semseg:Semseg", "maps of class ids"),
    ("edge", "vqcore_vision.edge:Edge", "edge maps, 8 bits: from Canny, SAM or any other detector"),
    ("instance", "vqcore_vision.instance:Instance", "masks of single instances"),
    ("features", "vqcore_vision.features:Features", "feature maps of another network"),
    ("vector", "vqcore_vision.vector:Vector", "one feature vector a sample"),
    ("pose", "vqcore_vision.pose:Pose", "joints of a body, or their rotations"),
)
METRICS = (
    ("abs-rel", "vqcore_vision.metrics:AbsRel", "mean relative error of depths, and rmse"),
    ("delta", "vqcore_vision.metrics:Delta", "shares of depths within a factor of 1.25^k"),
    ("joint-error", "vqcore_vision.metrics:JointError", "distance of joints, in units of the files"),
    ("rotation-error", "vqcore_vision.metrics:RotationError", "angle between rotations, in degrees"),
)


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `vision/`."""
    return Plugin(
        api=1,
        summary="Modalities of computer vision and their metrics: depth, normals, classes, edges, instances, poses",
        components=(
            *(Component("modality", *each) for each in MODALITIES),
            *(Component("metric", *each) for each in METRICS),
        ),
    )

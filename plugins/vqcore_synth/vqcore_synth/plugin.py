"""The manifest of vqcore-synth. It imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `synth/`."""
    return Plugin(
        api=1,
        summary="A data source of synthetic scenes whose labels are exact",
        components=(
            Component(
                "data",
                "scenes",
                "vqcore_synth.source:Scenes",
                "synthetic scenes: pictures, depth, normals, classes, edges, poses, sounds",
            ),
        ),
    )

"""The manifest of vqcore-synth. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `synth/`."""
    return Plugin(
        api=1,
        summary="Invented samples whose labels are exact",
        components=(
            Component("data", "scenes", "vqcore_synth.source:Scenes", "seeded scenes whose labels are exact"),
        ),
    )

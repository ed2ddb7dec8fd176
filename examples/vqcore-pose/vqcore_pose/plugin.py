"""The manifest: the name and the class of each component. Imports only vqcore.plugin."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """What this package adds to vqcore."""
    return Plugin(
        api=1,
        summary="Tokenizers for sequences of 2-D keypoints",
        components=(
            Component(
                "modality", "keypoints", "vqcore_pose.keypoints:Keypoints", "people as joints over time"
            ),
            Component("data", "walks", "vqcore_pose.walks:Walks", "synthetic people who walk, seeded"),
            Component("quantizer", "signs", "vqcore_pose.signs:Signs", "one bit a channel, in groups"),
            Component("hook", "walk-gif", "vqcore_pose.gif:WalkGif", "an animation at each evaluation"),
        ),
    )

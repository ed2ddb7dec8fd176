"""The manifest of vqcore-track. Light layer: imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `track/`."""
    return Plugin(
        api=1,
        summary="Watches runs: TensorBoard, W&B, a profile, a report for the browser",
        components=(
            Component(
                "hook",
                "report",
                "vqcore_track.report:Report",
                "a page about the run for the browser, when the run ends",
            ),
            Component(
                "hook",
                "tensorboard",
                "vqcore_track.tensorboard:TensorBoard",
                "metrics, pictures and code usage as TensorBoard event files",
            ),
            Component(
                "hook",
                "wandb",
                "vqcore_track.wandb:Wandb",
                "metrics, pictures and code usage at Weights & Biases",
            ),
            Component(
                "hook",
                "profile",
                "vqcore_track.profile:Profile",
                "a trace of some steps and a table of their most expensive operations",
            ),
        ),
    )

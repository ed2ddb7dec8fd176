"""The manifest of vqcore-audio. It imports vqcore.plugin and nothing else."""

from vqcore.plugin import Component, Plugin, hookimpl


@hookimpl
def vqcore_plugin() -> Plugin:
    """The components whose names start with `audio/`."""
    return Plugin(
        api=1,
        summary="Modalities of sound and their metric: waveforms, log-mel spectrograms, si-snr",
        components=(
            Component(
                "modality", "wave", "vqcore_audio.sounds:Wave", "waveforms of any rate and number of channels"
            ),
            Component(
                "modality",
                "log-mel",
                "vqcore_audio.sounds:LogMel",
                "spectrograms of sounds, in dB over mel bands",
            ),
            Component(
                "metric",
                "si-snr",
                "vqcore_audio.metrics:SISNR",
                "scale-invariant signal-to-noise ratio in dB",
            ),
        ),
    )

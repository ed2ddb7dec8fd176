"""The laws of each kind hold for every component of this plugin."""

import pytest

from vqcore.protocols import DataSpec
from vqcore.registry import registry
from vqcore.testing import checks
from vqcore.testing.basics import noise
from vqcore.testing.conformance import build

PICTURE = DataSpec(channels=3, size=(8, 12))
SIGNAL = DataSpec(channels=5, size=(24,))
FAST = {"latent_dim": 6, "codebook_size": 128, "scale": 4.0}
CUT = {"idempotent": "what was cut is written anew as zeros, which takes codes"}


def test_the_manifest_and_the_settings():
    components = registry().plugin("fit").components
    checks.check_manifest("vqcore_fit.plugin", tuple(found.target for found in components))
    for found in components:
        checks.check_config(registry().load(found.kind, f"fit/{found.name}"))


@pytest.mark.parametrize(
    ("name", "settings", "waived"),
    [
        ("scalar", {"latent_dim": 3, "codebook_size": 16}, {}),
        (
            "scalar",
            {"latent_dim": 2, "codebook_size": 2, "method": ["uniform", "quantile"], "samples": 100},
            {},
        ),
        ("kmeans", {"latent_dim": 6, "codebook_size": 16}, {}),
        ("kmeans", {"latent_dim": 6, "codebook_size": 8, "num_codebooks": 3, "samples": 100}, {}),
        ("fast", {**FAST, "num_codebooks": 6}, {}),
        ("fast", {**FAST, "num_codebooks": 2}, CUT),
    ],
)
def test_quantizers(name, settings, waived):
    checks.check_quantizer(build("quantizer", f"fit/{name}", settings), waived=waived)


@pytest.mark.parametrize(
    ("name", "spec", "patch"),
    [
        ("patches", PICTURE, 4),
        ("patches", PICTURE, [2, 3]),
        ("patches", SIGNAL, 1),
        ("dct", PICTURE, 4),
        ("dct", PICTURE, [8, 3]),
        ("dct", SIGNAL, 24),
    ],
)
def test_encoders_and_decoders(name, spec, patch):
    settings = {"patch_size": patch}
    encoder = build("encoder", f"fit/{name}", settings, spec=spec)
    checks.check_encoder(encoder, noise(3, spec.channels, *spec.size))
    decoder = build("decoder", f"fit/{name}", settings, dim=encoder.dim, spec=spec)
    z_q = noise(3, *encoder.grid(spec.size), encoder.dim)
    checks.check_decoder(decoder, z_q, (3, spec.channels, *spec.size))

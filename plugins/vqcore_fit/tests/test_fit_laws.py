"""The laws of each kind hold for every component of this plugin."""

import pytest
import torch

from vqcore.protocols import DataSpec
from vqcore.testing.conformance import (
    DecoderConformance,
    EncoderConformance,
    QuantizerConformance,
    build,
)

PICTURE = DataSpec(channels=3, size=(8, 12))
SIGNAL = DataSpec(channels=5, size=(24,))


class TestScalar(QuantizerConformance):
    component = "fit/scalar"
    configs = (
        {"latent_dim": 3, "codebook_size": 16},
        {"latent_dim": 2, "codebook_size": 2, "method": ["uniform", "quantile"], "samples": 100},
    )


class TestKMeans(QuantizerConformance):
    component = "fit/kmeans"
    configs = (
        {"latent_dim": 6, "codebook_size": 16},
        {"latent_dim": 6, "codebook_size": 8, "num_codebooks": 3, "samples": 100},
    )


class TestFAST(QuantizerConformance):
    component = "fit/fast"
    configs = ({"latent_dim": 6, "num_codebooks": 6, "codebook_size": 128, "scale": 4.0},)


class TestShortFAST(QuantizerConformance):
    component = "fit/fast"
    configs = ({"latent_dim": 6, "num_codebooks": 2, "codebook_size": 128, "scale": 4.0},)
    waived = {"idempotent": "what was cut is written anew as zeros, which takes codes"}  # noqa: RUF012


class TestPatches(EncoderConformance):
    component, spec, configs = "fit/patches", PICTURE, ({"patch_size": 4}, {"patch_size": [2, 3]}, {})


class TestPatchesDecoder(DecoderConformance):
    component, spec, grid, dim = "fit/patches", PICTURE, (2, 3), 48
    configs = ({"patch_size": 4},)


class TestDCT(EncoderConformance):
    component, spec, configs = "fit/dct", PICTURE, ({"patch_size": 4}, {"patch_size": [8, 3]})


class TestDCTOfSignals(EncoderConformance):
    component, spec, configs = "fit/dct", SIGNAL, ({"patch_size": 8}, {"patch_size": 24})


class TestDCTDecoder(DecoderConformance):
    component, spec, grid, dim = "fit/dct", SIGNAL, (3,), 40
    configs = ({"patch_size": 8},)
